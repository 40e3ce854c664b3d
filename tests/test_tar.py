"""Task Adaptive Regularization against a slow loop; its gates, its control, its metrics; in shares, without objects."""

from __future__ import annotations

from dataclasses import replace
from math import exp
from typing import Any

import pytest
import tiny
import torch
from reference import corners, near, sigmoid, slow_bce, slow_giou, slow_iou
from test_feature_methods import BOTH, STUDENT, TEACHER, built, cells, lesson_of, share

from qskd.config.distillation import settings_class
from qskd.config.recipe import build
from qskd.distillation.method import Lesson
from qskd.losses.matching import assign
from qskd.structures import SILENT_LOGIT, to_device

COUNTS = [2, 0, 3]
NAMES = ("tar_features", "tar_class", "tar_l1", "tar_giou", "tar_open_class", "tar_open_boxes")
CLASSES = 5


def lesson(counts: list[int], student: Any = STUDENT, teacher: Any = TEACHER) -> Lesson:
    """With boxes near objects and the assignments of both."""
    given = lesson_of(student, teacher, counts)
    own = torch.stack([near(given.targets, 7, seed=layer) for layer in range(2)])
    output = replace(given.student, boxes_cxcywh=own)
    logits = given.teacher.logits[..., :CLASSES] + 1
    record = replace(given.teacher, logits=logits, boxes_cxcywh=near(given.targets, 11, seed=9)[None])
    sides = [(output.logits, own), (record.logits, record.boxes_cxcywh)]
    mine, theirs = assign(sides, given.targets, build({}).detection)
    return replace(given, student=output, teacher=record, student_assignment=mine, teacher_assignment=theirs)


def slow(method: Any, given: Lesson, pairs: list[Any]) -> dict[str, tuple[float, float]]:
    """Each term's total and count."""
    targets, gates = given.targets, method.settings.gates
    totals = dict.fromkeys(NAMES, 0.0)
    objects = images = 0
    for image, count in enumerate(targets.counts):
        above = below = 0.0
        for (own, _), (size, shown, goal) in zip(pairs, cells(method, given, pairs, image), strict=True):
            assert given.student.memory_valid[own][image].sum() == size[0] * size[1]
            for y in range(size[0]):
                for x in range(size[1]):
                    weight = 0.0
                    for cx, cy, w, h in targets.boxes_cxcywh[image, :count].tolist():
                        wide, high = max(w / 4, 0.5 / size[1]), max(h / 4, 0.5 / size[0])
                        away = ((x + 0.5) / size[1] - cx) / wide, ((y + 0.5) / size[0] - cy) / high
                        weight += exp(-0.5 * (away[0] ** 2 + away[1] ** 2))
                    apart = [(a[y][x] - b[y][x]) ** 2 for a, b in zip(shown, goal, strict=True)]
                    above += weight * sum(apart) / len(apart)
                    below += weight
        if below > 0:
            totals["tar_features"] += above / below
            images += 1
        for layer in range(2):
            for slot in range(count):
                s, t = int(given.student_assignment[layer, image, slot]), int(given.teacher_assignment[0, image, slot])
                label, object_ = int(targets.labels[image, slot]), corners(targets.boxes_cxcywh[image, slot].tolist())
                mine = given.student.logits[layer, image, s].tolist()
                goals = [sigmoid(z) for z in given.teacher.logits[0, image, t].tolist()]
                a, b = (
                    given.student.boxes_cxcywh[layer, image, s].tolist(),
                    given.teacher.boxes_cxcywh[0, image, t].tolist(),
                )
                better = {
                    "class": goals[label] > sigmoid(mine[label]),
                    "boxes": slow_iou(corners(b), object_) > slow_iou(corners(a), object_),
                }
                opened = {n: gates == "open" or (value != (gates == "reversed")) for n, value in better.items()}
                objects += 1
                totals["tar_open_class"] += opened["class"]
                totals["tar_open_boxes"] += opened["boxes"]
                if opened["class"]:
                    totals["tar_class"] += slow_bce(mine, goals)
                if opened["boxes"]:
                    totals["tar_l1"] += sum(abs(x - y) for x, y in zip(a, b, strict=True))
                    totals["tar_giou"] += 1 - slow_giou(corners(a), corners(b))
    counts = dict.fromkeys(NAMES, objects / 2) | {"tar_features": images}
    counts |= {"tar_open_class": objects, "tar_open_boxes": objects}
    return {name: (total, counts[name]) for name, total in totals.items()}


@pytest.mark.parametrize("gates", ["better", "open", "reversed"])
@pytest.mark.parametrize(("student", "pairs"), [(STUDENT, [(0, 1)]), (BOTH, [(0, 0), (1, 1)])], ids=["1", "2"])
def test_every_term_equals_the_loops(gates: str, student: Any, pairs: list[Any]) -> None:
    method, given = built(len(student), 2, method="tar", gates=gates), lesson(COUNTS, student)
    terms, expected = method(given), slow(method, given, pairs)
    assert terms.keys() == method.weights.keys() == set(NAMES)
    for name, (total, count) in expected.items():
        assert terms[name].total.item() == pytest.approx(total, rel=2e-4), name
        assert terms[name].count == count
    assert (expected["tar_open_class"][0] > 0) or gates == "reversed"
    terms["tar_features"].total.backward()


def test_better_and_reversed_gates_part_the_objects_between_them() -> None:
    given = lesson([3, 4, 1])
    shares = {}
    for gates in ("better", "reversed", "open"):
        terms = built(1, 2, method="tar", gates=gates)(given)
        shares[gates] = [
            terms[f"tar_{name}"].total.item() for name in ("open_class", "open_boxes", "class", "l1", "giou")
        ]
    assert all(0 < shares["better"][place] < shares["open"][place] for place in (0, 1))
    for one, other, both in zip(*(shares[gates] for gates in ("better", "reversed", "open")), strict=True):
        assert one + other == pytest.approx(both, rel=1e-5)


def test_the_weights_fall_from_the_first_step_to_the_last_and_the_gates_weigh_nothing() -> None:
    method = built(1, 2, method="tar")
    weights = [method.weights_at(step, 10) for step in (0, 5, 9)]
    assert [one["tar_class"] for one in weights] == pytest.approx([1.0, 0.5, 0.1])
    assert all(one["tar_open_class"] == one["tar_open_boxes"] == 0 for one in weights)
    assert settings_class("tar")(decay=0.5).weight_fields().keys() == set(NAMES[:4])  # type: ignore[call-arg]


def test_shares_of_a_batch_sum_to_it_and_without_objects_there_is_nothing() -> None:
    method, given = built(2, 2, method="tar"), lesson([2, 0, 1], BOTH)
    parts = []
    for images in (slice(0, 2), slice(2, 3)):
        cut = share(given, images)
        student = replace(cut.student, boxes_cxcywh=given.student.boxes_cxcywh[:, images])
        record = {name: getattr(given.teacher, name)[:, images] for name in ("logits", "boxes_cxcywh")}
        both = given.student_assignment[:, images], given.teacher_assignment[:, images]
        cut = replace(cut, student=student, teacher=replace(cut.teacher, **record))
        parts.append(method(replace(cut, student_assignment=both[0], teacher_assignment=both[1])))
    for name, term in method(given).items():
        assert sum(part[name].total.item() for part in parts) == pytest.approx(term.total.item(), rel=1e-4)
        assert sum(part[name].count.item() for part in parts) == term.count
    empty = method(lesson([0, 0, 0], BOTH))
    assert all(term.total == 0 and term.count == 0 for term in empty.values())
    for term in method.to("meta")(to_device(given, "meta")).values():  # no one waits for the device
        assert term.total.is_meta


@pytest.mark.parametrize("gates", ["better", "open", "reversed"])
def test_of_a_class_that_the_teacher_knows_nothing_of_no_class_is_learned(gates: str) -> None:
    given = lesson([3])
    logits = given.teacher.logits.clone()
    logits[..., given.targets.labels[0, 0]] = SILENT_LOGIT
    shy = replace(given, teacher=replace(given.teacher, logits=logits))
    alone = replace(shy.targets, valid=shy.targets.valid & (shy.targets.labels == shy.targets.labels[0, 0]))
    terms = built(1, 2, method="tar", gates=gates)(replace(shy, targets=alone))
    assert terms["tar_class"].total == terms["tar_open_class"].total == 0
    assert terms["tar_open_class"].count > 0


@pytest.mark.parametrize(("taught", "teacher"), [("conditional_detr", "d_fine"), ("rt_detr", "deformable_detr")])
def test_it_runs_between_families_and_the_shares_of_open_gates_are_logged(taught: str, teacher: str) -> None:
    levels = {"feature_levels": 1 if taught == "conditional_detr" else 2}
    config = tiny.recipe({"family": taught, "queries": 12, **levels}, distillation={"method": "tar"})
    training = tiny.make_training(config, tiny.random_teacher(teacher))
    values = training.train_step(tiny.batch_of(2, 0))
    training.check_finite()
    assert 0 <= values["tar_open_class"] <= 1
    assert values.keys() >= set(NAMES)
