"""Q-DETR's terms against slow loops."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import Any

import pytest
import tiny
import torch
from reference import corners, random_logits, slow_giou
from test_detrdistill import lesson
from test_feature_methods import BOTH, built, share
from test_unlabeled import loud_teacher, nobody_s

from qskd.distillation.method import Lesson, teacher_needs


def given_of(counts: list[int]) -> Lesson:
    given = lesson(counts, BOTH, kept=4)
    states = random_logits(len(counts), 5, given.student.query_states.shape[-1], seed=8).requires_grad_()
    return replace(given, student=replace(given.student, query_states=states))


def likeness(a: list[float], b: list[float]) -> float:
    return 2 * slow_giou(corners(a), corners(b)) - 5 * sum(abs(x - y) for x, y in zip(a, b, strict=True))


def slow(given: Lesson, method: Any, threshold: float, absent: Any = None) -> tuple[float, int]:
    total, number = 0.0, 0
    matrix = method.projector.weight.tolist()
    for image, count in enumerate(given.targets.counts):
        objects = given.targets.boxes_cxcywh[image, :count].tolist()
        boxes = given.student.boxes_cxcywh[-1, image].tolist()
        overlaps = [[slow_giou(corners(g), corners(b)) for b in boxes] for g in objects]
        for j, box in enumerate(boxes):
            if not any(row[j] > threshold * max(row) for row in overlaps):
                continue
            known = [
                (place, query)
                for place, query in enumerate(given.teacher.extra["states_queries"][image].tolist())
                if query >= 0 and not (absent is not None and absent[-1, image, query])
            ]
            theirs = given.teacher.boxes_cxcywh[-1, image].tolist()
            place, _ = max(known, key=lambda each: likeness(box, theirs[each[1]]))
            state = given.student.query_states[image, j].tolist()
            shown = [sum(w * x for w, x in zip(row, state, strict=True)) for row in matrix]
            if method.settings.alignment:
                mean = sum(shown) / len(shown)
                spread = sqrt(sum((x - mean) ** 2 for x in shown) / len(shown) + 1e-5)
                shown = [
                    gamma * (x - mean) / spread + beta
                    for x, gamma, beta in zip(
                        shown, method.align.weight.tolist(), method.align.bias.tolist(), strict=True
                    )
                ]
            goal = given.teacher.extra["states"][image, place].tolist()
            total += sqrt(sum((x - y) ** 2 for x, y in zip(shown, goal, strict=True)))
            number += 1
    return total, number


@pytest.mark.parametrize("alignment", [True, False])
@pytest.mark.parametrize("threshold", [0.6, 0.0, 0.95])
@pytest.mark.parametrize("counts", [[2, 0, 3], [1, 0]])
def test_queries_on_objects_have_the_features_of_the_most_similar_ones(
    counts: list[int], threshold: float, alignment: bool
) -> None:
    given = given_of(counts)
    method: Any = built(2, 2, method="qdetr", threshold=threshold, alignment=alignment)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    (term,) = method(given).values()
    total, number = slow(given, method, threshold)
    assert term.count == number > 0
    assert term.total.item() == pytest.approx(total, rel=1e-4)
    term.total.backward()
    assert given.student.query_states.grad.isfinite().all()  # type: ignore[union-attr]
    assert all(each.grad is not None and each.grad.any() for each in method.parameters())


def test_the_threshold_parts_queries_on_objects_from_the_others() -> None:
    kept = [slow(given_of([2, 3]), built(2, 2, method="qdetr"), threshold)[1] for threshold in (0.0, 0.6, 0.95)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[2]


def test_a_query_that_a_crop_has_dropped_is_nobody_s_partner() -> None:
    given, method = given_of([2, 3]), built(2, 2, method="qdetr")
    absent = torch.zeros(3, 2, 6, dtype=torch.bool)
    for image in range(2):
        absent[-1, image, given.teacher.extra["states_queries"][image, image : 2 + image]] = True
    cut = replace(given, teacher=replace(given.teacher, absent=absent))
    found, whole = method(cut)["qdetr"].total.item(), method(given)["qdetr"].total.item()
    assert found == pytest.approx(slow(cut, method, 0.6, absent)[0], rel=1e-4)
    assert found != pytest.approx(whole, rel=1e-3)


def test_shares_of_a_batch_sum_to_it_and_weight_0_asks_for_nothing() -> None:
    method, given = built(2, 2, method="qdetr"), given_of([3, 1, 3])
    parts = []
    for images in (slice(0, 2), slice(2, 3)):
        cut = share(given, images)
        student = replace(
            cut.student,
            query_states=given.student.query_states[images],
            boxes_cxcywh=given.student.boxes_cxcywh[:, images],
        )
        extra = {name: value[images] for name, value in given.teacher.extra.items()}
        record = replace(cut.teacher, boxes_cxcywh=given.teacher.boxes_cxcywh[:, images], extra=extra)
        parts.append(method(replace(cut, student=student, teacher=record))["qdetr"])
    whole = method(given)["qdetr"]
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-5)
    assert sum(part.count.item() for part in parts) == whole.count
    nothing = built(2, 2, method="qdetr", weight=0)
    assert not nothing.needs.columns
    assert nothing(given) == {}


def test_where_both_are_equal_the_distance_has_a_gradient_of_zero() -> None:
    given = given_of([2])
    same = replace(given.teacher, extra={**given.teacher.extra, "states": torch.zeros(1, 4, 4)})
    states = torch.zeros_like(given.student.query_states).requires_grad_()
    method = built(2, 2, method="qdetr", alignment=False)
    method(replace(given, teacher=same, student=replace(given.student, query_states=states)))["qdetr"].total.backward()
    assert states.grad is not None
    assert not states.grad.any()


def test_it_teaches_a_student_of_few_bits_beside_qskd_and_without_objects_nothing() -> None:
    student = {**tiny.FAMILIES["refined"], "quantization": "w4a4-attn8"}
    config = tiny.recipe(
        student, distillation={"method": "qskd", "also": {"qdetr": {}}, "selection": tiny.EASY_SELECTION}
    )
    training = tiny.make_training(config, tiny.random_teacher("refined"), 5)
    values = [
        training.train_step(tiny.batch_of(*counts, seed=seed)) for seed, counts in enumerate(((2, 1), (1, 3), (0, 0)))
    ]
    training.check_finite()
    assert all(each["qdetr"] > 0 for each in values[:2])
    assert values[2]["qdetr"] == 0
    assert training.module.weights["qdetr"] == 2.5
    assert teacher_needs(config.distillation).columns == {"states"}  # type: ignore[union-attr]


def test_an_image_without_labels_teaches_by_its_pseudo_objects() -> None:
    training = tiny.make_training(tiny.recipe(distillation={"method": "qdetr"}), loud_teacher())
    values = training.train_step(nobody_s([0, 0], [False, False]))
    training.check_finite()
    assert values["qdetr"] > 0
