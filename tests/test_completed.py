"""`data.completed`: labels that lack classes get the teacher's pseudo-objects, and what it half sees is no background."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from strangers import config
from test_unlabeled import A, B, C, loud_teacher, nobody_s, said
from tiny import FAMILIES, arrays, batch_of, make_training, recipe, trained_weights

from benchmarks.local_cache import make_cache
from pipelines.prepare import prepare
from pipelines.run.resolve import resolve
from pipelines.training.plan import make_plan
from qskd.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from qskd.datasets.batch import train_batch
from qskd.datasets.classes import NOBODY
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.errors import QskdError
from qskd.from_recipe import make_teacher
from qskd.losses.unsure import left_out
from qskd.structures import Targets, TeacherNeeds, TeacherRecord
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.columns.table import columns_for
from qskd.teacher.identity import cache_identity
from qskd.teacher.online import OnlineTeacher, queries_above
from qskd.teacher.pseudo import SAME, UNSURE, with_pseudo_objects

NEAR_B = (0.52, 0.5, 0.9, 0.9)


def test_labelled_images_keep_their_objects_and_get_what_overlaps_none() -> None:
    """On the first image an object is at B; the second has no objects; of the third nobody has said anything."""
    batch = nobody_s([1, 0, 0], [True, True, False])
    boxes = batch.targets.boxes_cxcywh.clone()
    boxes[0, 0] = xyxy_to_cxcywh(torch.tensor(B))
    targets = replace(batch.targets, boxes_cxcywh=boxes)
    queries = [(0.9, 0, A), (0.8, 1, NEAR_B), (0.3, 2, C)]
    found = with_pseudo_objects(targets, said(queries, queries, queries), 0.5, completed=True)
    assert found.counts == (2, 2, 2)
    assert found.valid.tolist() == [[True, True]] * 3
    assert torch.equal(found.boxes_cxcywh[0, 0], boxes[0, 0])
    assert found.labels[0, 0] == targets.labels[0, 0]
    for image, place, box, label in ((0, 1, A, 0), (1, 0, A, 0), (1, 1, NEAR_B, 1), (2, 0, A, 0), (2, 1, NEAR_B, 1)):
        torch.testing.assert_close(found.boxes_cxcywh[image, place], xyxy_to_cxcywh(torch.tensor(box)))
        assert found.labels[image, place] == label
    assert found.unsure is not None
    assert found.unsure.tolist() == [[True]] * 3
    without = with_pseudo_objects(targets, said(queries, queries, queries), 0.5)
    assert without.counts == (1, 0, 2)
    assert without.unsure is not None
    assert without.unsure.tolist() == [[False], [False], [True]]
    assert with_pseudo_objects(batch_of(2).targets, said(queries), 0.5).unsure is None  # as it was
    nothing = TeacherRecord(torch.zeros(1, 0, 5, 3), torch.zeros(1, 0, 5, 4))  # a worker's share of a small batch
    assert with_pseudo_objects(batch_of().targets, nothing, 0.5, completed=True).counts == ()


def test_it_is_what_a_slow_loop_makes_of_many_images() -> None:
    rng = np.random.default_rng(3)
    counts, queries = [3, 0, 5, 1], 30
    batch = nobody_s(counts, [True, True, True, False])
    centre, size = rng.uniform(0.2, 0.8, (4, queries, 2)), rng.uniform(0.05, 0.5, (4, queries, 2))
    boxes = torch.from_numpy(np.concatenate([centre, size], -1)).float()
    boxes[0, :3] = batch.targets.boxes_cxcywh[0, :3] * 1.02  # some that are objects once more
    logits = torch.from_numpy(rng.normal(-1.5, 2.5, (4, queries, 3))).float()
    found = with_pseudo_objects(batch.targets, TeacherRecord(logits[None], boxes[None]), 0.5, completed=True)
    assert found.unsure is not None
    assert found.unsure_xyxy is not None
    for image, labelled in enumerate([True, True, True, False]):
        own = batch.targets.boxes_cxcywh[image][: counts[image] if labelled else 0].tolist()
        expected = [tuple(box) for box in own]
        scores = logits[image].sigmoid().amax(-1)
        edges = cxcywh_to_xyxy(boxes[image]).clamp(0, 1)
        free = [q for q in range(queries) if all(_iou(edges[q], box) < SAME for box in own)]
        sure = [q for q in free if scores[q] >= 0.5]
        assert found.counts[image] == len(own) + len(sure) == int(found.valid[image].sum())
        expected += [tuple(xyxy_to_cxcywh(edges[q]).tolist()) for q in sure]
        np.testing.assert_allclose(found.boxes_cxcywh[image][: len(expected)], expected, atol=1e-6)
        assert found.labels[image][len(own) : len(expected)].tolist() == logits[image][sure].argmax(-1).tolist()
        half = [q for q in free if UNSURE <= scores[q] < 0.5 and all(_iou(edges[q], box) < SAME for box in expected)]
        assert int(found.unsure[image].sum()) == len(half)
        np.testing.assert_allclose(found.unsure_xyxy[image][: len(half)], edges[half], atol=1e-6)


def _iou(a_xyxy: torch.Tensor, b_cxcywh: tuple[float, ...] | list[float]) -> float:
    a, b = a_xyxy.tolist(), cxcywh_to_xyxy(torch.tensor(b_cxcywh)).tolist()
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def test_a_teacher_of_some_classes_adds_those_alone() -> None:
    whole = loud_teacher()
    deaf = OnlineTeacher(whole.detector, (3, NOBODY, 1), whole.preprocessing)
    batch = train_batch(arrays([2, 0, 1], teacher_size=64))
    record = deaf.record(batch, TeacherNeeds())
    found = with_pseudo_objects(batch.targets, record, 0.5, completed=True)
    added = torch.cat([found.labels[image][count : found.counts[image]] for image, count in enumerate((2, 0, 1))])
    assert len(added) > 3
    assert 1 not in added.tolist()


def test_a_step_learns_from_completed_labels_and_spares_what_is_half_seen() -> None:
    teacher = loud_teacher()
    plain, completed = (
        make_training(recipe(FAMILIES["refined"], f"data.completed={word}"), teacher) for word in ("false", "true")
    )
    batch = batch_of(1, 0, 2)
    values = [training.train_step(batch) for training in (plain, completed)]
    assert all(bool(torch.isfinite(value)) for each in values for value in each.values())
    ours, theirs = (trained_weights(training) for training in (plain, completed))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    record = completed._ask_teacher(batch)
    targets: Targets = completed._objects(batch, record)
    assert sum(targets.counts) > 3
    assert targets.unsure is not None
    boxes = torch.rand(1, 3, 8, 4) * 0.5 + 0.25
    assert left_out(boxes, torch.full((1, 3, targets.valid.shape[1]), -1), targets) is not None
    assert plain._objects(batch, record) is batch.targets


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("completed")
    annotations, images = make_shapes(ShapesConfig(images=6, classes="hard"), root / "coco")
    tree = json.loads(annotations.read_text())
    tree["annotations"] = tree["annotations"][::3]
    annotations.write_text(json.dumps(tree))
    for split in ("train", "val"):
        prepare(annotations, images, str(root / split), quiet=True)
    return root


def test_a_cache_is_of_completed_labels_or_of_plain_ones_and_has_their_attention(root: Path) -> None:
    fields = ("teacher.cache.attention_giou_floor=0.5", f"teacher.cache.path={root}/cache")
    plain, completed = (
        resolve(config(root, *fields, f"data.completed={word}"), "distill") for word in ("false", "true")
    )
    data = load_manifest(str(root / "train"))
    ours, theirs = (cache_identity(each, data) for each in (plain, completed))
    assert {name for name in theirs if theirs[name] != ours.get(name)} == {"data.completed", "data.unlabeled_score"}
    assert theirs == {**ours, "data.completed": True, "data.unlabeled_score": 0.5}

    teacher = make_teacher(completed, data.labels)
    assert teacher is not None
    make_cache(completed, teacher, teacher.resize, cache_identity(completed, data))
    assert (
        "completed: beside these, the teacher's predictions of score 0.5" in make_plan(completed, "distill").describe()
    )
    with pytest.raises(QskdError, match=r"data\.completed"):
        make_plan(plain, "distill")
    loader = make_plan(completed, "distill").stream.loader()
    batch = train_batch(loader.load("train", np.array([(0, row, 0) for row in range(6)], np.int32)))
    needs = TeacherNeeds(attention=True, attention_giou_floor=0.5)
    rows = TeacherCacheReader(completed.teacher.cache.path, columns_for(needs)).read(0, 0, range(6))
    record = TeacherRecord(
        torch.from_numpy(np.stack([row.logits for row in rows], 1)).float(),
        torch.from_numpy(np.stack([row.boxes_cxcywh for row in rows], 1)).float(),
    )
    targets = with_pseudo_objects(batch.targets, record, 0.5, completed=True)
    assert sum(targets.counts) > sum(batch.targets.counts)
    wanted = queries_above(record, targets, 0.5, completed.detection)
    for row, queries in zip(rows, wanted.tolist(), strict=True):
        assert {query for query in queries if query >= 0} <= set(row.attention_queries.tolist())


def test_without_a_teacher_it_is_refused_with_what_to_do(root: Path) -> None:
    with pytest.raises(QskdError, match=r"qskd label TEACHER IMAGES OUT\.json --onto"):
        make_plan(resolve(config(root, "data.completed=true"), "train"), "train")
