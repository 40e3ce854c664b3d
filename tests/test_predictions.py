"""LAPD against the loops, its two pairings, and QSKD as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import (
    cheapest,
    entropy,
    make_targets,
    near,
    random_logits,
    sigmoid,
    slow_bce,
    slow_pairs,
    slow_selection,
    slow_terms,
)
from torch import Tensor

from qskd.config import DetectionLossConfig
from qskd.config.distillation import NoMethod
from qskd.distillation.method import Facts, Lesson, build_method
from qskd.distillation.qskd.lapd import teacher_layer_of_student
from qskd.distillation.qskd.method import QSKD
from qskd.distillation.qskd.pairing import Side, pair_by_assignment, pair_by_index, pair_globally
from qskd.distillation.qskd.query_selection import select_queries
from qskd.distillation.qskd.settings import (
    FeatureDistillationConfig,
    PredictionDistillationConfig,
    QuerySelectionConfig,
    Settings,
)
from qskd.errors import QskdError
from qskd.losses.detection_loss import combine
from qskd.losses.matching import assign
from qskd.structures import DetectorOutput, LossTerm, Targets, TeacherRecord

CLASSES = 4

FACTS = Facts((8,))


def network(targets: Targets, layers: int, queries: int, seed: int) -> tuple[Tensor, Tensor]:
    logits = random_logits(layers, len(targets.counts), queries, CLASSES, seed=seed)
    return logits, torch.stack([near(targets, queries, seed=seed + layer) for layer in range(layers)])


def attend_never(_: Tensor) -> tuple[Tensor, ...]:
    raise AssertionError("a loss must not ask the student for attention")


def output(logits: Tensor, boxes: Tensor, width: int = 8, side: int = 5) -> DetectorOutput:
    batch = logits.shape[1]
    memory = torch.randn(batch, width, side, side, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(batch, side, side, dtype=torch.bool)
    states = torch.zeros(batch, logits.shape[2], width)
    return DetectorOutput(logits, boxes, (memory,), (valid,), (memory,), states, attend_never, attend_never)


def record(logits: Tensor, boxes: Tensor, width: int = 8, side: int = 5) -> TeacherRecord:
    batch, queries = logits.shape[1:3]
    g = torch.Generator().manual_seed(1)
    memory = torch.randn(batch, width, side, side, generator=g)
    attention = torch.rand(batch, queries, side * side, generator=g).softmax(-1).unflatten(-1, (side, side))
    every = torch.arange(queries).expand(batch, queries)
    valid = torch.ones(batch, side, side, dtype=torch.bool)
    return TeacherRecord(logits, boxes, (memory,), (valid,), every, (attention,))


def run(
    config: Settings, targets: Targets, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]
) -> dict[str, LossTerm]:
    method = build_method(config, FACTS, FACTS)
    assert method is not None
    ours, theirs = assign([student, teacher], targets, DetectionLossConfig())
    return method(Lesson(output(*student), record(*teacher), targets, ours, theirs))


def only_predictions(selection: QuerySelectionConfig | None = None, **values: Any) -> Settings:
    return Settings(
        selection=selection or QuerySelectionConfig(boundaries=(0.3,), max_per_object=3),
        features=FeatureDistillationConfig(weight=0),
        predictions=PredictionDistillationConfig(**values),
    )


@pytest.mark.parametrize("pair_weight", ["confidence", "uniform"])
@pytest.mark.parametrize("limit", [0, 2, 10])
@pytest.mark.parametrize(
    ("counts", "student_queries", "teacher_queries"),
    [([3, 0, 5], 14, 20), ([2, 1], 30, 9), ([4], 2, 8), ([4], 8, 2), ([1, 1], 1, 1), ([0], 3, 3)],
)
@pytest.mark.parametrize("layers", ["all", "last", "same_index"])
@pytest.mark.parametrize(("divide_by", "class_gamma"), [("pairs", 0.0), ("weights", 1.5)])
def test_equals_the_loops(
    counts: list[int],
    student_queries: int,
    teacher_queries: int,
    limit: int,
    pair_weight: Any,
    layers: str,
    divide_by: Any,
    class_gamma: float,
) -> None:
    targets = make_targets(counts, classes=CLASSES, slots=max(counts) + 1)
    student, teacher = network(targets, 3, student_queries, 1), network(targets, 2, teacher_queries, 20)
    config = only_predictions(
        QuerySelectionConfig(boundaries=(0.2, 0.6), band_weights=(0, 0.5, 1), max_per_object=limit),
        pair_weight=pair_weight,
        divide_by=divide_by,
        class_gamma=class_gamma,
        student_layers="last" if layers == "last" else "all",
        teacher_layers="same_index" if layers == "same_index" else "last",
    )
    terms = run(config, targets, student, teacher)
    ours, theirs = assign([student, teacher], targets, DetectionLossConfig())
    mapped = {"all": [(0, 1), (1, 1), (2, 1)], "last": [(2, 1)], "same_index": [(0, 0), (1, 0), (2, 1)]}[layers]
    expected, pairs_seen = {"lapd_class": 0.0, "lapd_l1": 0.0, "lapd_giou": 0.0, "weights": 0.0}, 0
    for mine, their in mapped:
        selections = [
            slow_selection(boxes[layer], targets, assignment[layer], config.selection)
            for boxes, assignment, layer in ((student[1], ours, mine), (teacher[1], theirs, their))
        ]
        for image, count in enumerate(counts):
            pairs = slow_pairs(selections[0], selections[1], image, count)
            pairs_seen += len(pairs)
            sums = slow_terms(
                pairs,
                (student[0][mine, image], student[1][mine, image]),
                (teacher[0][their, image], teacher[1][their, image]),
                selections[1]["weight"][image],
                config.predictions,
            )
            expected = {name: expected[name] + sums[name] for name in sums}
    weights_seen = expected.pop("weights")
    divisor = weights_seen if divide_by == "weights" else pairs_seen
    assert set(terms) == set(expected)
    for name, term in terms.items():
        assert term.total.item() == pytest.approx(expected[name], rel=1e-4, abs=1e-5)
        assert term.count.item() == pytest.approx(divisor / len(mapped), rel=1e-4)


@pytest.mark.parametrize("kept", [1, 2, CLASSES])
def test_a_dropped_class_is_not_learnt_and_all_others_are_as_by_the_loops(kept: int) -> None:
    targets = make_targets([3, 2], classes=CLASSES)
    (mine, boxes), teacher = network(targets, 1, 12, 3), network(targets, 1, 12, 4)
    said = teacher[0] - 3.0  # most classes are unlikely
    mine.requires_grad_()
    config = only_predictions(kept_classes=kept)
    term = run(config, targets, (mine, boxes), (said, teacher[1]))["lapd_class"]
    ours, theirs = assign([(mine, boxes), (said, teacher[1])], targets, DetectionLossConfig())
    expected = 0.0
    for image, count in enumerate(targets.counts):
        sides = [
            slow_selection(b[0], targets, a[0], config.selection) for b, a in ((boxes, ours), (teacher[1], theirs))
        ]
        pairs = slow_pairs(sides[0], sides[1], image, count)
        own, other = (mine[0, image].detach(), boxes[0, image]), (said[0, image], teacher[1][0, image])
        expected += slow_terms(pairs, own, other, sides[1]["weight"][image], config.predictions)["lapd_class"]
    assert term.total.item() == pytest.approx(expected, rel=1e-4)
    term.total.backward()
    assert mine.grad is not None
    learnt = mine.grad[0].abs() > 0
    paired = learnt.any(-1)
    assert paired.any()
    assert int((~learnt & paired[..., None]).sum()) > 0 if kept < CLASSES else bool(learnt[paired].all())


def test_equal_predictions_give_no_box_loss_and_the_classes_own_entropy() -> None:
    targets = make_targets([3, 2], classes=CLASSES)
    logits, boxes = network(targets, 1, 12, 3)
    terms = run(only_predictions(pair_weight="uniform"), targets, (logits, boxes), (logits, boxes))
    assert terms["lapd_l1"].total == 0
    assert terms["lapd_giou"].total.item() == pytest.approx(0, abs=1e-5)
    (assignment,) = assign([(logits, boxes)], targets, DetectionLossConfig())
    kept = select_queries(boxes, targets, assignment, only_predictions().selection).weight > 0
    assert terms["lapd_class"].count == kept.sum()
    expected = sum(entropy(sigmoid(x)) for x in logits[kept].flatten().tolist())
    assert terms["lapd_class"].total.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_gradients_are_finite_where_student_and_teacher_agree(gamma: float) -> None:
    targets = make_targets([3, 2], classes=CLASSES)
    logits, boxes = network(targets, 1, 12, 3)
    mine = logits.clone().requires_grad_()
    run(only_predictions(class_gamma=gamma), targets, (mine, boxes), (logits, boxes))["lapd_class"].total.backward()
    assert mine.grad is not None
    assert mine.grad.isfinite().all()


@pytest.mark.parametrize("pairing", ["rank", "hungarian"])
@pytest.mark.parametrize("slots", [0, 2])
def test_without_objects_the_terms_are_zero_and_attached(slots: int, pairing: Any) -> None:
    targets = make_targets([0, 0], slots=slots)
    logits, boxes = network(targets, 2, 6, 1)
    logits.requires_grad_(), boxes.requires_grad_()
    config = Settings(predictions=PredictionDistillationConfig(pairing=pairing))
    method = build_method(config, FACTS, FACTS)
    assert method is not None
    student, teacher = output(logits, boxes), record(*network(targets, 1, 7, 9))
    ours, theirs = assign([(logits, boxes), (teacher.logits, teacher.boxes_cxcywh)], targets, DetectionLossConfig())
    terms = method(Lesson(student, teacher, targets, ours, theirs))
    assert set(terms) == set(method.weights) == {"agfd", "lapd_class", "lapd_l1", "lapd_giou"}
    total = combine(terms, method.weights)
    assert total == 0
    total.backward()
    for leaf in (logits, boxes, *method.parameters()):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("pairing", ["rank", "hungarian"])
def test_only_the_student_gets_a_gradient(pairing: Any) -> None:
    targets = make_targets([3, 1], classes=CLASSES)
    student, teacher = network(targets, 2, 10, 1), network(targets, 1, 12, 7)
    for leaf in (*student, *teacher):
        leaf.requires_grad_()
    terms = run(only_predictions(pairing=pairing), targets, student, teacher)
    sum(term.total for term in terms.values()).backward()  # type: ignore[union-attr]
    for leaf in student:
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
        assert leaf.grad.abs().sum() > 0
    assert teacher[0].grad is None
    assert teacher[1].grad is None


def test_hungarian_pairs_each_groups_hard_negatives_at_the_least_cost() -> None:
    targets = make_targets([3, 0, 2], classes=CLASSES, slots=4)
    selection_config = QuerySelectionConfig(boundaries=(0.2,), max_per_object=4)
    networks = [network(targets, 2, 20, 1), network(targets, 2, 25, 50)]
    assignments = assign(networks, targets, DetectionLossConfig())
    sides = [
        Side(logits, boxes, select_queries(boxes, targets, assignment, selection_config))
        for (logits, boxes), assignment in zip(networks, assignments, strict=True)
    ]
    partner = pair_by_assignment(sides[0], sides[1], 4, 5)
    solved = 0
    for layer in range(2):
        for image in range(3):
            mine = {q: int(t) for q, t in enumerate(partner[layer, image].tolist()) if t >= 0}
            assert len(set(mine.values())) == len(mine)
            for group in range(targets.counts[image]):
                members = []
                for side in sides:
                    s = side.selection
                    hard = (s.object_of_query == group) & (s.weight > 0) & ~s.is_positive
                    members.append(hard[layer, image].nonzero().flatten().tolist())
                pairs = {q: mine[q] for q in members[0] if q in mine}
                assert len(pairs) == min(map(len, members))
                assert set(pairs.values()) <= set(members[1])
                positives = [a[layer, image, group].item() for a in assignments]
                assert mine[int(positives[0])] == positives[1]
                if not pairs:
                    continue
                cost = [[pair_cost(sides, layer, image, q, t) for t in members[1]] for q in members[0]]
                paid = sum(pair_cost(sides, layer, image, q, t) for q, t in pairs.items())
                assert paid == pytest.approx(cheapest(cost), rel=1e-4)
                solved += len(pairs) > 1
    assert solved > 3


@pytest.mark.parametrize(("student_queries", "teacher_queries"), [(5, 7), (7, 5), (6, 6)])
def test_the_global_pairing_is_the_cheapest_of_the_whole_image(student_queries: int, teacher_queries: int) -> None:
    targets = make_targets([3, 0], classes=CLASSES, slots=3)
    networks = [network(targets, 2, student_queries, 1), network(targets, 2, teacher_queries, 50)]
    nothing = [select_queries(n[1], targets, torch.full((2, 2, 3), -1), QuerySelectionConfig()) for n in networks]
    sides = [Side(*n, s) for n, s in zip(networks, nothing, strict=True)]
    partner = pair_globally(*sides)
    for layer in range(2):
        for image in range(2):
            pairs = {q: t for q, t in enumerate(partner[layer, image].tolist()) if t >= 0}
            assert len(pairs) == len(set(pairs.values())) == min(student_queries, teacher_queries)
            cost = [
                [pair_cost(sides, layer, image, q, t, 1) for t in range(teacher_queries)]
                for q in range(student_queries)
            ]
            paid = sum(pair_cost(sides, layer, image, q, t, 1) for q, t in pairs.items())
            assert paid == pytest.approx(cheapest(cost), rel=1e-4)


def test_the_index_pairing_joins_the_teachers_kept_queries_with_their_namesakes() -> None:
    targets = make_targets([2, 3], classes=CLASSES, slots=3)
    student, teacher = network(targets, 2, 9, 1), network(targets, 2, 9, 20)
    assignments = assign([student, teacher], targets, DetectionLossConfig())
    config = QuerySelectionConfig(boundaries=(0.2,), max_per_object=2)
    sides = [
        Side(*side, select_queries(side[1], targets, assignment, config))
        for side, assignment in zip((student, teacher), assignments, strict=True)
    ]
    partner = pair_by_index(*sides)
    kept = sides[1].selection.weight > 0
    assert kept.any()
    assert torch.equal(partner >= 0, kept)
    assert torch.equal(partner[kept], torch.arange(9).expand(2, 2, 9)[kept])
    with pytest.raises(QskdError, match=r"student\.queries: 9"):
        run(only_predictions(pairing="index"), targets, network(targets, 2, 8, 1), teacher)


def test_the_global_pairing_teaches_through_every_query_whatever_the_selection() -> None:
    targets = make_targets([2], classes=CLASSES)
    student, teacher = network(targets, 1, 6, 1), network(targets, 1, 6, 20)
    none = QuerySelectionConfig(band_weights=(0, 0), positive_weight=0)
    config = only_predictions(none, pairing="global", pair_weight="uniform")
    terms = run(config, targets, student, teacher)
    assert terms["lapd_l1"].count == 6
    assert terms["lapd_l1"].total > 0
    assert run(only_predictions(none, pair_weight="uniform"), targets, student, teacher)["lapd_l1"].total == 0


def pair_cost(sides: list[Side], layer: int, image: int, q: int, t: int, class_cost: float = 2) -> float:
    """class_cost * BCE + 5 * L1 - 2 * GIoU, by the loops."""
    uniform = PredictionDistillationConfig(pair_weight="uniform")
    ours, theirs = [(side.logits[layer, image], side.boxes_cxcywh[layer, image]) for side in sides]
    terms = slow_terms([(q, t)], ours, theirs, [1.0] * len(theirs[0]), uniform)
    bce = slow_bce(ours[0][q].tolist(), [sigmoid(x) for x in theirs[0][t].tolist()])
    assert terms["lapd_class"] == pytest.approx(bce)
    return class_cost * bce + 5 * terms["lapd_l1"] + 2 * terms["lapd_giou"] - 2


def test_half_precision_gives_float32_terms_near_the_full_ones() -> None:
    targets = make_targets([3, 2], classes=CLASSES)
    student, teacher = network(targets, 2, 12, 1), network(targets, 1, 12, 8)
    half = [(a.bfloat16(), b.bfloat16()) for a, b in (student, teacher)]
    full = [(a.float(), b.float()) for a, b in half]
    a, b = run(Settings(), targets, *half), run(Settings(), targets, *full)
    for name, term in a.items():
        assert term.total.dtype == torch.float32
        torch.testing.assert_close(term.total, b[name].total)


def test_teacher_layers() -> None:
    def layers(count: int, teacher: int, **values: Any) -> tuple[list[int], list[int]]:
        return teacher_layer_of_student(count, teacher, PredictionDistillationConfig(**values))

    assert layers(3, 6) == ([0, 1, 2], [5, 5, 5])
    assert layers(3, 6, student_layers="last") == ([2], [5])
    assert layers(6, 6, teacher_layers="same_index")[1] == [0, 1, 2, 3, 4, 5]
    assert layers(3, 6, teacher_layers="same_index")[1] == [0, 2, 5]
    assert layers(1, 6, teacher_layers="same_index")[1] == [5]
    assert layers(6, 3, teacher_layers="same_index")[1] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(QskdError, match="one decoder layer"):
        layers(6, 1, teacher_layers="same_index")


def test_side_layers_repeat_and_pick() -> None:
    targets = make_targets([2, 1], classes=CLASSES)
    logits, boxes = network(targets, 4, 6, 0)
    (assignment,) = assign([(logits, boxes)], targets, DetectionLossConfig())
    side = Side(logits, boxes, select_queries(boxes, targets, assignment, QuerySelectionConfig()))
    for indices in ([3, 3, 3], [1, 2], [0, 0, 2, 3], [2]):
        picked = side.layers(indices)
        assert torch.equal(picked.logits, logits[indices])
        assert torch.equal(picked.selection.weight, side.selection.weight[indices])


def test_needs_and_weights_follow_the_configuration() -> None:
    method = QSKD(Settings(), FACTS, FACTS)
    assert (method.needs.memory, method.needs.attention, method.needs.all_layers) == (True, True, False)
    assert method.needs.attention_giou_floor == 0.5
    assert method.weights == {"agfd": 50.0, "lapd_class": 1.0, "lapd_l1": 5.0, "lapd_giou": 2.0}
    uniform = QSKD(Settings(features=FeatureDistillationConfig(background=1.0)), FACTS, FACTS)
    assert (uniform.needs.memory, uniform.needs.attention) == (True, False)
    local = QSKD(only_predictions(teacher_layers="same_index", weight=0.5), FACTS, FACTS)
    assert (local.needs.memory, local.needs.attention, local.needs.all_layers) == (False, False, True)
    assert local.weights == {"lapd_class": 0.5, "lapd_l1": 2.5, "lapd_giou": 1.0}
    assert not list(local.parameters())
    assert build_method(NoMethod(), FACTS, FACTS) is None


def test_a_part_of_weight_zero_is_left_out() -> None:
    targets = make_targets([2], classes=CLASSES)
    student, teacher = network(targets, 2, 6, 0), network(targets, 1, 6, 1)
    config = Settings(predictions=PredictionDistillationConfig(weight=0))
    assert set(run(config, targets, student, teacher)) == {"agfd"}
    assert set(run(only_predictions(), targets, student, teacher)) == {"lapd_class", "lapd_l1", "lapd_giou"}


def test_a_record_with_more_layers_than_needed_changes_nothing() -> None:
    targets = make_targets([2, 3], classes=CLASSES)
    student, (logits, boxes) = network(targets, 2, 8, 0), network(targets, 3, 9, 4)
    many = run(Settings(), targets, student, (logits, boxes))
    one = run(Settings(), targets, student, (logits[-1:], boxes[-1:]))
    for name in many:
        torch.testing.assert_close(many[name].total, one[name].total)
