"""COCO AP against pycocotools' own summary, hand counts and transformers' post-processing."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qskd.errors import QskdError
from qskd.evaluation import average_precision as evaluation
from qskd.evaluation.average_precision import FASTEST_FIRST, METRICS, choose_backend, detections_from, evaluate_coco
from qskd.evaluation.detections import Backend, Detections, GroundTruth

SAMPLE = Path(__file__).parents[2] / "shared" / "coco-sample"


def require(backend: Backend) -> None:
    pytest.importorskip(backend)


def truth_of(
    boxes: list[list[float]], images: list[int], categories: list[int] | None = None, image_ids: tuple[int, ...] = (1,)
) -> GroundTruth:
    box = np.array(boxes, np.float32).reshape(-1, 4)
    size = np.full(len(image_ids), 200, np.int32)
    return GroundTruth(
        image_ids=np.array(image_ids, np.int64),
        heights=size,
        widths=size,
        object_image_ids=np.array(images, np.int64),
        boxes_xyxy=box,
        category_ids=np.array(categories or [7] * len(box), np.int64),
        area=(box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]),
        iscrowd=np.zeros(len(box), bool),
        categories=[(7, "cat"), (3, "dog")],
    )


def detections_of(
    boxes: list[list[float]], images: list[int], scores: list[float], categories: list[int] | None = None
) -> Detections:
    return Detections(
        np.array(images, np.int64),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        np.array(categories or [7] * len(boxes), np.int64),
    )


def tricky(seed: int, images: int = 12, crowds: bool = True) -> tuple[GroundTruth, Detections]:
    """Ties in the scores, crowds, images without objects or detections, areas that are not width x height, several
    sizes, unsorted and large ids, a class without objects, more than 10 (and 100) detections of a class in an image."""
    random = np.random.default_rng(seed)
    ids = random.permutation(2**60 + np.arange(images))  # no two differ in float64
    counts = random.integers(0, 9, images)
    counts[random.integers(0, images, 2)] = 0
    number = int(counts.sum())
    corner = random.uniform(0, 300, (number, 2))
    size = np.exp(random.uniform(np.log(4), np.log(300), (number, 2)))
    boxes = np.concatenate([corner, corner + size], 1)
    categories = [(2**60 + 1, "a"), (-2, "b"), (2**60, "no objects"), (5, "c")]
    labels = random.choice([2**60 + 1, -2, 5], number)
    truth = GroundTruth(
        image_ids=ids,
        heights=np.full(images, 640, np.int32),
        widths=np.full(images, 640, np.int32),
        object_image_ids=np.repeat(ids, counts),
        boxes_xyxy=boxes,
        category_ids=labels,
        area=size.prod(1) * random.uniform(0.3, 1.0, number),
        iscrowd=(random.uniform(size=number) < 0.15) & crowds,
        categories=categories,
    )
    copies = random.integers(0, 30, number)
    shown = (
        np.repeat(boxes, copies, 0)
        + random.normal(size=(copies.sum(), 4)) * np.repeat(size.min(1) / 6, copies)[:, None]
    )
    stray = random.uniform(0, 300, (150, 2))
    boxes = np.concatenate([shown, np.concatenate([stray, stray + random.uniform(1, 90, (150, 2))], 1)])
    image_of = np.concatenate([np.repeat(truth.object_image_ids, copies), random.choice(ids[1:], 150)])
    category_of = np.concatenate([np.repeat(labels, copies), random.choice([2**60 + 1, -2, 2**60, 5], 150)])
    order = random.permutation(len(boxes))
    scores = np.round(random.uniform(0.0, 1.0, len(boxes)), 1).astype(np.float32)  # eleven values: mostly ties
    return truth, Detections(image_of[order], boxes[order].astype(np.float32), scores, category_of[order])


def reference(truth: GroundTruth, found: Detections, folder: Path) -> list[float]:
    """The twelve numbers as everyone gets them (JSON files, loadRes, summarize), and AP at IoU 0.9 from the same run."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(box: Any) -> list[float]:
        left, top, right, bottom = (float(side) for side in box)
        return [left, top, right - left, bottom - top]

    rows = zip(truth.object_image_ids, truth.boxes_xyxy, truth.category_ids, truth.area, truth.iscrowd, strict=True)
    annotations = [
        {"id": i + 1, "image_id": int(m), "bbox": xywh(b), "category_id": int(c), "area": float(a), "iscrowd": int(w)}
        for i, (m, b, c, a, w) in enumerate(rows)
    ]
    images = [{"id": int(i), "height": 640, "width": 640, "file_name": ""} for i in truth.image_ids]
    categories = [{"id": i, "name": name} for i, name in truth.categories]
    order = np.argsort(found.image_ids, kind="stable")
    results = [
        {"image_id": int(m), "bbox": xywh(b), "score": float(s), "category_id": int(c)}
        for m, b, s, c in zip(
            found.image_ids[order], found.boxes_xyxy[order], found.scores[order], found.category_ids[order], strict=True
        )
    ]
    (folder / "truth.json").write_text(
        json.dumps({"info": {}, "images": images, "categories": categories, "annotations": annotations})
    )
    (folder / "found.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "truth.json"))
        run = COCOeval(coco, coco.loadRes(str(folder / "found.json")), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    at_90 = run.eval["precision"][run.params.iouThrs.round(2) == 0.9, :, :, 0, -1]
    return [*map(float, run.stats), float(at_90[at_90 > -1].mean())]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("backend", FASTEST_FIRST)
def test_every_backend_equals_pycocotools_own_summary(backend: Backend, seed: int, tmp_path: Path) -> None:
    require(backend)
    truth, found = tricky(seed)
    expected = reference(truth, found, tmp_path)
    assert 0.01 < expected[0] < 0.99  # data that could not tell anything apart would prove nothing
    result = evaluate_coco(truth, found, backend)
    assert list(result.metrics) == list(METRICS)
    assert list(result.metrics.values()) == pytest.approx(expected, abs=1e-6)
    assert result.backend == backend


@pytest.mark.parametrize("backend", FASTEST_FIRST)
@pytest.mark.parametrize("max_detections", [11, 300])
def test_backends_agree_on_every_class_and_limit(backend: Backend, max_detections: int) -> None:
    require(backend)
    truth, found = tricky(99, images=5)
    ours = evaluate_coco(truth, found, backend, max_detections)
    slow = evaluate_coco(truth, found, "pycocotools", max_detections)
    assert ours.metrics == pytest.approx(slow.metrics, abs=1e-6)
    assert ours.per_class == pytest.approx(slow.per_class, abs=1e-6)
    assert list(ours.per_class) == ["a", "b", "no objects", "c"]
    assert ours.per_class["no objects"] == -1
    assert np.mean([ours.per_class[name] for name in "abc"]) == pytest.approx(ours.metrics["AP"])


def test_more_detections_per_image_are_counted_when_asked_for() -> None:
    box = [[0.0, 0.0, 50.0, 50.0]]
    stray = [[100.0, 100.0, 120.0, 120.0]] * 150
    found = detections_of(stray + box, [1] * 151, [0.9] * 150 + [0.1])
    assert evaluate_coco(truth_of(box, [1]), found).metrics["AR100"] == 0
    assert evaluate_coco(truth_of(box, [1]), found, max_detections=151).metrics["AR100"] == 1


@pytest.mark.parametrize("backend", FASTEST_FIRST)
def test_a_precision_curve_counted_by_hand(backend: Backend) -> None:
    require(backend)
    left, right = [0.0, 0.0, 100.0, 100.0], [100.0, 100.0, 200.0, 200.0]
    truth = truth_of([left, right], [1, 1])
    # right, wrong, right: precision 1 up to recall 1/2 (51 of the 101 recall points), 2/3 from there on (50 of them)
    found = detections_of([left, [0.0, 150.0, 20.0, 170.0], right], [1, 1, 1], [0.9, 0.8, 0.7])
    result = evaluate_coco(truth, found, backend)
    assert result.metrics["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-9)
    assert result.metrics["AP"] == pytest.approx(result.metrics["AP50"])
    assert result.metrics["AR1"] == 0.5
    assert result.metrics["AR100"] == 1.0
    assert result.metrics["APs"] == -1
    assert result.per_class == pytest.approx({"cat": result.metrics["AP"], "dog": -1.0})
    # IoU of 0.6 is a match at 0.5, 0.55 and 0.6 only
    narrow = evaluate_coco(truth_of([left], [1]), detections_of([[0.0, 0.0, 100.0, 61.0]], [1], [0.5]), backend)
    assert narrow.metrics["AP"] == pytest.approx(0.3)
    assert (narrow.metrics["AP50"], narrow.metrics["AP75"]) == (pytest.approx(1.0), 0.0)


@pytest.mark.parametrize("backend", FASTEST_FIRST)
def test_equal_scores_are_ranked_by_image_id_then_by_the_order_given(backend: Backend) -> None:
    require(backend)
    box, wrong = [0.0, 0.0, 50.0, 50.0], [100.0, 100.0, 150.0, 150.0]

    def ap(boxes: list[list[float]], images: list[int]) -> float:
        truth = truth_of([box, box], [1, 2], image_ids=(2, 1))
        return evaluate_coco(truth, detections_of(boxes, images, [0.5] * len(boxes)), backend).metrics["AP50"]

    half = 51 / 101  # recall reaches 1/2 only
    assert ap([box, wrong], [1, 1]) == pytest.approx(half)
    assert ap([wrong, box], [1, 1]) == pytest.approx(half / 2)
    assert ap([wrong, box], [2, 1]) == ap([box, wrong], [1, 2]) == pytest.approx(half)  # image 1 first either way
    assert ap([box, wrong], [2, 1]) == ap([wrong, box], [1, 2]) == pytest.approx(half / 2)


@pytest.mark.parametrize("backend", FASTEST_FIRST)
def test_detections_on_a_crowd_are_neither_right_nor_wrong(backend: Backend) -> None:
    require(backend)
    truth = truth_of([[0.0, 0.0, 50.0, 50.0], [100.0, 100.0, 200.0, 200.0]], [1, 1])
    truth = replace(truth, iscrowd=np.array([False, True]))
    found = detections_of([[110.0, 110.0, 120.0, 120.0], [0.0, 0.0, 50.0, 50.0]], [1, 1], [0.9, 0.5])
    assert evaluate_coco(truth, found, backend).metrics["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("backend", FASTEST_FIRST)
def test_nothing_detected_is_zero_and_nothing_to_detect_is_undefined(backend: Backend) -> None:
    require(backend)
    truth, found = tricky(3)
    nothing = evaluate_coco(truth, Detections.empty(), backend)
    assert set(nothing.metrics.values()) == {0.0}
    assert nothing.per_class == {"a": 0.0, "b": 0.0, "no objects": -1.0, "c": 0.0}
    no_objects = replace(truth_of([], [], image_ids=tuple(truth.image_ids)), categories=truth.categories)
    for detections in (found, Detections.empty()):
        undefined = evaluate_coco(no_objects, detections, backend)
        assert set(undefined.metrics.values()) == {-1.0}
        assert set(undefined.per_class.values()) == {-1.0}
    only_crowds = replace(truth, iscrowd=np.ones(len(truth.area), bool))
    assert set(evaluate_coco(only_crowds, found, backend).metrics.values()) == {-1.0}
    no_images = truth_of([], [], image_ids=())
    assert set(evaluate_coco(no_images, Detections.empty(), backend).metrics.values()) == {-1.0}


@pytest.mark.parametrize("backend", FASTEST_FIRST)
def test_nothing_is_printed(backend: Backend, capfd: pytest.CaptureFixture[str]) -> None:
    require(backend)
    evaluate_coco(*tricky(1), backend)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("split", ["train2017", "val2017"])
@pytest.mark.parametrize("backend", FASTEST_FIRST)
def test_the_ground_truth_of_real_photos_fed_back_is_perfect(backend: Backend, split: str) -> None:
    if not SAMPLE.exists():
        pytest.skip(f"no COCO sample at {SAMPLE}")
    require(backend)
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(SAMPLE / "annotations" / f"instances_{split}.json"))
    images, objects = coco.dataset["images"], coco.dataset["annotations"]
    xywh = np.array([item["bbox"] for item in objects])
    truth = GroundTruth(
        image_ids=np.array([image["id"] for image in images]),
        heights=np.array([image["height"] for image in images]),
        widths=np.array([image["width"] for image in images]),
        object_image_ids=np.array([item["image_id"] for item in objects]),
        boxes_xyxy=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1),
        category_ids=np.array([item["category_id"] for item in objects]),
        area=np.array([item["area"] for item in objects]),
        iscrowd=np.array([item["iscrowd"] for item in objects], bool),
        categories=[(item["id"], item["name"]) for item in coco.dataset["categories"]],
    )
    fed = ~truth.iscrowd
    found = Detections(
        truth.object_image_ids[fed],
        truth.boxes_xyxy[fed].astype(np.float32),
        np.ones(fed.sum(), np.float32),
        truth.category_ids[fed],
    )
    result = evaluate_coco(truth, found, backend)
    for name in ("AP", "AP50", "AP75", "AR100"):
        assert result.metrics[name] == pytest.approx(1.0, abs=1e-9), name
    present = {name for number, name in truth.categories if (truth.category_ids[fed] == number).any()}
    assert {name for name, ap in result.per_class.items() if ap == pytest.approx(1.0)} == present


@pytest.mark.parametrize("family", ["conditional_detr", "deformable_detr"])
@pytest.mark.parametrize("top_k", [7, 100])
def test_detections_equal_transformers_post_processing(family: str, top_k: int) -> None:
    from transformers.models.conditional_detr.image_processing_pil_conditional_detr import (
        ConditionalDetrImageProcessorPil,
    )
    from transformers.models.deformable_detr.image_processing_pil_deformable_detr import DeformableDetrImageProcessorPil

    processor = (
        ConditionalDetrImageProcessorPil() if family == "conditional_detr" else DeformableDetrImageProcessorPil()
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 5, generator=generator)
    boxes = torch.rand(3, 9, 4, generator=generator)  # many reach outside the image
    sizes = torch.tensor([[480, 640], [333, 500], [1, 7]])
    theirs = processor.post_process_object_detection(
        SimpleNamespace(logits=logits, pred_boxes=boxes), threshold=-1.0, target_sizes=sizes, top_k=top_k
    )
    ids, category_ids = [11, 5, 8], [10, 20, 30, 40, 50]
    ours = detections_from(logits, boxes, ids, sizes, category_ids, top_k)
    assert ours.boxes_xyxy.dtype == ours.scores.dtype == np.float32
    assert ours.image_ids.dtype == ours.category_ids.dtype == np.int64
    for image_id, their in zip(ids, theirs, strict=True):
        mine = ours.image_ids == image_id
        assert mine.sum() == min(top_k, 45)
        np.testing.assert_array_equal(ours.scores[mine], their["scores"].numpy())
        np.testing.assert_array_equal(ours.boxes_xyxy[mine], their["boxes"].numpy())
        np.testing.assert_array_equal(ours.category_ids[mine], np.array(category_ids)[their["labels"].numpy()])


def test_half_precision_scores_are_computed_in_float32() -> None:
    logits = torch.tensor([[[4.0], [4.03125]]], dtype=torch.bfloat16)  # sigmoid in bfloat16 would be the same number
    found = detections_from(logits, torch.rand(1, 2, 4).bfloat16(), [1], torch.tensor([[10, 10]]), [1])
    np.testing.assert_array_equal(found.scores, logits.float().sigmoid().flatten().sort(descending=True).values)
    assert found.scores[0] > found.scores[1]


def test_detections_of_arguments_that_do_not_fit_are_refused() -> None:
    logits, boxes, sizes = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2, 2)
    detections_from(logits, boxes, [1, 2], sizes, [1, 2, 3, 4])
    for ids, shape, categories in (([1], (2, 2), 4), ([1, 2], (2, 3), 4), ([1, 2], (2, 2), 5)):
        with pytest.raises(ValueError, match="logits are"):
            detections_from(logits, boxes, ids, torch.ones(shape), list(range(categories)))


def test_concatenation_keeps_order_and_empty_is_its_neutral_element() -> None:
    _, found = tricky(0)
    empty = Detections.concatenate([])
    assert len(empty.scores) == 0
    whole = Detections.concatenate([Detections.empty(), found, Detections.empty(), found])
    for name in ("image_ids", "boxes_xyxy", "scores", "category_ids"):
        once = getattr(found, name)
        np.testing.assert_array_equal(getattr(whole, name), np.concatenate([once, once]))
        assert getattr(whole, name).dtype == once.dtype == getattr(empty, name).dtype


def test_unknown_repeated_and_broken_input_is_refused_with_its_ids() -> None:
    truth = truth_of([[0.0, 0.0, 50.0, 50.0]], [1], image_ids=(1, 2))
    good = detections_of([[0.0, 0.0, 50.0, 50.0]], [1], [0.5])
    cases = [
        (truth, replace(good, image_ids=np.array([404])), "404"),
        (truth, replace(good, category_ids=np.array([55])), "55"),
        (truth, replace(good, scores=np.array([np.nan], np.float32)), "not finite"),
        (truth, replace(good, boxes_xyxy=np.full((1, 4), np.inf, np.float32)), "not finite"),
        (replace(truth, image_ids=np.array([2, 2])), good, "repeated: [2]"),
        (replace(truth, object_image_ids=np.array([31])), good, "31"),
        (replace(truth, category_ids=np.array([32])), good, "32"),
        (replace(truth, categories=[(7, "a"), (7, "b")]), good, "repeated: [7]"),
    ]
    evaluate_coco(truth, good)
    for bad_truth, bad_found, named in cases:
        with pytest.raises(QskdError) as caught:
            evaluate_coco(bad_truth, bad_found)
        assert named in caught.value.found
    with pytest.raises(ValueError, match="different lengths"):
        evaluate_coco(truth, replace(good, scores=np.zeros(2)))
    with pytest.raises(ValueError, match="above 10"):
        evaluate_coco(truth, good, max_detections=10)


def test_classes_of_the_same_name_are_told_apart_by_id() -> None:
    truth = replace(truth_of([[0.0, 0.0, 50.0, 50.0]], [1]), categories=[(7, "cat"), (3, "cat")])
    result = evaluate_coco(truth, Detections.empty())
    assert result.per_class == {"cat (id 7)": 0.0, "cat (id 3)": -1.0}


def test_the_fastest_installed_backend_is_chosen_and_a_missing_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = tricky(0)
    for missing, expected in (
        (set(), "hotcoco"),
        ({"hotcoco"}, "faster_coco_eval"),
        ({"hotcoco", "faster_coco_eval"}, "pycocotools"),
    ):
        monkeypatch.setattr(evaluation, "_importable", lambda name, missing=missing: name not in missing)
        assert choose_backend() == expected
    with pytest.raises(QskdError, match="pip install faster-coco-eval"):
        evaluate_coco(truth, found, "faster_coco_eval")
    with pytest.raises(QskdError, match=r"the backend 'json'\n  expected: auto or pycocotools"):
        evaluate_coco(truth, found, "json")  # type: ignore[arg-type]


def test_the_slow_path_is_announced_once_and_only_when_it_matters(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluation, "_importable", lambda name: name == "pycocotools")
    evaluation._notice_slow_path.cache_clear()
    box = [[0.0, 0.0, 50.0, 50.0]]
    few, many = truth_of(box, [1]), truth_of(box, [1], image_ids=tuple(range(1, 1102)))
    with caplog.at_level(logging.WARNING, "qskd.evaluation.average_precision"):
        evaluate_coco(few, Detections.empty())
        evaluate_coco(many, Detections.empty(), "pycocotools")  # asked for by name
        assert not caplog.records
        evaluate_coco(many, Detections.empty())
        evaluate_coco(many, Detections.empty())
    assert len(caplog.records) == 1
    assert "pip install hotcoco" in caplog.text
