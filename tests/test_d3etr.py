"""D3ETR against slow loops; a student's attention with gradient, beside denoising queries and groups; between families."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from reference import corners, sigmoid, slow_bce, slow_giou
from test_decoder_methods import networks, settings_of
from torch import Tensor

from qskd.checks import check_enough
from qskd.config.recipe import build
from qskd.datasets.batch import train_batch
from qskd.detectors import to_pixels
from qskd.detectors.decoding import decode
from qskd.detectors.forward.extra_queries import ExtraQueries
from qskd.distillation.d3etr import on_one_map
from qskd.distillation.method import Lesson, build_method
from qskd.distillation.qskd.pairing import pair_globally
from qskd.distillation.shared.asked import both_sides
from qskd.errors import QskdError
from qskd.structures import DetectorOutput, Queries
from qskd.teacher.online import facts_of, queries_above

torch.set_num_threads(1)

COUNTS = (2, 0, 1)


def lesson_of(student: Any, teacher: Any, method: Any, images: slice = slice(None)) -> Lesson:
    batch = train_batch({name: array[images] for name, array in tiny.arrays(COUNTS).items()})
    pixels, mask = to_pixels(batch.images, batch.sizes, student.mean, student.std)
    output = student(pixels, mask)
    costs = build({}).detection
    record = teacher(
        batch.images, batch.sizes, method.needs, lambda said: queries_above(said, batch.targets, -0.5, costs)
    )
    none = torch.zeros(len(output.logits), len(batch.images), 2, dtype=torch.int64)

    def ask(queries: Queries) -> DetectorOutput:
        return decode(student, output.memory, output.memory_valid, queries, masked=False).output

    decoder = teacher.decoder if method.needs.decoder else None
    return Lesson(output, record, batch.targets, none, none[:1], decoder=decoder, ask_student=ask)


def pair() -> tuple[Any, Any]:
    """A student in training, all of whose parts are as in evaluation: so it says the same of an image whatever is beside it."""
    student, teacher = networks("conditional", "conditional")
    student = copy.deepcopy(student)
    student.training = True
    return student, teacher


def made(student: Any, teacher: Any, **given: Any) -> Any:
    torch.manual_seed(0)
    method = build_method(settings_of(method="d3etr", **given), facts_of(student, teacher.resize), teacher.facts)
    assert method is not None
    return method


def slow_pair(said: DetectorOutput, record: Any, layer: int, other: int, image: int, s: int, t: int) -> list[float]:
    goal = [sigmoid(z) for z in record.logits[other, image, t].tolist()]
    found = said.logits[layer, image, s].tolist()
    a, b = said.boxes_cxcywh[layer, image, s].tolist(), record.boxes_cxcywh[other, image, t].tolist()
    boxes = sum(abs(x - y) for x, y in zip(a, b, strict=True)), 1 - slow_giou(corners(a), corners(b))
    return [slow_bce(found, goal), *boxes]


def test_both_matchings_and_attention_are_those_of_slow_loops() -> None:
    student, teacher = pair()
    method, found = made(student, teacher), []
    for images in (slice(None), slice(0, 1), slice(1, 3)):
        lesson = lesson_of(student, teacher, method, images)
        record, said = lesson.teacher, lesson.student
        terms = method(lesson)
        assert lesson.decoder is not None
        assert lesson.ask_student is not None
        asked = lesson.ask_student(method.asked(lesson.decoder.ask(record).decoded.queries))
        adaptive, fixed = [0.0] * 3, [0.0] * 3
        layers = [(0, 0), (1, 2)]  # of two and of three
        own, theirs = both_sides(lesson, said, *map(list, zip(*layers, strict=True)))
        partner = pair_globally(own, theirs)
        for number, (layer, other) in enumerate(layers):
            for image in range(len(record.logits[0])):
                for s, t in enumerate(partner[number, image].tolist()):
                    if t >= 0:
                        parts = slow_pair(said, record, layer, other, image, s, t)
                        adaptive = [a + b for a, b in zip(adaptive, parts, strict=True)]
                for t in range(record.logits.shape[2]):
                    parts = slow_pair(asked, record, layer, other, image, t, t)
                    fixed = [a + b for a, b in zip(fixed, parts, strict=True)]
        total, pairs = 0.0, 0
        for image, row in enumerate(record.attention_queries.tolist()):
            for place, t in enumerate(row):
                if t in partner[1, image].tolist():
                    s = partner[1, image].tolist().index(t)
                    (mine,) = said.attend(
                        torch.tensor([[s] if n == image else [-1] for n in range(len(own.logits[0]))])
                    )
                    both = (mine[image, 0], record.attention[0][image, place])
                    cells = zip(*(map_.flatten().tolist() for map_ in both), strict=True)
                    each = [(a - b) ** 2 for a, b in cells]
                    total, pairs = total + sum(each) / len(each), pairs + 1
        names = [f"d3_{kind}{part}" for kind in ("", "fixed_") for part in ("class", "l1", "giou")]
        assert [terms[name].total.item() for name in names] == pytest.approx([*adaptive, *fixed], rel=1e-4)
        assert terms["d3_attention"].total.item() == pytest.approx(total, rel=1e-4)
        assert terms["d3_attention"].count == pairs
        found.append({name: term.total.item() for name, term in terms.items()})
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name] + found[2][name], rel=1e-4)


def test_attention_teaches_the_layers_before_it() -> None:
    student, teacher = pair()
    method = made(student, teacher, class_weight=0, l1_weight=0, giou_weight=0)
    assert method.needs.memory is method.needs.decoder is False
    method(lesson_of(student, teacher, method))["d3_attention"].total.backward()
    touched = {name for name, value in student.named_parameters() if value.grad is not None and value.grad.any()}
    assert any("backbone" in name for name in touched)
    assert any("decoder.layers.0" in name for name in touched)


def test_a_student_s_own_queries_are_looked_for_behind_denoising_ones() -> None:
    student = tiny.silent_student(tiny.recipe(tiny.own("rt_detr")).student, tiny.LABELS, 0)
    tiny.shake(student, 3)
    images, mask = torch.randn(2, 3, 64, 64), torch.ones(2, 64, 64, dtype=torch.bool)
    for part in student.modules():  # the same statistics in both forwards
        part.training = isinstance(part, type(student))
    extra = ExtraQueries(torch.randn(2, 2, 32), torch.rand(2, 2, 4) * 0.2 + 0.3, group=torch.tensor([0, 0]))
    asked = torch.arange(6).expand(2, -1)
    alone, beside = student(images, mask), student(images, mask, extra=extra)
    torch.testing.assert_close(beside.boxes_cxcywh, alone.boxes_cxcywh, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(beside.attend(asked), alone.attend(asked), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
        assert mine.requires_grad
    with torch.no_grad():
        assert not student(images, mask).attend(asked)[0].requires_grad


def test_attention_keeps_its_sum_on_another_grid() -> None:
    rows = [torch.rand(1, 3, 8, 8), torch.rand(1, 3, 4, 4)]
    whole = sum(part.flatten(2).sum(2) for part in rows)[..., None, None]
    maps = tuple(part / whole for part in rows)
    valid = tuple(torch.ones(1, *part.shape[2:], dtype=torch.bool) for part in maps)
    same = on_one_map(maps[:1], valid[:1], valid[0])
    torch.testing.assert_close(same, maps[0])
    for onto in (torch.ones(1, 4, 4, dtype=torch.bool), torch.ones(1, 16, 16, dtype=torch.bool)):
        moved: Tensor = on_one_map(maps, valid, onto)
        torch.testing.assert_close(moved.flatten(2).sum(2), torch.ones(1, 3), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("taught", "teacher", "more"),
    [
        ("conditional_detr", "conditional", {}),
        ("deformable_detr", "conditional", {"fixed": False}),
        ("rt_detr", "d_fine", {}),
        ("d_fine", "refined", {"fixed": False}),
    ],
)
def test_it_runs_between_families_and_without_objects(taught: str, teacher: str, more: dict[str, Any]) -> None:
    config = tiny.recipe({**tiny.own(taught, levels=2), "queries": 12}, distillation={"method": "d3etr", **more})
    training = tiny.make_training(config, tiny.random_teacher(teacher))
    assert float(training.train_step(tiny.batch_of(2, 0))["d3_attention"]) > 0
    training.train_step(tiny.batch_of(0, 0))
    training.check_finite()


def test_groups_of_queries_leave_the_student_s_own_attention_alone() -> None:
    config = tiny.recipe(None, "detection.query_groups=3", distillation={"method": "d3etr", "fixed": False})
    teacher = tiny.random_teacher("conditional")
    grouped = tiny.make_training(config, teacher).train_step(tiny.batch_of(2, 1))
    alone = tiny.make_training(tiny.recipe(None, distillation={"method": "d3etr", "fixed": False}), teacher)
    assert float(grouped["d3_attention"]) == pytest.approx(
        float(alone.train_step(tiny.batch_of(2, 1))["d3_attention"]), rel=1e-4
    )


def test_without_its_attention_it_asks_for_none_of_another_method_s_cache() -> None:
    beside = {"d3etr": {"fixed": False, "attention_weight": 0}}
    taught = {"selection": {"boundaries": [0.7]}, "also": beside}
    cache = {"all_layers": True, "attention_giou_floor": 0.7}
    check_enough(build({"teacher": {"cache": cache}, "distillation": taught}))


def test_what_cannot_be_is_refused_with_the_field() -> None:
    student, teacher = networks("deformable", "conditional")
    with pytest.raises(QskdError, match=r"(?s)distillation\.fixed.*fixed: false"):
        made(student, teacher)
    cache: dict[str, Any] = {"all_layers": True, "cells": "attended"}
    with pytest.raises(QskdError, match=r"teacher\.cache\.cells=all"):
        check_enough(build({"teacher": {"cache": cache}, "distillation": {"method": "d3etr"}}))
    check_enough(build({"teacher": {"cache": cache}, "distillation": {"method": "d3etr", "fixed": False}}))
    with pytest.raises(QskdError, match=r"teacher\.cache\.all_layers=true"):
        check_enough(build({"distillation": {"method": "d3etr", "fixed": False}}))
