"""DETRDistill against slow loops; its column of the cache; in shares of a batch, without objects, between families."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log, sqrt
from typing import Any

import pytest
import tiny
import torch
from reference import cheapest, corners, near, random_logits, sigmoid, slow_bce, slow_giou, slow_iou, slow_resample
from test_decoder_methods import lesson_of as asked_of
from test_decoder_methods import networks
from test_feature_methods import (
    BOTH,
    STUDENT,
    TEACHER,
    THEIRS,
    WIDTH,
    built,
    cells,
    extent,
    lesson_of,
    settings_of,
    share,
)
from torch import Tensor

from qskd.checks import check_enough
from qskd.config.recipe import build
from qskd.distillation.detrdistill import target_aware_masks
from qskd.distillation.method import Lesson, build_method
from qskd.distillation.qskd.pairing import Side, pair_globally
from qskd.distillation.qskd.query_selection import none_selected
from qskd.errors import QskdError
from qskd.losses.matching import assign
from qskd.structures import TeacherNeeds, to_device
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.states import MOST
from qskd.teacher.columns.table import ARRAYS, collate, columns_for, decode_batch, encode, largest_errors, row_from
from qskd.teacher.online import facts_of

COUNTS = [2, 0, 3]
OWN, OTHERS, CLASSES = 5, 6, 5  # queries: few enough to try all assignments
ALL = {"contrast_weight": 0.2}
NAMES = {"dd_class", "dd_l1", "dd_giou", "dd_features", "dd_contrast"}


def lesson(counts: list[int], student: Any = STUDENT, kept: int = 4) -> Lesson:
    """Two layers of the student, three of the teacher; a cache that keeps the states of `kept` queries."""
    given = lesson_of(student, TEACHER, counts)
    batch = len(counts)
    own = torch.stack([near(given.targets, OWN, seed=layer) for layer in range(2)])
    theirs = torch.stack([near(given.targets, OTHERS, seed=10 + layer) for layer in range(3)])
    states = random_logits(batch, OWN, WIDTH, seed=4)
    output = replace(
        given.student, logits=random_logits(2, batch, OWN, CLASSES, seed=1), boxes_cxcywh=own, query_states=states
    )
    queries = torch.stack(
        [torch.randperm(OTHERS, generator=torch.Generator().manual_seed(i))[:kept] for i in range(batch)]
    )
    queries = queries.sort(1).values
    queries[0, -1] = -1
    extra = {"states_queries": queries, "states": random_logits(batch, kept, THEIRS, seed=5)}
    logits = random_logits(3, batch, OTHERS, CLASSES, seed=2)
    record = replace(given.teacher, logits=logits, boxes_cxcywh=theirs, extra=extra)
    return replace(given, student=output, teacher=record)


def pair_terms(given: Lesson, layer: int, other: int, image: int, s: int, t: int) -> tuple[float, float, float]:
    """BCE, L1, 1 - GIoU."""
    goals = [sigmoid(z) for z in given.teacher.logits[other, image, t].tolist()]
    a, b = given.student.boxes_cxcywh[layer, image, s].tolist(), given.teacher.boxes_cxcywh[other, image, t].tolist()
    bce = slow_bce(given.student.logits[layer, image, s].tolist(), goals)
    return bce, sum(abs(x - y) for x, y in zip(a, b, strict=True)), 1 - slow_giou(corners(a), corners(b))


def test_every_layer_s_queries_meet_the_same_layer_s_by_the_cheapest_assignment_and_learn_what_it_costs() -> None:
    given, method = lesson(COUNTS), built(1, 2, method="detrdistill", prior_weight=0)
    terms = method(given)
    found = terms["dd_class"].total + 5 * terms["dd_l1"].total + 2 * terms["dd_giou"].total
    expected = 0.0
    for layer, other in ((0, 0), (1, 2)):
        for image in range(len(COUNTS)):
            costs = []
            for s in range(OWN):
                parts = [pair_terms(given, layer, other, image, s, t) for t in range(OTHERS)]
                costs.append([bce + 5 * l1 + 2 * apart for bce, l1, apart in parts])
            expected += cheapest(costs)  # the loss of a pair is what it costs, plus 2
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert terms["dd_l1"].count == len(COUNTS) * OWN  # pairs of a layer: values are summed over layers


def norm(values: list[float]) -> float:
    return sqrt(sum(value * value for value in values))


def slow_masks(given: Lesson, level: int, image: int) -> list[list[float]]:
    """psi on the teacher's own grid."""
    teacher, count = given.teacher, given.targets.counts[image]
    pairs = sorted(
        ((sigmoid(teacher.logits[-1, image, q, c].item()), q) for q in range(OTHERS) for c in range(CLASSES)),
        reverse=True,
    )[:100]
    height, width = extent(teacher.memory_valid[level][image])
    mask = [[0.0] * width for _ in range(height)]
    for place, query in enumerate(teacher.extra["states_queries"][image].tolist()):
        if query < 0:
            continue
        box = corners(teacher.boxes_cxcywh[-1, image, query].tolist())
        objects = given.targets.boxes_cxcywh[image, :count].tolist()
        best = max((slow_iou(box, corners(one)) for one in objects), default=0.0)
        state = teacher.extra["states"][image, place].tolist()
        for score in (score for score, q in pairs if q == query):
            for y in range(height):
                for x in range(width):
                    cell = teacher.memory[level][image, :, y, x].tolist()
                    product = sum(a * b for a, b in zip(state, cell, strict=True))
                    mask[y][x] += score * best * product / norm(state) / norm(cell)
    mask = [[max(value, 0.01) for value in row] for row in mask]
    most = max(map(max, mask))
    return [[value / most for value in row] for row in mask]


@pytest.mark.parametrize(("student", "pairs"), [(STUDENT, [(0, 1)]), (BOTH, [(0, 0), (1, 1)])], ids=["1", "2"])
def test_features_are_weighed_by_where_good_queries_point(student: Any, pairs: list[Any]) -> None:
    given, method = lesson(COUNTS, student), built(len(student), 2, method="detrdistill", prior_weight=0)
    masks, total = target_aware_masks(given.teacher, given.targets), 0.0
    for image in range(len(COUNTS)):
        for (own, other), (size, shown, goal) in zip(pairs, cells(method, given, pairs, image), strict=True):
            slow = slow_masks(given, other, image)
            source = (len(slow), len(slow[0]))
            torch.testing.assert_close(
                masks[other][image, : source[0], : source[1]], torch.tensor(slow), rtol=1e-4, atol=1e-5
            )
            grid = given.student.memory_valid[own].shape[1:]
            psi = slow_resample(torch.tensor([slow]), source, size, tuple(grid))[0].tolist()
            apart = [
                psi[y][x] ** 2 * (a[y][x] - b[y][x]) ** 2
                for a, b in zip(shown, goal, strict=True)
                for y in range(size[0])
                for x in range(size[1])
            ]
            total += sum(apart) / len(apart)
    term = method(given)["dd_features"]
    assert term.total.item() == pytest.approx(total, rel=3e-4)
    assert term.count == len(COUNTS)
    assert masks[0][1].unique().tolist() == [0.0, 1.0]  # no object: the floor is the maximum


def test_paired_queries_find_each_other_among_the_image_s_paired_ones() -> None:
    given: Any = lesson(COUNTS)
    method: Any = built(1, 2, method="detrdistill", prior_weight=0, **ALL)
    sides = [
        Side(
            said.logits[-1:].float(),
            said.boxes_cxcywh[-1:],
            none_selected(said.logits[-1:].shape[:-1], torch.device("cpu")),
        )
        for said in (given.student, given.teacher)
    ]
    partner, total, count = pair_globally(*sides)[0].tolist(), 0.0, 0

    def shown(layer: Any, state: Tensor) -> list[float]:
        z = method.head(layer(state)).tolist()
        return [value / norm(z) for value in z]

    for image in range(len(COUNTS)):
        kept = given.teacher.extra["states_queries"][image].tolist()
        pairs = {s: kept.index(t) for s, t in enumerate(partner[image]) if t >= 0 and t in kept}
        others = {a: shown(method.theirs, given.teacher.extra["states"][image, a]) for a in pairs.values()}
        for s, place in pairs.items():
            mine = shown(method.own, given.student.query_states[image, s])
            products = {a: sum(x * y for x, y in zip(mine, z, strict=True)) / 0.07 for a, z in others.items()}
            total += log(sum(map(exp, products.values()))) - products[place]
            count += 1
    term = method(given)["dd_contrast"]
    assert count > 5
    assert term.count == count
    assert term.total.item() == pytest.approx(total, rel=1e-4)
    term.total.backward()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_under_autocast_the_terms_are_float32_and_near_the_full_ones(precision: torch.dtype) -> None:
    given, method = lesson(COUNTS), built(1, 2, method="detrdistill", prior_weight=0, **ALL)
    whole = method(given)
    with torch.autocast("cpu", precision):
        half = method(given)
    for name, term in whole.items():
        assert half[name].total.dtype == torch.float32
        assert half[name].total.item() == pytest.approx(term.total.item(), rel=0.02), name


def test_shares_of_a_batch_sum_to_it_and_masks_wait_for_no_device() -> None:
    method, given = built(2, 2, method="detrdistill", prior_weight=0, **ALL), lesson([2, 0, 1], BOTH)
    parts = []
    for images in (slice(0, 2), slice(2, 3)):
        cut, own, theirs = share(given, images), given.student, given.teacher
        student = replace(cut.student, boxes_cxcywh=own.boxes_cxcywh[:, images], query_states=own.query_states[images])
        extra = {name: value[images] for name, value in theirs.extra.items()}
        record = replace(
            cut.teacher, logits=theirs.logits[:, images], boxes_cxcywh=theirs.boxes_cxcywh[:, images], extra=extra
        )
        parts.append(method(replace(cut, student=student, teacher=record)))
    whole = method(given)
    assert whole.keys() == method.weights.keys() == NAMES
    for name, term in whole.items():
        assert sum(part[name].total.item() for part in parts) == pytest.approx(term.total.item(), rel=1e-4), name
        assert sum(part[name].count.item() for part in parts) == term.count
    (psi, _) = target_aware_masks(*(to_device(each, "meta") for each in (given.teacher, given.targets)))
    assert psi.is_meta
    empty = method(lesson([0, 0, 0], BOTH))
    assert all(term.total.isfinite() for term in empty.values())


NEEDS = TeacherNeeds(memory=True, all_layers=True, columns=frozenset({"states"}))


@pytest.mark.parametrize(("precision", "most"), [("int8", 5e-3), ("float16", 1e-3), ("float32", 0.0)])
def test_the_column_gives_back_the_states_of_the_surest_queries(
    precision: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MOST == 100
    monkeypatch.setattr("qskd.teacher.columns.states.MOST", 4)
    teacher, batch = tiny.random_teacher("conditional"), tiny.batch_of(2, 0)
    record = teacher(batch.teacher_images, batch.teacher_sizes, NEEDS)
    sizes = teacher.sizes(all_layers=True)
    stored = [{name: getattr(row, name).tobytes() for name in ARRAYS if "attention" not in name and "sides" not in name}
              for row in encode(record, [1, 2], precision)]  # fmt: skip
    rows = [row_from(number, buffers, sizes, precision) for number, buffers in enumerate(stored)]
    arrays = collate(rows, sizes, columns_for(NEEDS))
    found = decode_batch({name: torch.from_numpy(value) for name, value in arrays.items()})
    sure = record.logits[-1].amax(-1)
    for image in range(2):
        assert found.extra["states_queries"][image].tolist() == sorted(sure[image].topk(4).indices.tolist())
    assert largest_errors(found, record)["states_relative"] <= most
    with pytest.raises(ValueError, match=r"states of query 1\d\d of 10"):
        row_from(0, stored[0] | {"states_queries": (rows[0].states_queries + 100).tobytes()}, sizes, precision)


@pytest.mark.parametrize(("taught", "teacher"), [("conditional_detr", "d_fine"), ("rt_detr", "deformable_detr")])
def test_it_runs_between_families(taught: str, teacher: str) -> None:
    levels = {"feature_levels": 1 if taught == "conditional_detr" else 2}
    tree = {"method": "detrdistill", "prior_weight": 0, **ALL}
    config = tiny.recipe({"family": taught, "queries": 12, **levels}, distillation=tree)
    training = tiny.make_training(config, tiny.random_teacher(teacher))
    assert training.train_step(tiny.batch_of(2, 0)).keys() >= NAMES
    training.check_finite()


def test_a_worker_without_images_takes_the_step_with_the_others() -> None:
    teacher = tiny.random_teacher("refined")
    training = tiny.make_training(
        tiny.recipe(None, distillation={"method": "detrdistill", "prior_weight": 0, **ALL}), teacher
    )
    batch = tiny.batch_of(0)
    needs = training.module.method.needs  # type: ignore[union-attr]
    record = CachedTeacher(teacher.sizes(all_layers=True)).blank(1, torch.device("cpu"), needs)
    terms = training.module(batch.images, batch.sizes, batch.targets, record)
    sum(terms[name].total for name in NAMES).backward()
    assert training.module.method is not None
    assert all(each.grad is not None and each.grad.isfinite().all() for each in training.module.method.parameters())


def test_what_a_cache_lacks_is_refused_by_name() -> None:
    tree: dict[str, Any] = {"distillation": {"method": "detrdistill", "prior_weight": 0}}
    layers = {"all_layers": True}
    with pytest.raises(QskdError, match=r"(?s)no column states.*teacher\.cache\.columns=\[states\]"):
        check_enough(build(tree | {"teacher": {"cache": layers}}))
    with pytest.raises(QskdError, match=r"(?s)layer k learns from.*teacher\.cache\.all_layers=true"):
        check_enough(build(tree | {"teacher": {"cache": {"columns": ["states"]}}}))
    check_enough(build(tree | {"teacher": {"cache": layers | {"columns": ["states"]}}}))
    check_enough(
        build(
            {
                "distillation": {"method": "detrdistill", "feature_weight": 0, "prior_weight": 0},
                "teacher": {"cache": layers},
            }
        )
    )


def slow_focal(logit: float, is_it: bool) -> float:
    p = sigmoid(logit)
    return -0.25 * (1 - p) ** 2 * log(p) if is_it else -0.75 * p**2 * log(1 - p)


@pytest.mark.parametrize("family", ["conditional", "refined"])
def test_the_teacher_s_queries_learn_in_the_student_what_the_teacher_found_with_them(family: str) -> None:
    student, teacher = networks(family, family)
    torch.manual_seed(0)
    settings = settings_of(method="detrdistill", feature_weight=0, class_weight=0, l1_weight=0, giou_weight=0)
    method: Any = build_method(settings, facts_of(student, teacher.resize), teacher.facts)
    assert method.needs == TeacherNeeds(memory=True, decoder=True)
    totals = []
    for images in (slice(None), slice(0, 2), slice(2, 3)):
        given = asked_of(student, teacher, images)
        record = teacher(*(getattr(tiny.batch_of(2, 0, 1), name)[images] for name in ("images", "sizes")), method.needs)
        given = replace(given, teacher=record)
        assert given.decoder is not None
        assert given.ask_student is not None
        answer = given.decoder.ask(record)
        said = given.ask_student(method.asked(answer.decoded.queries))
        layers = (answer.output.logits, answer.output.boxes_cxcywh)
        (theirs,) = assign([layers], given.targets, build({}).detection)
        (term,) = method(given).values()
        assert term.count == sum(given.targets.counts)
        total = 0.0
        for layer, other in ((0, 0), (1, 2)):  # of two and of three
            for image, count in enumerate(given.targets.counts):
                owner = {int(theirs[other, image, slot]): slot for slot in range(count)}
                for query in range(said.logits.shape[2]):
                    slot = owner.get(query)
                    label = -1 if slot is None else int(given.targets.labels[image, slot])
                    logits = said.logits[layer, image, query].tolist()
                    total += 2 * sum(slow_focal(z, kind == label) for kind, z in enumerate(logits))
                    if slot is not None:
                        a = said.boxes_cxcywh[layer, image, query].tolist()
                        b = given.targets.boxes_cxcywh[image, slot].tolist()
                        total += 5 * sum(abs(x - y) for x, y in zip(a, b, strict=True))
                        total += 2 * (1 - slow_giou(corners(a), corners(b)))
        assert term.total.item() == pytest.approx(total, rel=1e-4)
        totals.append(term.total.item())
    assert totals[0] == pytest.approx(sum(totals[1:]), rel=1e-4)
    term.total.backward()
    assert method.asked.adapter.weight.grad.abs().sum() > 0


def test_networks_that_cannot_be_asked_the_same_are_refused_with_what_leaves_the_term_out() -> None:
    student, teacher = networks("conditional", "refined")
    with pytest.raises(QskdError, match=r"(?s)distillation\.prior_weight.*prior_weight: 0"):
        build_method(settings_of(method="detrdistill"), facts_of(student, teacher.resize), teacher.facts)
