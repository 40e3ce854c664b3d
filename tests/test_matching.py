"""The matcher against transformers' own, and at the edges: no objects, one query, more objects than queries, NaN."""

from __future__ import annotations

import pytest
import torch
from reference import make_targets, near, random_boxes, random_logits, transformers_labels
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

from qskd.config import DetectionLossConfig
from qskd.losses import matching
from qskd.losses.matching import assign
from qskd.structures import Targets

CONFIG = DetectionLossConfig()


def transformers_assignment(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """[L, B, Q, K], [L, B, Q, 4] -> [L, B, M], by transformers' matcher, layer after layer."""
    matcher = DeformableDetrHungarianMatcher(2.0, 5.0, 2.0)
    labels = transformers_labels(targets)
    result = torch.full((len(logits), *targets.valid.shape), -1)
    for layer in range(len(logits)):
        for image, (query, taken) in enumerate(matcher({"logits": logits[layer], "pred_boxes": boxes[layer]}, labels)):
            result[layer, image, taken] = query
    return result


@pytest.mark.parametrize(
    ("counts", "queries"),
    [([3, 0, 7, 1], 20), ([1], 1), ([0, 4], 1), ([6, 2], 3), ([5, 5], 5), ([2, 3, 2], 300), ([30, 1, 0, 2], 40)],
)
def test_equals_transformers(counts: list[int], queries: int) -> None:
    targets = make_targets(counts)
    logits = random_logits(3, len(counts), queries, 5)
    boxes = torch.stack([near(targets, queries, seed=layer) for layer in range(3)])
    (result,) = assign([(logits, boxes)], targets, CONFIG)
    assert result.dtype == torch.int64
    assert torch.equal(result, transformers_assignment(logits, boxes, targets))


def test_identical_boxes_and_scores_fall_as_in_transformers() -> None:
    targets = make_targets([3, 2], classes=1)
    logits, boxes = torch.zeros(1, 2, 8, 1), random_boxes(1, 2, 1).expand(-1, -1, 8, -1).contiguous()
    (result,) = assign([(logits, boxes)], targets, CONFIG)
    assert torch.equal(result, transformers_assignment(logits, boxes, targets))


def test_several_networks_at_once_equal_each_alone() -> None:
    targets = make_targets([2, 0, 5])
    student = random_logits(4, 3, 12, 5, seed=1), random_boxes(4, 3, 12, seed=2)
    teacher = random_logits(1, 3, 30, 5, seed=3), random_boxes(1, 3, 30, seed=4)
    together = assign([student, teacher], targets, CONFIG)
    assert [tuple(part.shape) for part in together] == [(4, 3, 5), (1, 3, 5)]
    for network, part in zip((student, teacher), together, strict=True):
        assert torch.equal(part, assign([network], targets, CONFIG)[0])


@pytest.mark.parametrize("slots", [0, 3])
def test_a_batch_without_objects_solves_nothing(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "linear_sum_assignment", None)
    targets = make_targets([0, 0], slots=slots)
    (result,) = assign([(random_logits(2, 2, 6, 5), random_boxes(2, 2, 6))], targets, CONFIG)
    assert result.shape == (2, 2, slots)
    assert (result == -1).all()


def test_extra_padding_changes_nothing() -> None:
    logits, boxes = random_logits(2, 2, 9, 5), random_boxes(2, 2, 9)
    tight, wide = make_targets([4, 2]), make_targets([4, 2])
    wide = Targets(
        torch.nn.functional.pad(wide.boxes_cxcywh, (0, 0, 0, 3)),
        torch.nn.functional.pad(wide.labels, (0, 3)),
        torch.nn.functional.pad(wide.valid, (0, 3)),
        wide.image_ids,
        wide.counts,
    )
    (a,), (b,) = assign([(logits, boxes)], tight, CONFIG), assign([(logits, boxes)], wide, CONFIG)
    assert torch.equal(b, torch.nn.functional.pad(a, (0, 3), value=-1))


def test_non_finite_predictions_are_chosen_last() -> None:
    targets = make_targets([3])
    logits, boxes = random_logits(1, 1, 6, 5), near(targets, 6)[None]
    logits[0, 0, 1], boxes[0, 0, 4] = float("nan"), float("inf")
    (result,) = assign([(logits, boxes)], targets, CONFIG)
    assert not set(result.flatten().tolist()) & {1, 4}
    (result,) = assign([(logits * float("nan"), boxes)], targets, CONFIG)
    assert (result >= 0).all()


def test_half_precision_equals_its_float32_values() -> None:
    targets = make_targets([4, 1])
    logits, boxes = random_logits(2, 2, 15, 5).bfloat16(), random_boxes(2, 2, 15).bfloat16()
    (half,) = assign([(logits, boxes)], targets, CONFIG)
    (full,) = assign([(logits.float(), boxes.float())], targets, CONFIG)
    assert torch.equal(half, full)


def test_costs_come_from_the_configuration() -> None:
    targets = make_targets([1], classes=2)
    logits = torch.full((1, 1, 2, 2), -4.0)
    logits[0, 0, 0, targets.labels[0, 0]] = 4.0  # query 0 knows the class, query 1 the place
    boxes = torch.stack([torch.tensor([0.9, 0.9, 0.1, 0.1]), targets.boxes_cxcywh[0, 0]])[None, None]
    by_class = DetectionLossConfig(l1_cost=0, giou_cost=0)
    by_place = DetectionLossConfig(class_cost=0)
    assert assign([(logits, boxes)], targets, by_class)[0].item() == 0
    assert assign([(logits, boxes)], targets, by_place)[0].item() == 1
