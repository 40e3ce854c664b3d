"""Box formats, IoU and GIoU: against plain loops, against transformers, and at the edges."""

from __future__ import annotations

import pytest
import torch
from reference import random_boxes, slow_giou, slow_iou
from transformers.loss.loss_for_object_detection import generalized_box_iou

from qskd.boxes import cxcywh_to_xyxy, giou, iou, pairwise_giou, xyxy_to_cxcywh


def test_formats_are_each_others_inverse() -> None:
    boxes = random_boxes(3, 7)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)
    torch.testing.assert_close(cxcywh_to_xyxy(torch.tensor([4.0, 6.0, 2.0, 4.0])), torch.tensor([3.0, 4.0, 5.0, 8.0]))


def test_iou_and_giou_equal_the_loops() -> None:
    a, b = cxcywh_to_xyxy(random_boxes(40, seed=1)), cxcywh_to_xyxy(random_boxes(40, seed=2))
    rows = list(zip(a.tolist(), b.tolist(), strict=True))
    torch.testing.assert_close(iou(a, b), torch.tensor([slow_iou(*row) for row in rows]))
    torch.testing.assert_close(giou(a, b), torch.tensor([slow_giou(*row) for row in rows]))


def test_pairwise_giou_equals_transformers() -> None:
    a, b = cxcywh_to_xyxy(random_boxes(30, seed=1)), cxcywh_to_xyxy(random_boxes(9, seed=2))
    torch.testing.assert_close(pairwise_giou(a, b), generalized_box_iou(a, b))


def test_giou_is_one_for_equal_boxes_and_negative_for_distant_ones() -> None:
    a = torch.tensor([[0.0, 0.0, 0.1, 0.1]])
    assert giou(a, a).item() == pytest.approx(1)
    assert giou(a, torch.tensor([[0.9, 0.9, 1.0, 1.0]])).item() == pytest.approx(-0.98)


@pytest.mark.parametrize("other", [[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.2, 0.0], [0.2, 0.2, 0.1, 0.1]])
def test_an_empty_box_gives_finite_values_and_gradients(other: list[float]) -> None:
    empty = torch.tensor([0.5, 0.5, 0.0, 0.0], requires_grad=True)
    value = giou(cxcywh_to_xyxy(empty), cxcywh_to_xyxy(torch.tensor(other)))
    value.backward()
    assert torch.isfinite(value)
    assert empty.grad is not None
    assert torch.isfinite(empty.grad).all()


def test_half_precision_is_computed_in_float32() -> None:
    a, b = cxcywh_to_xyxy(random_boxes(8, seed=1)).bfloat16(), cxcywh_to_xyxy(random_boxes(8, seed=2)).bfloat16()
    assert giou(a, b).dtype == torch.float32
    assert torch.equal(giou(a, b), giou(a.float(), b.float()))


def test_gradients_equal_numerical_ones() -> None:
    a, b = random_boxes(6, seed=1).requires_grad_(), random_boxes(6, seed=2)
    giou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)).sum().backward()
    assert a.grad is not None
    for row in range(6):
        for side in range(4):
            moved = []
            for step in (-1e-4, 1e-4):
                shifted = a.detach().double().clone()
                shifted[row, side] += step
                pair = cxcywh_to_xyxy(shifted[row]).tolist(), cxcywh_to_xyxy(b[row].double()).tolist()
                moved.append(slow_giou(*pair))
            assert a.grad[row, side].item() == pytest.approx((moved[1] - moved[0]) / 2e-4, abs=2e-3)
