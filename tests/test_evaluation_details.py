"""Classes, thresholds and confusions of an evaluation, against pycocotools and slow loops."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluation import tricky, truth_of
from transformers import DetrImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

from qskd.errors import QskdError
from qskd.evaluation.average_precision import detections_from, evaluate_coco
from qskd.evaluation.coco_backends import _coco_dicts
from qskd.evaluation.details import Evaluation, evaluate_in_detail
from qskd.evaluation.detections import Array, Detections, GroundTruth
from qskd.evaluation.matching import NEITHER, RIGHT, confusions, judge
from qskd.evaluation.pairs import Pairs, pairs_of_transformers
from qskd.families.detr import from_softmax


def coco_run(truth: GroundTruth, found: Detections) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    order = np.argsort(found.image_ids, kind="stable")
    found = Detections(*(column[order] for column in vars(found).values()))
    with contextlib.redirect_stdout(io.StringIO()):
        known, detected = COCO(), COCO()
        known.dataset, detected.dataset = _coco_dicts(truth, found)
        known.createIndex()
        detected.createIndex()
        run = COCOeval(known, detected, "bbox")
        run.evaluate()
        run.accumulate()
    return run


def evaluated(seed: int) -> tuple[GroundTruth, Detections, Evaluation]:
    truth, found = tricky(seed)
    return truth, found, evaluate_in_detail(truth, found)


@pytest.mark.parametrize("seed", range(4))
def test_ap_and_counts_of_each_class_are_pycocotools_own(seed: int) -> None:
    truth, found, said = evaluated(seed)
    run = coco_run(truth, found)
    ids = sorted(number for number, _ in truth.categories)
    for one in said.classes:
        precision = run.eval["precision"][:, :, ids.index(one.id), 0, 2]
        mine = (truth.category_ids == one.id) & ~truth.iscrowd
        assert one.objects == mine.sum()
        assert one.images == len(set(truth.object_image_ids[mine].tolist()))
        if not one.objects:
            assert (one.ap, one.ap50, one.best) == (None, None, None)
            continue
        assert one.ap == pytest.approx(precision[precision > -1].mean(), abs=1e-9)
        assert one.ap50 == pytest.approx(precision[0][precision[0] > -1].mean(), abs=1e-9)
    measured = [one.ap for one in said.classes if one.ap is not None]
    assert measured == sorted(measured)  # the worst first
    assert said.classes[-1].name == "no objects"
    assert np.mean(measured) == pytest.approx(said.metrics["AP"])
    assert said.per_class == pytest.approx(evaluate_coco(truth, found).per_class)


@pytest.mark.parametrize("seed", range(4))
def test_each_detection_is_right_wrong_or_neither_as_pycocotools_has_it(seed: int) -> None:
    truth, found = tricky(seed)
    run, verdicts = coco_run(truth, found), judge(truth, found)
    expected = []
    for entry in run.evalImgs:
        if entry is None or entry["aRng"] != run.params.areaRng[0]:
            continue
        matched, left_out = entry["dtMatches"][0] > 0, entry["dtIgnore"][0].astype(bool)
        verdict = np.where(left_out, NEITHER, np.where(matched, RIGHT, 0))
        expected += [(entry["category_id"], score, v) for score, v in zip(entry["dtScores"], verdict, strict=True)]
    mine = zip(verdicts.category_ids, verdicts.scores, verdicts.verdict, strict=True)
    assert sorted((int(c), float(s), int(v)) for c, s, v in mine) == sorted(
        (c, float(s), int(v)) for c, s, v in expected
    )
    assert {int(v) for v in verdicts.verdict} == {1, 0, -1}


@pytest.mark.parametrize("seed", range(4))
def test_precision_and_recall_of_each_class_at_the_shared_threshold_are_counted_from_pycocotools_matches(
    seed: int,
) -> None:
    truth, found, said = evaluated(seed)
    run = coco_run(truth, found)
    assert said.best is not None
    counts = {one.id: [0, 0] for one in said.classes}  # right, kept
    for entry in run.evalImgs:
        if entry is None or entry["aRng"] != run.params.areaRng[0]:
            continue
        matched, left_out = entry["dtMatches"][0] > 0, entry["dtIgnore"][0].astype(bool)
        for score, right, neither in zip(entry["dtScores"], matched, left_out, strict=True):
            if score >= said.best.score and not neither:
                counts[entry["category_id"]][0] += int(right)
                counts[entry["category_id"]][1] += 1
    for one in said.classes:
        right, kept = counts[one.id]
        assert one.shared_precision == (pytest.approx(right / kept) if kept else None)
        assert one.shared_recall == (pytest.approx(right / one.objects) if one.objects else None)
    together = sum(right for right, _ in counts.values()) / sum(kept for _, kept in counts.values())
    assert together == pytest.approx(said.best.precision)


def slow_iou(a: Array, b: Array, crowd: bool) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    own, other = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return float(shared / (own if crowd else own + other - shared))


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_is_the_one_that_a_slow_loop_over_all_scores_finds(seed: int) -> None:
    truth, found, said = evaluated(seed)
    objects = int((~truth.iscrowd).sum())
    tried = {}
    for threshold in sorted(set(found.scores.tolist())):
        kept = found.scores >= threshold
        some = judge(truth, Detections(*(column[kept] for column in vars(found).values())))
        right, counted = (some.verdict == RIGHT).sum(), (some.verdict != NEITHER).sum()
        precision, recall = right / counted, right / objects
        tried[threshold] = (2 * precision * recall / (precision + recall), precision, recall)
    best = max(tried, key=lambda threshold: (tried[threshold][0], threshold))
    assert said.best is not None
    assert said.best.score == pytest.approx(best)
    assert (said.best.f1, said.best.precision, said.best.recall) == pytest.approx(tried[best])
    assert len(tried) > 5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_the_confusion_matrix_is_that_of_a_slow_loop(seed: int, threshold: float) -> None:
    truth, found = tricky(seed, images=5)
    mistaken = np.random.default_rng(seed).uniform(size=len(found.scores)) < 0.3
    found = replace(found, category_ids=np.where(mistaken, 2, found.category_ids))
    expected: dict[tuple[int | None, int | None], int] = {}
    for image in truth.image_ids:
        objects = [i for i, of in enumerate(truth.object_image_ids) if of == image]
        free = {i for i in objects if not truth.iscrowd[i]}
        mine = [d for d, of in enumerate(found.image_ids) if of == image and found.scores[d] >= threshold]
        for d in sorted(mine, key=lambda d: -found.scores[d]):
            box, label = found.boxes_xyxy[d].astype(float), int(found.category_ids[d])
            overlaps = {i: slow_iou(box, truth.boxes_xyxy[i], False) for i in sorted(free)}
            overlaps = {i: value for i, value in overlaps.items() if value >= 0.5}
            in_crowd = any(
                truth.iscrowd[i] and truth.category_ids[i] == label and slow_iou(box, truth.boxes_xyxy[i], True) >= 0.5
                for i in objects
            )
            if overlaps:
                taken = max(overlaps, key=lambda i: overlaps[i])
                free.discard(taken)
                pair: tuple[int | None, int | None] = (int(truth.category_ids[taken]), label)
            elif in_crowd:
                continue
            else:
                pair = (None, label)
            expected[pair] = expected.get(pair, 0) + 1
        for i in free:
            pair = (int(truth.category_ids[i]), None)
            expected[pair] = expected.get(pair, 0) + 1
    assert confusions(truth, found, threshold) == expected
    assert any(true is not None and predicted not in (None, true) for true, predicted in expected)
    rows = sum(count for (true, _), count in expected.items() if true is not None)
    assert rows == (~truth.iscrowd).sum()  # each object is in its row once


def test_what_could_not_be_measured_is_none_and_not_a_number() -> None:
    truth, found = tricky(3)
    nothing = evaluate_in_detail(truth, Detections.empty())
    assert (nothing.best, nothing.thresholds, nothing.confusions) == (None, None, ())
    assert {one.ap for one in nothing.classes} == {0.0, None}
    empty = replace(truth_of([], [], image_ids=tuple(truth.image_ids)), categories=truth.categories)
    said = evaluate_in_detail(empty, found)
    assert {(one.ap, one.ap50, one.best) for one in said.classes} == {(None, None, None)}
    assert (said.best, said.precision_recall) == (None, None)


def test_an_evaluation_is_read_again_as_it_was_and_nothing_else_is(tmp_path: Path) -> None:
    truth, found = tricky(0)
    said = evaluate_in_detail(truth, found, plain=found, rule=Pairs(7, True))
    assert Evaluation.from_json(said.to_json(), "a.json") == said
    assert said.plain is not None
    assert said.plain.rule == "the best class of each of 7 queries"
    for text in ("[]", "{}", json.dumps({"format": "qskd-evaluation", "version": 1}), said.to_json()[:-20]):
        with pytest.raises(QskdError):
            Evaluation.from_json(text, "a.json")


@pytest.mark.parametrize(("family", "queries"), [("detr", 9), ("rt_detr", 9), ("conditional_detr", 9), ("d_fine", 300)])
def test_the_pairs_that_transformers_keeps_are_known(family: str, queries: int) -> None:
    rule = pairs_of_transformers(family, queries)
    if family in ("conditional_detr", "d_fine"):
        assert rule is None  # 100 best, or more
        return
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, queries, 6, generator=generator), torch.rand(2, queries, 4, generator=generator)
    sizes = torch.tensor([[480, 640], [333, 500]])
    processor = DetrImageProcessorPil() if family == "detr" else RTDetrImageProcessorPil()
    said = SimpleNamespace(logits=logits, pred_boxes=boxes)
    theirs = processor.post_process_object_detection(said, threshold=-1.0, target_sizes=sizes)
    ours = from_softmax(logits)[0] if family == "detr" else logits
    classes = ours.shape[-1]
    assert rule is not None
    found = detections_from(ours, boxes, [1, 2], sizes, range(classes), rule.most, rule.one_a_query)
    for image, their in zip((1, 2), theirs, strict=True):
        mine = found.image_ids == image
        order = their["scores"].argsort(descending=True, stable=True)
        assert mine.sum() == queries
        np.testing.assert_allclose(found.scores[mine], their["scores"][order].numpy(), atol=1e-6)
        np.testing.assert_array_equal(found.category_ids[mine], their["labels"][order].numpy())
        np.testing.assert_allclose(found.boxes_xyxy[mine], their["boxes"][order].numpy(), rtol=1e-5)
