"""CWD, PKD and MGD against slow loops; on padding, without objects, in shares of a batch, between any two families."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from math import exp, log, sqrt
from typing import Any

import pytest
import tiny
import torch
from reference import make_targets, random_boxes, random_logits, slow_resample
from torch import Tensor

from qskd.config.distillation import settings_class
from qskd.distillation.method import Facts, Lesson, Method, build_method
from qskd.errors import QskdError
from qskd.structures import DetectorOutput, Targets, TeacherNeeds, TeacherRecord, to_device

Size = tuple[int, int]
WIDTH, THEIRS = 3, 4  # channels
COUNTS = [2, 0, 1]
# Maps of the student and of the teacher, and the valid part of each image on them.
STUDENT: list[tuple[Size, list[Size]]] = [((5, 6), [(5, 6), (4, 6), (5, 3)])]
TEACHER: list[tuple[Size, list[Size]]] = [((8, 9), [(8, 9), (6, 9), (8, 5)]), ((4, 5), [(4, 5), (3, 5), (4, 3)])]
BOTH: list[tuple[Size, list[Size]]] = [*STUDENT, ((3, 3), [(3, 3), (2, 3), (3, 2)])]
SETTINGS: list[dict[str, Any]] = [
    {"method": "mimic"},
    {"method": "cwd"},
    {"method": "cwd", "temperature": 2.5},
    {"method": "pkd"},
    {"method": "pkd", "statistics": "batch"},
    {"method": "mgd"},
    {"method": "mgd", "hidden": 0.0},
]


def settings_of(**given: Any) -> Any:
    return settings_class(given["method"])(**given)


def built(student: int, teacher: int, **given: Any) -> Method:
    """The method, its maps' sizes as `STUDENT` and `TEACHER` have them, with weights that are not the identity."""
    torch.manual_seed(0)
    own = Facts((WIDTH,) * student, (30.0, 9.0)[:student])
    method = build_method(settings_of(**given), own, Facts((THEIRS,) * teacher, (72.0, 20.0)[:teacher]))
    assert method is not None
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return method


def maps(sizes: list[tuple[Size, list[Size]]], width: int, seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """[B, C, H, W] random, noise on padding too, and what is no padding."""
    g = torch.Generator().manual_seed(seed)
    features, valid = [], []
    for (high, wide), extents in sizes:
        features.append(torch.randn(len(extents), width, high, wide, generator=g) * 2 + 0.5)
        inside = torch.zeros(len(extents), high, wide, dtype=torch.bool)
        for image, (h, w) in enumerate(extents):
            inside[image, :h, :w] = True
        valid.append(inside)
    return tuple(features), tuple(valid)


def lesson_of(
    student: list[tuple[Size, list[Size]]], teacher: list[tuple[Size, list[Size]]], counts: list[int]
) -> Lesson:
    """Other numbers of queries, classes, layers and channels on both sides."""
    batch, targets = len(counts), make_targets(counts)
    targets = replace(targets, image_ids=tuple(range(40, 40 + batch)))
    memory, valid = maps(student, WIDTH, 1)
    theirs, their_valid = maps(teacher, THEIRS, 2)

    def attend(_: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError

    output = DetectorOutput(
        random_logits(2, batch, 7, 5),
        random_boxes(2, batch, 7),
        memory,
        valid,
        (),
        torch.zeros(batch, 7, WIDTH),
        attend,
        attend,
    )
    record = TeacherRecord(random_logits(1, batch, 11, 6), random_boxes(1, batch, 11), theirs, their_valid)
    none = torch.zeros(2, batch, targets.valid.shape[1], dtype=torch.int64)
    return Lesson(output, record, targets, none, none[:1])


def cells(method: Any, lesson: Lesson, pairs: list[Any], image: int) -> list[tuple[Size, list[Any], list[Any]]]:
    """Of each pair of maps: the valid part's size, and by row and column the student's projected and the teacher's channels."""
    found = []
    for (own, other), layer in zip(pairs, method.projectors, strict=True):
        inside, theirs = (side[level][image] for side, level in zip(sides(lesson), (own, other), strict=True))
        size, source = extent(inside), extent(theirs)
        goal = slow_resample(lesson.teacher.memory[other][image], source, size, tuple(inside.shape))  # type: ignore[arg-type]
        weight, bias = (each.detach() for each in layer.parameters())
        shown = torch.einsum("oi,ihw->ohw", weight[:, :, 0, 0], lesson.student.memory[own][image]) + bias[:, None, None]
        found.append((size, shown.tolist(), goal.tolist()))
    return found


def sides(lesson: Lesson) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return lesson.student.memory_valid, lesson.teacher.memory_valid


def extent(valid: Tensor) -> Size:
    return int(valid.any(1).sum()), int(valid.any(0).sum())


def listed(channel: list[list[float]], size: Size) -> list[float]:
    return [channel[y][x] for y in range(size[0]) for x in range(size[1])]


def slow_cwd(settings: Any, size: Size, shown: list[Any], goal: list[Any]) -> float:
    total, heat = 0.0, settings.temperature
    for mine, theirs in zip(shown, goal, strict=True):
        parts = [[exp(value / heat) for value in listed(channel, size)] for channel in (mine, theirs)]
        s, t = ([value / sum(part) for value in part] for part in parts)
        total += heat**2 * sum(q * log(q / p) for p, q in zip(s, t, strict=True)) / len(shown)
    return total


def normal(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    deviation = sqrt(sum((value - mean) ** 2 for value in values) / len(values) + 1e-5)
    return [(value - mean) / deviation for value in values]


def slow_pkd(shown: list[list[float]], goal: list[list[float]]) -> float:
    """shown, goal: each channel's values at all positions."""
    total = 0.0
    for mine, theirs in zip(shown, goal, strict=True):
        apart = [(a - b) ** 2 for a, b in zip(normal(mine), normal(theirs), strict=True)]
        total += 0.5 * sum(apart) / len(apart) / len(shown)
    return total


def mixed(number: int) -> int:
    number &= 0xFFFFFFFF
    number = ((number ^ (number >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    number = ((number ^ (number >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return number ^ (number >> 16)


def slow_mgd(method: Any, level: int, image: int, size: Size, shown: list[Any], goal: list[Any]) -> float:
    """Of the first step: the sum over positions of the mean over channels."""
    first, second = method.generators[level]
    seed = mixed(mixed(mixed(image)) + level)
    inside = list(itertools.product(range(size[0]), range(size[1])))
    seen = {
        (y, x): torch.tensor([channel[y][x] for channel in shown])
        for y, x in inside
        if mixed(seed + y * 65536 + x) >= method.settings.hidden * 2**32
    }
    middle = {place: convolved(seen, place, first).relu() for place in inside}
    made = {place: convolved(middle, place, second) for place in inside}
    return sum(
        float((made[y, x] - torch.tensor([channel[y][x] for channel in goal])).square().mean()) for y, x in inside
    )


def convolved(values: dict[Size, Tensor], place: Size, layer: Any) -> Tensor:
    """At one place; what is not in `values` is 0."""
    total = layer.bias.detach().clone()
    for dy, dx in itertools.product((-1, 0, 1), repeat=2):
        if (value := values.get((place[0] + dy, place[1] + dx))) is not None:
            total += layer.weight.detach()[:, :, dy + 1, dx + 1] @ value
    return total


def slow(method: Any, lesson: Lesson, pairs: list[Any]) -> tuple[float, float]:
    """The term's total and count."""
    settings, batch = method.settings, len(lesson.targets.counts)
    found = [cells(method, lesson, pairs, image) for image in range(batch)]
    total = count = 0.0
    for image, levels in enumerate(found):
        for level, (size, shown, goal) in enumerate(levels):
            if settings.method == "cwd":
                total += slow_cwd(settings, size, shown, goal)
            elif settings.method == "pkd" and settings.statistics == "image":
                total += slow_pkd(*([listed(channel, size) for channel in side] for side in (shown, goal)))
            elif settings.method == "mgd":
                total += slow_mgd(method, level, lesson.targets.image_ids[image], size, shown, goal)
            elif settings.method == "mimic":
                total += (
                    sum((a - b) ** 2 for c, d in zip(shown, goal, strict=True) for a, b in both(c, d, size)) / THEIRS
                )
            if settings.method in ("mgd", "mimic"):
                count += size[0] * size[1]
    if settings.method == "pkd" and settings.statistics == "batch":
        for level in range(len(pairs)):
            pooled: list[list[list[float]]] = [[[] for _ in range(THEIRS)] for _ in range(2)]
            for size, *pair in (levels[level] for levels in found):
                for side, channels in zip(pooled, pair, strict=True):
                    for channel, values in zip(side, channels, strict=True):
                        channel += listed(values, size)
            total += batch * slow_pkd(*pooled)
    return total, count or batch


def both(mine: list[list[float]], theirs: list[list[float]], size: Size) -> Any:
    return zip(listed(mine, size), listed(theirs, size), strict=True)


@pytest.mark.parametrize("given", SETTINGS, ids=str)
@pytest.mark.parametrize(("student", "pairs"), [(STUDENT, [(0, 1)]), (BOTH, [(0, 0), (1, 1)])], ids=["1", "2"])
def test_a_feature_loss_equals_the_loops(given: dict[str, Any], student: Any, pairs: list[Any]) -> None:
    method, lesson = built(len(student), 2, **given), lesson_of(student, TEACHER, COUNTS)
    assert method.needs == TeacherNeeds(memory=True)
    terms = method(lesson)
    assert terms.keys() == method.weights.keys() == method.settings.weight_fields().keys() == {given["method"]}
    (term,) = terms.values()
    total, count = slow(method, lesson, pairs)
    assert term.total.item() == pytest.approx(total, rel=2e-4)
    assert term.count == count
    term.total.backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in method.parameters())


def share(lesson: Lesson, images: slice) -> Lesson:
    """What a worker with these images alone has: its maps are as large as they need."""

    def cut(values: tuple[Tensor, ...], valid: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        high = [int(part[images].any(2).sum(1).max()) for part in valid]
        wide = [int(part[images].any(1).sum(1).max()) for part in valid]
        return tuple(value[images][..., :h, :w] for value, h, w in zip(values, high, wide, strict=True))

    student, teacher, targets = lesson.student, lesson.teacher, lesson.targets
    return replace(
        lesson,
        student=replace(
            student,
            logits=student.logits[:, images],
            memory=cut(student.memory, student.memory_valid),
            memory_valid=cut(student.memory_valid, student.memory_valid),
        ),
        teacher=replace(
            teacher,
            memory=cut(teacher.memory, teacher.memory_valid),
            memory_valid=cut(teacher.memory_valid, teacher.memory_valid),
        ),
        targets=Targets(
            targets.boxes_cxcywh[images],
            targets.labels[images],
            targets.valid[images],
            targets.image_ids[images],
            targets.counts[images],
        ),
    )


@pytest.mark.parametrize("given", [one for one in SETTINGS if "statistics" not in one], ids=str)
def test_two_workers_shares_sum_to_the_batch_s_total_and_count(given: dict[str, Any]) -> None:
    method, lesson = built(2, 2, **given), lesson_of(BOTH, TEACHER, COUNTS)
    shares = [share(lesson, images) for images in (slice(0, 2), slice(2, 3))]
    assert shares[1].student.memory[0].shape[-2:] != lesson.student.memory[0].shape[-2:]  # padded less
    for _ in range(2):  # the second step too: what is hidden has changed alike
        parts = [copy.deepcopy(method)(each) for each in shares]
        (whole,) = method(lesson).values()
        terms = [term for part in parts for term in part.values()]
        assert sum(term.total.item() for term in terms) == pytest.approx(whole.total.item(), rel=1e-4)
        assert sum(term.count.item() for term in terms) == whole.count


def test_what_mgd_hides_is_another_part_at_every_step_and_of_every_image() -> None:
    method: Any = built(1, 1, method="mgd")
    valid = torch.ones(2, 40, 50)
    drawn = []
    for step in range(3):
        method.steps.fill_(step)
        drawn += [*method._kept([7, 8], 0, valid), *method._kept([7], 1, valid)]
    for one, other in itertools.combinations(drawn, 2):
        assert 0.5 < (one == other).float().mean() < 0.6  # by chance 0.65^2 + 0.35^2
    assert all(abs(each.float().mean() - 0.35) < 0.05 for each in drawn)
    method(lesson_of(STUDENT, TEACHER[:1], COUNTS))
    assert method.steps == 3
    assert method.state_dict()["steps"] == 3  # a resumed run goes on


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_a_feature_that_is_the_same_everywhere_has_a_finite_gradient(given: dict[str, Any]) -> None:
    method, lesson = built(1, 1, **given), lesson_of(STUDENT, TEACHER[:1], [0, 0, 0])
    memory = torch.full_like(lesson.student.memory[0], 0.3).requires_grad_()
    (term,) = method(replace(lesson, student=replace(lesson.student, memory=(memory,)))).values()
    term.total.backward()
    assert memory.grad is not None
    assert memory.grad.abs().max() < 1e3


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_no_feature_loss_waits_for_the_device(given: dict[str, Any]) -> None:
    """Tensors on the meta device have no values: whatever asks for one raises."""
    lesson = to_device(lesson_of(BOTH, TEACHER, COUNTS), "meta")
    (term,) = built(2, 2, **given).to("meta")(lesson).values()
    term.total.backward()
    assert term.count.is_meta


@pytest.mark.parametrize("name", ["mimic", "cwd", "pkd", "mgd"])
def test_maps_of_unknown_sizes_are_refused_and_weight_0_asks_for_nothing(name: str) -> None:
    with pytest.raises(QskdError, match="1 student maps and 2 teacher maps of unknown sizes"):
        build_method(settings_of(method=name), Facts((3,), (30.0,)), Facts((4, 4)))
    nothing = build_method(settings_of(method=name, weight=0), Facts((3,)), Facts((4, 4)))
    assert nothing is not None
    assert not nothing.needs.memory
    assert nothing(lesson_of(STUDENT, TEACHER, COUNTS)) == {}


FAMILIES = ["conditional_detr", "deformable_detr", "rt_detr", "d_fine"]
EVERY: dict[str, Any] = {
    "method": "qskd-tprd",
    "also": {name: {} for name in ("mimic", "cwd", "pkd", "mgd", "crosskd")},
}


@pytest.mark.parametrize(("taught", "teacher"), itertools.product(FAMILIES, FAMILIES))
def test_every_method_runs_between_any_two_families(taught: str, teacher: str) -> None:
    many = {"feature_levels": 1 if taught == "conditional_detr" else 2}
    student = {"family": taught, "queries": 12, **many}
    asked = {"kd": {"method": "kd-detr", "general_points": 5}}
    config, both = (tiny.recipe(student, distillation={**EVERY, "also": EVERY["also"] | more}) for more in ({}, asked))
    its_teacher = tiny.random_teacher(teacher)
    if taught == teacher or {taught, teacher} == {"rt_detr", "d_fine"}:  # they can be asked the same
        config = both
    else:
        with pytest.raises(QskdError, match=f"a student of family {taught}.*a teacher of family {teacher}"):
            tiny.make_training(both, its_teacher)
    training = tiny.make_training(config, its_teacher)
    values = training.train_step(tiny.batch_of(2, 0))
    assert values.keys() >= {"mimic", "cwd", "pkd", "mgd", "agfd", "lapd_class", "lapd_l1", "lapd_giou"}
    assert values.keys() >= {"crosskd_cross_class", "crosskd_cross_l1", "crosskd_cross_giou"}
    assert ("kd_class" in values) == (config is both)
    training.check_finite()
