"""Box formats, IoU and GIoU. Pure functions on float tensors of shape [..., 4]; half precision is computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY_AREA = 1e-14  # keeps empty boxes from dividing 0 by 0; a pixel of an 8k x 8k image is a relative area of 1.6e-8


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """[..., 4] centre x, centre y, width, height -> left, top, right, bottom, in the same units."""
    centre, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """[..., 4] left, top, right, bottom -> centre x, centre y, width, height, in the same units."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def _iou_parts(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    a, b = a_xyxy.float(), b_xyxy.float()
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = overlap[..., 0] * overlap[..., 1]
    area_a = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    return intersection, area_a + area_b - intersection


def iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Intersection over union of broadcast pairs: [..., 4], [..., 4] -> [...], float32. Two empty boxes give 0."""
    intersection, union = _iou_parts(a_xyxy, b_xyxy)
    return intersection / union.clamp(min=_TINY_AREA)


def giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of broadcast pairs, in -1..1: [..., 4], [..., 4] -> [...], float32.

    Empty boxes never give NaN, neither here nor in the gradient: a box pair that spans no area at all has GIoU 0.
    """
    intersection, union = _iou_parts(a_xyxy, b_xyxy)
    a, b = a_xyxy.float(), b_xyxy.float()
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    return intersection / union.clamp(min=_TINY_AREA) - (hull - union) / hull.clamp(min=_TINY_AREA)


def pairwise_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """[..., N, 4], [..., M, 4] -> [..., N, M] GIoU of all pairs, float32."""
    return giou(a_xyxy.unsqueeze(-2), b_xyxy.unsqueeze(-3))
