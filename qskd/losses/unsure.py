"""What is not background in an image that nobody has labelled: what the teacher half sees there may be an object or not.

A missed object taught as background is what spoils hard pseudo-labels; so whatever shows such a place has no class loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, iou
from qskd.structures import Targets

OVERLAP = 0.5  # IoU with what the teacher half sees, from which on a query shows the same


@torch.no_grad()
def left_out(boxes_cxcywh: Tensor, assignment: Tensor, targets: Targets) -> Tensor | None:
    """The queries without an object that show what the teacher half sees: [L, B, Q] bool. None where all images are labelled.

    boxes_cxcywh: [L, B, Q, 4]; assignment: [L, B, M]. A query does where it overlaps such a box by `OVERLAP`, and the one of
    each image that overlaps it most does in any case: it is who would be matched with it.
    """
    if targets.unsure is None or targets.unsure_xyxy is None:
        return None
    taken = _taken(assignment.masked_fill(~targets.valid, -1), boxes_cxcywh.shape[2])
    if not targets.unsure.shape[1]:
        return torch.zeros_like(taken)
    overlap = iou(cxcywh_to_xyxy(boxes_cxcywh.float()).unsqueeze(-2), targets.unsure_xyxy.unsqueeze(-3))  # [L, B, Q, U]
    overlap = overlap.masked_fill(taken.unsqueeze(-1) | ~targets.unsure.unsqueeze(1), 0.0)
    nearest = (overlap == overlap.amax(2, keepdim=True)) & (overlap > 0)
    return (nearest | (overlap >= OVERLAP)).any(-1)


def in_unsure(points: Tensor, targets: Targets) -> Tensor:
    """Which points [B, P, 2] (x, y in 0..1) lie in a box of what the teacher half sees: [B, P] bool."""
    assert targets.unsure is not None
    assert targets.unsure_xyxy is not None
    boxes, at = targets.unsure_xyxy[:, None], points[:, :, None]
    inside = ((at >= boxes[..., :2]) & (at <= boxes[..., 2:])).all(-1)
    return (inside & targets.unsure[:, None]).any(-1)


def _taken(assignment: Tensor, queries: int) -> Tensor:
    """[L, B, M] -> [L, B, Q] bool: the queries that have an object."""
    spare = torch.zeros(*assignment.shape[:2], queries + 1, dtype=torch.bool, device=assignment.device)
    return spare.scatter(-1, torch.where(assignment < 0, queries, assignment), True)[..., :-1]
