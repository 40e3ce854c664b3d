"""Relations between objects' query states, against slow loops."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest
import tiny
import torch
from reference import random_logits
from test_detrdistill import lesson
from test_feature_methods import BOTH, built, share
from test_unlabeled import loud_teacher, nobody_s

from qskd.distillation.method import Lesson


def slow(given: Lesson) -> tuple[float, int]:
    total, images = 0.0, 0
    kept = given.teacher.extra["states_queries"].tolist()
    for image, count in enumerate(given.targets.counts):
        pairs = []
        for j in range(count):
            s, t = given.student_assignment[-1, image, j].item(), given.teacher_assignment[-1, image, j].item()
            if s >= 0 and t in kept[image] and t >= 0:
                place = kept[image].index(t)
                pairs.append((given.student.query_states[image, int(s)], given.teacher.extra["states"][image, place]))
        if len(pairs) < 2:
            continue
        images += 1
        for a, b in [(a, b) for a in pairs for b in pairs]:
            total += (cosine(a[0], b[0]) - cosine(a[1], b[1])) ** 2 / len(pairs) ** 2
    return total, images


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    return dot / sqrt(sum(x * x for x in a.tolist()) * sum(x * x for x in b.tolist()))


def related(counts: list[int]) -> Lesson:
    given = lesson(counts, BOTH, kept=5)
    own = torch.tensor([[3, 1, 0], [2, 4, 1], [0, 2, 4], [1, 3, 2]])[: len(counts)]
    kept = given.teacher.extra["states_queries"]
    theirs = kept[:, [2, 0, 3]].clone()
    theirs[-1, 1] = next(q for q in range(6) if q not in kept[-1].tolist())  # its state was not kept
    states = random_logits(len(counts), 5, given.student.query_states.shape[-1], seed=8).requires_grad_()
    student = replace(given.student, query_states=states)
    slots = given.targets.valid.shape[1]
    return replace(
        given,
        student=student,
        student_assignment=own[None, :, :slots],
        teacher_assignment=theirs[None, :, :slots],
    )


@pytest.mark.parametrize("counts", [[3, 1, 2, 3], [3, 0, 3], [1, 0]])
def test_relations_are_the_squared_differences_of_all_cosines(counts: list[int]) -> None:
    given = related(counts)
    (term,) = built(2, 2, method="relations")(given).values()
    total, images = slow(given)
    assert term.count == images
    assert term.total.item() == pytest.approx(total, rel=1e-4)
    assert (images > 0) == (max(counts) > 1)
    term.total.backward()
    grad = given.student.query_states.grad
    assert grad is not None
    assert grad.isfinite().all()
    assert bool(grad.any()) == (images > 0)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_cosines_are_as_exact_under_autocast(precision: torch.dtype) -> None:
    given, method = related([3, 1, 2, 3]), built(2, 2, method="relations")
    with torch.autocast("cpu", precision):
        half = method(given)["relations"].total
    assert torch.equal(half, method(given)["relations"].total)


def test_shares_of_a_batch_sum_to_it_and_weight_0_asks_for_nothing() -> None:
    method, given = built(2, 2, method="relations"), related([3, 1, 3])
    parts = []
    for images in (slice(0, 2), slice(2, 3)):
        cut = share(given, images)
        student = replace(cut.student, query_states=given.student.query_states[images])
        extra = {name: value[images] for name, value in given.teacher.extra.items()}
        record = replace(cut.teacher, logits=given.teacher.logits[:, images], extra=extra)
        own, theirs = given.student_assignment[:, images], given.teacher_assignment[:, images]
        one = replace(cut, student=student, teacher=record, student_assignment=own, teacher_assignment=theirs)
        parts.append(method(one)["relations"])
    whole = method(given)["relations"]
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-5)
    assert sum(part.count.item() for part in parts) == whole.count
    nothing = built(2, 2, method="relations", weight=0)
    assert not nothing.needs.columns
    assert nothing(given) == {}


def test_an_image_without_labels_teaches_the_relations_of_its_pseudo_objects() -> None:
    config = tiny.recipe(distillation={"method": "relations", "weight": 1.0})
    training = tiny.make_training(config, loud_teacher())
    values = training.train_step(nobody_s([0, 0], [False, False]))
    training.check_finite()
    assert values["relations"] > 0
