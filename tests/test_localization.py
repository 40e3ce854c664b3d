"""Localization distillation: bins told in another's bins, the loss against a slow loop, its column of the cache, who can't."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from reference import corners, make_targets, near, random_boxes, random_logits, slow_iou, slow_pairs, slow_selection
from torch import Tensor
from transformers import DFineConfig

from qskd.boxes import xyxy_to_cxcywh
from qskd.checks import check_columns, check_enough
from qskd.config import DetectionLossConfig
from qskd.config.recipe import build
from qskd.distillation.localization import Localization, Settings
from qskd.distillation.method import Facts, Lesson
from qskd.distillation.qskd.settings import QuerySelectionConfig
from qskd.errors import QskdError
from qskd.losses.fine_grained import moved_to, rebinned
from qskd.losses.matching import assign
from qskd.structures import DetectorOutput, SideDistributions, Targets, TeacherNeeds, TeacherRecord, to_device
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.table import (
    ALWAYS,
    ARRAYS,
    collate,
    columns_for,
    decode_batch,
    encode,
    largest_errors,
    mirrored,
    row_from,
)
from qskd.teacher.online import queries_above

LAYERS, OWN, THEIRS, CLASSES = 2, 9, 12, 5
VALUES = torch.tensor([-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0])  # the student's bins
WIDER = torch.tensor([-3.0, -1.5, -0.75, 0.0, 0.8, 1.6, 3.5])  # the teacher's: others, and fewer
SCALES = (torch.tensor([4.0]), torch.tensor(5.0))
RULE = QuerySelectionConfig(boundaries=(0.2,), max_per_object=2)
COSTS = DetectionLossConfig()


def boxes_of(chances: Tensor, about: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """[..., 4, N + 1], [..., 4] -> the boxes that the means say, cxcywh."""
    away = (0.5 * scale + (chances * values).sum(-1)) / scale
    middle, size = about[..., :2], about[..., 2:]
    return xyxy_to_cxcywh(torch.cat([middle - away[..., :2] * size, middle + away[..., 2:] * size], -1))


def random_chances(*shape: int, seed: int) -> Tensor:
    """Some spread wide, some nearly certain."""
    return (random_logits(*shape, seed=seed) * 2).softmax(-1)


def test_bins_told_in_another_s_keep_their_mean_wherever_it_lies_within_them() -> None:
    number = 2000
    chances = random_chances(number, 4, len(WIDER), seed=1)
    about, onto = random_boxes(number, seed=2), random_boxes(number, seed=3)
    onto[::2] = about[::2] * (1 + 0.1 * torch.randn(number // 2, 4, generator=torch.Generator().manual_seed(4)))
    bins = torch.cat([WIDER, SCALES[1][None]]).expand(number, -1)
    moved = moved_to(about, bins, onto, SCALES[0])
    found = rebinned(chances, moved, VALUES)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(-1), torch.ones(number, 4))
    mean = (chances * moved).sum(-1)
    inside = (mean > VALUES[0]) & (mean < VALUES[-1])
    clipped = inside & ((moved < VALUES[0]) | (moved > VALUES[-1])).any(-1)
    assert clipped.sum() > 500  # also where some of the mass lies beyond the bins
    assert not inside.all()
    torch.testing.assert_close((found * VALUES).sum(-1)[inside], mean[inside], rtol=1e-4, atol=1e-4)
    ends = torch.where(mean < VALUES[0], VALUES[0], VALUES[-1])
    torch.testing.assert_close((found * VALUES).sum(-1)[~inside], ends[~inside], rtol=1e-4, atol=1e-4)
    whole = inside.all(-1)
    assert whole.sum() > 100
    told = boxes_of(found, onto, VALUES, SCALES[0])
    torch.testing.assert_close(told[whole], boxes_of(chances, about, WIDER, SCALES[1])[whole], rtol=1e-3, atol=1e-4)


def test_bins_told_about_the_same_box_in_the_same_bins_are_as_they_were() -> None:
    chances, about = random_chances(50, 4, len(VALUES), seed=1), random_boxes(50, seed=2)
    bins = torch.cat([VALUES, SCALES[0]]).expand(50, -1)
    moved = moved_to(about, bins, about, SCALES[0])
    torch.testing.assert_close(moved, VALUES.expand(50, 4, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rebinned(chances, moved, VALUES), chances, rtol=1e-3, atol=1e-4)


def lesson_of(counts: list[int], kept: bool = True) -> Lesson:
    """A student and a teacher with other numbers of queries, classes and bins. kept: the record has the distributions of what a
    cache keeps, at GIoU 0.2; else of every query."""
    batch, targets = len(counts), make_targets(counts, CLASSES)
    own = torch.stack([near(targets, OWN, seed=layer) for layer in range(LAYERS)])
    sides = SideDistributions(
        tuple(random_logits(batch, OWN, 4 * len(VALUES), seed=20 + layer).requires_grad_() for layer in range(LAYERS)),
        near(targets, OWN, seed=5),
        VALUES,
        SCALES[0],
    )

    def attend(_: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError

    logits = random_logits(LAYERS, batch, OWN, CLASSES, seed=1)
    output = DetectorOutput(logits, own, (), (), (), torch.zeros(batch, OWN, 3), attend, attend, sides=sides)
    record = TeacherRecord(random_logits(1, batch, THEIRS, CLASSES, seed=3), near(targets, THEIRS, seed=30)[None])
    queries = torch.arange(THEIRS).expand(batch, -1)
    if kept:
        queries = queries_above(record, targets, 0.2, COSTS)
    likely = random_logits(batch, THEIRS, 4, len(WIDER), seed=6).log_softmax(-1)
    about = near(targets, THEIRS, seed=7)
    index = queries.clamp(min=0)
    extra = {
        "sides_queries": queries,
        "sides": likely.gather(1, index[..., None, None].expand(-1, -1, *likely.shape[2:])),
        "sides_about_cxcywh": about.gather(1, index[..., None].expand(-1, -1, 4)),
        "sides_bins": torch.cat([WIDER, SCALES[1][None]]).expand(batch, -1),
    }
    mine, theirs = assign([(logits, own), (record.logits, record.boxes_cxcywh)], targets, COSTS)
    return Lesson(output, replace(record, extra=extra), targets, mine, theirs)


def method_of(**given: Any) -> Localization:
    settings = Settings(selection=RULE, **given)
    facts = Facts((8,), family="d_fine")
    return Localization(settings, facts, facts)


def slow_rebinned(chances: list[float], places: list[float], values: list[float]) -> list[float]:
    found = [0.0] * len(values)
    for chance, place in zip(chances, places, strict=True):
        place = min(max(place, values[0]), values[-1])
        left = max(n for n in range(len(values) - 1) if values[n] <= place or n == 0)
        share = (place - values[left]) / (values[left + 1] - values[left])
        found[left] += chance * (1 - share)
        found[left + 1] += chance * share
    mean = sum(c * p for c, p in zip(chances, places, strict=True))
    there = sum(c * v for c, v in zip(found, values, strict=True))
    end = len(values) - 1 if mean > there else 0
    part = 0.0 if abs(values[end] - there) < 1e-5 else min(1.0, max(0.0, (mean - there) / (values[end] - there)))
    found = [c * (1 - part) for c in found]
    found[end] += part
    return found


def slow_apart(lesson: Lesson, layer: int, image: int, s: int, t: int, heat: float) -> float:
    """Mean over sides of T^2 KL."""
    sides, extra, total = lesson.student.sides, lesson.teacher.extra, 0.0
    assert sides is not None
    place = extra["sides_queries"][image].tolist().index(t)
    own = sides.about_cxcywh[image, s].tolist()
    theirs = extra["sides_about_cxcywh"][image, place].tolist()
    own_scale, scale = float(SCALES[0]), float(SCALES[1])
    for side in range(4):
        axis, out = side % 2, 1 if side > 1 else -1
        chances = extra["sides"][image, place, side].exp().tolist()
        at = [theirs[axis] + out * (0.5 + value / scale) * theirs[2 + axis] for value in WIDER.tolist()]
        places = [own_scale * out * (x - own[axis]) / own[2 + axis] - own_scale / 2 for x in at]
        goal = [(c + 1e-5) ** (1 / heat) for c in slow_rebinned(chances, places, VALUES.tolist())]
        goal = [c / sum(goal) for c in goal]
        logits = (sides.logits[layer][image, s].detach().view(4, -1)[side] / heat).tolist()
        below = log(sum(map(exp, logits)))
        total += heat**2 * sum(g * (log(g) - (z - below)) for g, z in zip(goal, logits, strict=True) if g > 0) / 4
    return total


def slow_terms(lesson: Lesson, heat: float) -> dict[str, list[float]]:
    """Each term's total, and its count, which is a mean over layers."""
    teacher, targets = lesson.teacher, lesson.targets
    found = {"ld_main": [0.0, 0.0], "ld_region": [0.0, 0.0]}
    theirs = slow_selection(teacher.boxes_cxcywh[0], targets, lesson.teacher_assignment[0], RULE)
    for layer in range(LAYERS):
        own = slow_selection(lesson.student.boxes_cxcywh[layer], targets, lesson.student_assignment[layer], RULE)
        for image, count in enumerate(targets.counts):
            for s, t in slow_pairs(own, theirs, image, count):
                positive = theirs["is_positive"][image][t]
                weight = max(0.0, theirs["giou"][image][t])
                if positive:
                    object_ = targets.boxes_cxcywh[image, theirs["object_of_query"][image][t]].tolist()
                    weight = slow_iou(corners(teacher.boxes_cxcywh[0, image, t].tolist()), corners(object_))
                term = found["ld_main" if positive else "ld_region"]
                term[0] += weight * slow_apart(lesson, layer, image, s, t, heat)
                term[1] += weight / LAYERS
    return found


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("heat", [5.0, 1.0])
def test_both_terms_equal_a_slow_loop(heat: float, kept: bool) -> None:
    lesson, method = lesson_of([2, 0, 3], kept), method_of(temperature=heat)
    terms, expected = method(lesson), slow_terms(lesson, heat)
    assert terms.keys() == method.weights.keys() == expected.keys()
    for name, (total, count) in expected.items():
        assert count > 0.5, name
        assert terms[name].total.item() == pytest.approx(total, rel=5e-4)
        assert float(terms[name].count) == pytest.approx(count, rel=1e-4)
    sum(term.total for term in terms.values()).backward()  # type: ignore[union-attr]
    assert lesson.student.sides is not None
    assert all(layer.grad is not None and layer.grad.isfinite().all() for layer in lesson.student.sides.logits)


def share_of(lesson: Lesson, images: slice) -> Lesson:
    own, theirs, targets = lesson.student, lesson.teacher, lesson.targets
    assert own.sides is not None
    sides = replace(
        own.sides,
        logits=tuple(layer[images] for layer in own.sides.logits),
        about_cxcywh=own.sides.about_cxcywh[images],
    )
    student = replace(own, logits=own.logits[:, images], boxes_cxcywh=own.boxes_cxcywh[:, images], sides=sides)
    teacher = replace(
        theirs,
        logits=theirs.logits[:, images],
        boxes_cxcywh=theirs.boxes_cxcywh[:, images],
        extra={name: value[images] for name, value in theirs.extra.items()},
    )
    cut = Targets(
        targets.boxes_cxcywh[images],
        targets.labels[images],
        targets.valid[images],
        targets.image_ids[images],
        targets.counts[images],
    )
    return Lesson(student, teacher, cut, lesson.student_assignment[:, images], lesson.teacher_assignment[:, images])


def test_two_workers_shares_sum_to_the_batch_s_totals_and_counts() -> None:
    lesson, method = lesson_of([2, 0, 3, 1]), method_of()
    parts = [method(share_of(lesson, images)) for images in (slice(0, 3), slice(3, 4))]
    for name, term in method(lesson).items():
        torch.testing.assert_close(parts[0][name].total + parts[1][name].total, term.total)
        torch.testing.assert_close(parts[0][name].count + parts[1][name].count, term.count)


def test_images_without_objects_teach_nothing_and_nothing_waits_for_the_device() -> None:
    nothing = method_of()(lesson_of([0, 0]))
    assert [(term.total.item(), float(term.count)) for term in nothing.values()] == [(0, 0), (0, 0)]
    nothing["ld_main"].total.backward()
    for term in method_of()(to_device(lesson_of([2, 1]), "meta")).values():  # without values: who asks for one raises
        assert term.total.is_meta
    assert method_of(weight=0, region_weight=0)(lesson_of([1])) == {}
    assert not method_of(weight=0, region_weight=0).needs.columns
    assert method_of(region_weight=0).weights == {"ld_main": 0.05}
    assert method_of(region_weight=0).needs.attention_giou_floor == 1.0  # positives are always kept


NEEDS = TeacherNeeds(memory=True, attention=True, columns=frozenset({"sides"}))


@pytest.mark.parametrize(("precision", "most"), [("int8", 5e-3), ("float32", 1e-6)])
def test_the_column_gives_back_what_the_teacher_said_of_the_queries_that_the_floor_lets_in(
    precision: str, most: float
) -> None:
    teacher, batch = tiny.random_teacher("d_fine"), tiny.batch_of(2, 0, 1)
    chosen: list[Tensor] = []

    def choose(record: TeacherRecord) -> Tensor:
        chosen.append(queries_above(record, batch.targets, -0.3, COSTS))
        return chosen[0]

    record = teacher(batch.teacher_images, batch.teacher_sizes, NEEDS, choose)
    sizes = teacher.sizes(all_layers=False)
    rows = encode(record, [1, 2, 3], precision)
    stored = [{name: getattr(row, name).tobytes() for name in ARRAYS} for row in rows]
    rows = [row_from(number, buffers, sizes, precision) for number, buffers in enumerate(stored)]
    arrays = collate(rows, sizes, columns_for(NEEDS))
    found = decode_batch({name: torch.from_numpy(value) for name, value in arrays.items()})
    assert torch.equal(found.extra["sides_queries"], chosen[0])
    assert 0 < (chosen[0] >= 0).sum() < 3 * record.logits.shape[2]
    errors = largest_errors(found, record)
    assert errors["side_probability"] < most
    assert errors["sides_about_cxcywh"] == 0
    # The distributions' means are the boxes, and those of a mirrored row are the mirrored boxes.
    bins = found.extra["sides_bins"]
    for flip, read in (
        (False, rows),
        (True, [mirrored(row, sizes, ("image_id", *ALWAYS, "sides_queries")) for row in rows]),
    ):
        again = collate(read, sizes, columns_for(NEEDS))
        said = decode_batch({name: torch.from_numpy(value) for name, value in again.items()})
        told = boxes_of(said.extra["sides"].exp(), said.extra["sides_about_cxcywh"], bins[0, :-1], bins[0, -1])
        true = record.boxes_cxcywh[-1].clone()
        if flip:
            true[..., 0] = 1 - true[..., 0]
        known = chosen[0] >= 0
        true = true.gather(1, chosen[0].clamp(min=0)[..., None].expand(-1, -1, 4))
        torch.testing.assert_close(told[known], true[known], rtol=1e-2, atol=5e-3)
    broken = stored[0] | {"sides_queries": (rows[0].sides_queries + 100).tobytes()}
    with pytest.raises(ValueError, match=r"sides of query 1\d\d of 10"):
        row_from(0, broken, sizes, precision)


PAIRS = [("conditional_detr", "d_fine"), ("deformable_detr", "d_fine"), ("rt_detr", "d_fine"), ("d_fine", "rt_detr")]


@pytest.mark.parametrize(("taught", "teacher"), [*PAIRS, ("d_fine", "conditional_detr"), ("d_fine", "d_fine")])
def test_it_runs_between_two_d_fine_and_says_of_any_other_pair_why_not(taught: str, teacher: str) -> None:
    levels = {"feature_levels": 1 if taught == "conditional_detr" else 2}
    tree = {"method": "localization", "selection": tiny.EASY_SELECTION}
    config = tiny.recipe({"family": taught, "queries": 12, **levels}, distillation=tree)
    if (taught, teacher) != ("d_fine", "d_fine"):
        wrong = ("student", taught) if taught != "d_fine" else ("teacher", teacher)
        with pytest.raises(QskdError, match=f"a {wrong[0]} of family {wrong[1]}, whose boxes are four numbers each"):
            tiny.make_training(config, tiny.random_teacher(teacher))
        return
    training = tiny.make_training(config, tiny.random_teacher(teacher))
    values = [training.train_step(tiny.batch_of(2, 0, 3))["ld_main"].item() for _ in range(8)]
    training.check_finite()
    assert 0 < values[-1] < values[0]


def test_a_worker_without_images_and_one_whose_images_have_no_kept_query_take_the_step_with_the_others() -> None:
    tree = {"method": "localization", "selection": tiny.EASY_SELECTION}
    config = tiny.recipe({"family": "d_fine", "queries": 12, "feature_levels": 2}, distillation=tree)
    teacher = tiny.random_teacher("d_fine")
    training = tiny.make_training(config, teacher)
    remembered = CachedTeacher(teacher.sizes(all_layers=False))
    for counts in ((1,), (0, 0)):
        batch = tiny.batch_of(*counts)
        record = remembered.blank(len(counts), torch.device("cpu"), training.module.method.needs)  # type: ignore[union-attr]
        if counts == (0, 0):  # as `collate` has it then
            none = {name: value[:, :0] for name, value in record.extra.items() if name != "sides_bins"}
            record = replace(record, extra=record.extra | none)
        terms = training.module(batch.images, batch.sizes, batch.targets, record)
        assert all(terms[name].total == 0 and terms[name].count == 0 for name in ("ld_main", "ld_region"))
        sum(terms[name].total for name in ("ld_main", "ld_region")).backward()  # attached to the graph


def test_a_cache_without_the_column_and_a_teacher_that_has_none_are_refused_by_name(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"distillation": {"method": "localization"}}
    with pytest.raises(QskdError, match=r"(?s)no column sides.*teacher\.cache\.columns=\[sides\]") as caught:
        check_enough(build(tree))
    assert "how the teacher's box sides are distributed" in str(caught.value)
    columns = {"columns": ["sides"]}
    check_enough(build(tree | {"teacher": {"cache": columns}}))
    low = {"distillation": {"method": "localization", "selection": {"boundaries": [0.1]}}}
    with pytest.raises(QskdError, match=r"(?s)GIoU 0\.3 or more: the cache holds the sides of queries"):
        check_enough(build(low | {"teacher": {"cache": columns}}))
    package = {"path": str(Path(__file__).parents[1] / "pipelines" / "assets" / "shapes_teacher")}
    for given in (tree | {"teacher": package}, {"teacher": package | {"cache": columns}}):  # before anything starts
        with pytest.raises(QskdError, match="a teacher of family deformable_detr, whose boxes are four numbers each"):
            check_columns(build(given))
    check_columns(build({"teacher": package}))
    DFineConfig().save_pretrained(tmp_path)
    check_columns(build(tree | {"teacher": {"path": str(tmp_path)}}))
    teacher, batch = tiny.random_teacher("conditional"), tiny.batch_of(1)
    with pytest.raises(QskdError, match="a teacher, whose boxes are four numbers each"):
        teacher.record(batch, NEEDS)
