"""The detection loss against transformers' own, values and gradients, and at the edges."""

from __future__ import annotations

import pytest
import torch
from reference import make_targets, near, random_logits, transformers_labels
from torch import Tensor

from benchmarks.detection_loss import transformers_loss
from qskd.config import DetectionLossConfig
from qskd.errors import QskdError
from qskd.families.detr import from_softmax
from qskd.losses.detection_loss import combine, detection_terms, detection_weights
from qskd.losses.matching import assign
from qskd.structures import LossTerm, Targets

RENAMED = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}


def ours(
    logits: Tensor, boxes: Tensor, targets: Targets, config: DetectionLossConfig
) -> tuple[Tensor, dict[str, LossTerm]]:
    (assignment,) = assign([(logits, boxes)], targets, config)
    terms = detection_terms(logits, boxes, targets, assignment, config)
    return combine(terms, detection_weights(len(logits), config)), terms


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize(
    ("counts", "queries"), [([3, 0, 7, 1], 20), ([0, 0], 6), ([1], 1), ([6, 2], 3), ([9, 1, 4], 50)]
)
def test_values_and_gradients_equal_transformers(counts: list[int], queries: int, auxiliary: bool) -> None:
    config = DetectionLossConfig(auxiliary=auxiliary)
    targets = make_targets(counts)
    leaves = []
    for _ in range(2):
        logits = random_logits(3, len(counts), queries, 5).requires_grad_()
        boxes = torch.stack([near(targets, queries, seed=layer) for layer in range(3)]).requires_grad_()
        leaves.append((logits, boxes))
    total, terms = ours(*leaves[0], targets, config)
    expected_total, expected = transformers_loss(transformers_labels(targets), *leaves[1], config)
    assert len(terms) == 3 * (3 if auxiliary else 1)
    for name, term in terms.items():
        kind, _, layer = name.partition("_")
        value = term.total / term.count.clamp(min=term.floor)
        torch.testing.assert_close(
            value, expected[RENAMED[kind] + (f"_{layer}" if layer else "")], rtol=1e-5, atol=1e-6
        )
        assert term.count == sum(counts)
    torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=1e-6)
    total.backward()
    expected_total.backward()
    for mine, theirs in zip(*leaves, strict=True):
        torch.testing.assert_close(mine.grad, torch.zeros_like(mine) if theirs.grad is None else theirs.grad)


@pytest.mark.parametrize("slots", [0, 2])
def test_without_objects_every_input_still_gets_a_finite_gradient(slots: int) -> None:
    targets = make_targets([0, 0], slots=slots)
    logits, boxes = random_logits(2, 2, 4, 3).requires_grad_(), random_logits(2, 2, 4, 4).requires_grad_()
    total, terms = ours(logits, boxes.sigmoid(), targets, DetectionLossConfig())
    assert all(term.total.requires_grad for term in terms.values())
    assert terms["l1"].total == terms["giou"].total == 0
    total.backward()
    assert logits.grad is not None
    assert boxes.grad is not None
    assert logits.grad.abs().sum() > 0
    assert torch.equal(boxes.grad, torch.zeros_like(boxes))


def test_focal_alpha_and_weights_come_from_the_configuration() -> None:
    targets = make_targets([2, 3])
    logits, boxes = random_logits(2, 2, 9, 5), torch.stack([near(targets, 9, seed=s) for s in range(2)])
    (assignment,) = assign([(logits, boxes)], targets, DetectionLossConfig())
    config = DetectionLossConfig(focal_alpha=0.6, class_weight=2.0)
    label = torch.zeros(2, 9, 5)
    for image, count in enumerate(targets.counts):
        for slot in range(count):
            label[image, assignment[-1, image, slot], targets.labels[image, slot]] = 1
    p = logits[-1].sigmoid()
    expected = -(label * 0.6 * (1 - p) ** 2 * p.log() + (1 - label) * 0.4 * p**2 * (1 - p).log()).sum()
    terms = detection_terms(logits, boxes, targets, assignment, config)
    torch.testing.assert_close(terms["class"].total, expected)
    assert detection_weights(2, config) == {
        "class_0": 2.0, "l1_0": 5.0, "giou_0": 2.0, "class": 2.0, "l1": 5.0, "giou": 2.0
    }  # fmt: skip


def test_extreme_logits_and_half_precision_stay_finite() -> None:
    targets = make_targets([2])
    logits = torch.tensor([60.0, -60.0, 0.0]).repeat(1, 1, 4, 1).bfloat16().requires_grad_()
    total, _ = ours(logits, near(targets, 4)[None].bfloat16(), make_targets([2], classes=3), DetectionLossConfig())
    total.backward()
    assert total.dtype == torch.float32
    assert torch.isfinite(total)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_combine_divides_by_the_given_mean_counts_and_by_no_less_than_the_floor() -> None:
    terms = {
        "a": LossTerm(torch.tensor(6.0), torch.tensor(2.0)),
        "b": LossTerm(torch.tensor(8.0), torch.tensor(0.0)),
    }
    weights = {"a": 1.0, "b": 0.5, "unused": 7.0}
    assert combine(terms, weights) == pytest.approx(3 + 4)
    assert combine(terms, weights, {"a": torch.tensor(3.0)}) == pytest.approx(2 + 4)


def test_combine_names_a_term_without_a_weight() -> None:
    with pytest.raises(QskdError, match="agfd"):
        combine({"agfd": LossTerm(torch.tensor(1.0), torch.tensor(1.0))}, {"class": 1.0})


@pytest.mark.parametrize("counts", [[3, 0, 4], [1]])  # transformers' can't take a batch without objects
def test_varifocal_equals_transformers_rt_detr_loss(counts: list[int]) -> None:
    """Early predictions included: transformers has the encoder's proposals last among its auxiliary outputs."""
    from transformers import RTDetrConfig
    from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

    targets = make_targets(counts)
    leaves = []
    for _ in range(2):
        logits = random_logits(4, len(counts), 20, 5).requires_grad_()
        boxes = torch.stack([near(targets, 20, seed=layer) for layer in range(4)]).requires_grad_()
        leaves.append((logits, boxes))
    (assignment,) = assign([leaves[0]], targets, DetectionLossConfig(), ["varifocal"])
    terms = detection_terms(*leaves[0], targets, assignment, DetectionLossConfig(), "varifocal", early=1)
    total = combine(terms, detection_weights(3, DetectionLossConfig(), early=1))
    assert [name for name in terms if name.startswith("class")] == ["class_early_0", "class_0", "class_1", "class"]
    logits, boxes = leaves[1]
    expected, said, _ = RTDetrForObjectDetectionLoss(
        logits[-1], transformers_labels(targets), "cpu", boxes[-1], RTDetrConfig(num_labels=5),
        outputs_class=logits[1:].transpose(0, 1), outputs_coord=boxes[1:].transpose(0, 1),
        enc_topk_logits=logits[0], enc_topk_bboxes=boxes[0],
    )  # fmt: skip
    for name, theirs in {"class": "loss_vfl", "class_0": "loss_vfl_aux_0", "class_early_0": "loss_vfl_aux_2"}.items():
        torch.testing.assert_close(terms[name].total / sum(counts), said[theirs], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    total.backward()
    expected.backward()
    for mine, other in zip(*leaves, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0], [25]])
def test_cross_entropy_equals_transformers_detr_loss(counts: list[int], auxiliary: bool) -> None:
    """Through the sigmoid's logits and the log-probability of no object, values and gradients of the softmax's own."""
    from transformers import DetrConfig
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    config = DetectionLossConfig(class_cost=1, auxiliary=auxiliary)
    targets = make_targets(counts)
    leaves = []
    for _ in range(2):
        logits = random_logits(3, len(counts), 20, 6).requires_grad_()
        boxes = torch.stack([near(targets, 20, seed=layer) for layer in range(3)]).requires_grad_()
        leaves.append((logits, boxes))
    made, no_object = from_softmax(leaves[0][0])
    (assignment,) = assign([(made, leaves[0][1])], targets, config, ["softmax"])
    terms = detection_terms(made, leaves[0][1], targets, assignment, config, "softmax", no_object=no_object)
    total = combine(terms, detection_weights(3, config))
    logits, boxes = leaves[1]
    expected, said, _ = ForObjectDetectionLoss(
        logits[-1], transformers_labels(targets), "cpu", boxes[-1],
        DetrConfig(num_labels=5, auxiliary_loss=auxiliary), outputs_class=logits, outputs_coord=boxes,
    )  # fmt: skip
    value = terms["class"].total / terms["class"].count
    torch.testing.assert_close(value, said["loss_ce"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    total.backward()
    expected.backward()
    for mine, other in zip(*leaves, strict=True):
        torch.testing.assert_close(
            mine.grad, torch.zeros_like(mine) if other.grad is None else other.grad, rtol=1e-4, atol=1e-6
        )
