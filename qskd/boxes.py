"""Box formats, IoU and GIoU. Pure functions on float tensors of shape [..., 4]; half precision is computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY_AREA = 1e-14  # keeps empty boxes from dividing 0 by 0; a pixel of an 8k x 8k image is a relative area of 1.6e-8


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """[..., 4] centre x, centre y, width, height -> left, top, right, bottom, in the same units."""
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """[..., 4] left, top, right, bottom -> centre x, centre y, width, height, in the same units."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


Corners = tuple[Tensor, Tensor, Tensor]  # [2, ...] left and top, [2, ...] right and bottom, [...] area


def _corners(boxes_xyxy: Tensor) -> Corners:
    # Both axes in one operation, and each axis in a row: a last axis of 2 or 4 costs a CPU about twice as much.
    low, high = boxes_xyxy.float().movedim(-1, 0).contiguous().unflatten(0, (2, 2)).unbind()
    width, height = (high - low).clamp(min=0).unbind()
    return low, high, width * height


def _two(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Corners, Corners]:
    """Of boxes that can be broadcast."""
    dimensions = max(a_xyxy.dim(), b_xyxy.dim())
    a, b = (boxes[(None,) * (dimensions - boxes.dim())] for boxes in (a_xyxy, b_xyxy))
    return _corners(a), _corners(b)


def _overlap(a: Corners, b: Corners) -> tuple[Tensor, Tensor]:
    width, height = (torch.minimum(a[1], b[1]) - torch.maximum(a[0], b[0])).clamp(min=0).unbind()
    intersection = width * height
    return intersection, a[2] + b[2] - intersection


def iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Intersection over union of broadcast pairs: [..., 4], [..., 4] -> [...], float32. Two empty boxes give 0."""
    intersection, union = _overlap(*_two(a_xyxy, b_xyxy))
    return intersection / union.clamp(min=_TINY_AREA)


def giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of broadcast pairs, in -1..1: [..., 4], [..., 4] -> [...], float32.

    Empty boxes never give NaN, neither here nor in the gradient: a box pair that spans no area at all has GIoU 0.
    """
    a, b = _two(a_xyxy, b_xyxy)
    intersection, union = _overlap(a, b)
    width, height = (torch.maximum(a[1], b[1]) - torch.minimum(a[0], b[0])).clamp(min=0).unbind()
    hull = width * height
    return intersection / union.clamp(min=_TINY_AREA) - (hull - union) / hull.clamp(min=_TINY_AREA)


def pairwise_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """[..., N, 4], [..., M, 4] -> [..., N, M] GIoU of all pairs, float32."""
    return giou(a_xyxy.unsqueeze(-2), b_xyxy.unsqueeze(-3))


def extent_wh(valid: Tensor) -> Tensor:
    """[B, H, W], 1 or True in a rectangle at the top left (what is left is padding) -> its width and height, [B, 2] int64."""
    real = valid.bool()
    return torch.stack([real.any(1).sum(1), real.any(2).sum(1)], -1)
