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


def _sides(boxes_xyxy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Four tensors and not slices of one: an operation whose last axis is 2 costs a CPU about twice as much.
    left, top, right, bottom = boxes_xyxy.float().unbind(-1)
    return left, top, right, bottom, (right - left).clamp(min=0) * (bottom - top).clamp(min=0)


def _overlap(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    width = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])).clamp(min=0)
    height = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])).clamp(min=0)
    intersection = width * height
    return intersection, a[4] + b[4] - intersection


def iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Intersection over union of broadcast pairs: [..., 4], [..., 4] -> [...], float32. Two empty boxes give 0."""
    intersection, union = _overlap(_sides(a_xyxy), _sides(b_xyxy))
    return intersection / union.clamp(min=_TINY_AREA)


def giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of broadcast pairs, in -1..1: [..., 4], [..., 4] -> [...], float32.

    Empty boxes never give NaN, neither here nor in the gradient: a box pair that spans no area at all has GIoU 0.
    """
    a, b = _sides(a_xyxy), _sides(b_xyxy)
    intersection, union = _overlap(a, b)
    width = (torch.maximum(a[2], b[2]) - torch.minimum(a[0], b[0])).clamp(min=0)
    height = (torch.maximum(a[3], b[3]) - torch.minimum(a[1], b[1])).clamp(min=0)
    hull = width * height
    return intersection / union.clamp(min=_TINY_AREA) - (hull - union) / hull.clamp(min=_TINY_AREA)


def pairwise_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """[..., N, 4], [..., M, 4] -> [..., N, M] GIoU of all pairs, float32."""
    return giou(a_xyxy.unsqueeze(-2), b_xyxy.unsqueeze(-3))
