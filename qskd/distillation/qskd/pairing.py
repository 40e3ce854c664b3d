"""Which teacher query each student query learns from: inside an object's group (LAPD), or over the whole image.

equations.md 1.3 LAPD, our reconstruction: positives with positives, hard negatives in order of GIoU or by a small assignment.
The global pairing is the rival's (DETRDistill, equations.md 2), kept to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, pairwise_giou
from qskd.distillation.qskd.query_selection import QuerySelection
from qskd.errors import QskdError
from qskd.structures import SILENT_LOGIT

_LAST = 1e6  # above every cost, and small enough to leave the others their digits

_OF_SELECTION = tuple(field.name for field in fields(QuerySelection))


def _positions(selection: QuerySelection, num_objects: int, num_slots: int) -> Tensor:
    """Where each query stands in the table of groups x slots, flat: [..., B, Q] int64; one past its end if nowhere."""
    position = selection.object_of_query * num_slots + selection.slot
    return torch.where(selection.slot >= 0, position, num_objects * num_slots)


def slot_table(selection: QuerySelection, num_objects: int, num_slots: int) -> Tensor:
    """The query in each slot of each object's group: [..., B, M * R + 1] int64, -1 = none, which the last entry is."""
    position = _positions(selection, num_objects, num_slots)
    table = torch.full(
        (*position.shape[:-1], num_objects * num_slots + 1), -1, dtype=torch.int64, device=position.device
    )
    table.scatter_(-1, position, torch.arange(position.shape[-1], device=position.device).expand_as(position))
    table[..., -1] = -1  # the queries in no slot went there
    return table


def pair_by_rank(student: QuerySelection, teacher: QuerySelection, num_objects: int, num_slots: int) -> Tensor:
    """The teacher query of each student query that sits in the same slot of the same object's group.

    [L, B, Q_s] int64, -1 = none. Positives meet positives, hard negatives meet by rank; the larger side's rest is left
    over.
    """
    table = slot_table(teacher, num_objects, num_slots)
    return table.gather(-1, _positions(student, num_objects, num_slots))


@dataclass(frozen=True)
class Side:
    """One network's layers: logits [L, B, Q, K] and boxes_cxcywh [L, B, Q, 4], both float32, and their selection."""

    logits: Tensor
    boxes_cxcywh: Tensor
    selection: QuerySelection

    def layers(self, indices: list[int]) -> Side:
        """The layers at `indices`, repeated where an index is. Slices and expansions stay views."""
        first, count = indices[0], len(indices)
        parts = (
            self.logits,
            self.boxes_cxcywh,
            *(getattr(self.selection, name) for name in _OF_SELECTION),
        )
        if indices == list(range(first, first + count)):
            parts = tuple(part[first : first + count] for part in parts)
        elif set(indices) == {first}:
            parts = tuple(part[first : first + 1].expand(count, *part.shape[1:]) for part in parts)
        else:
            parts = tuple(torch.stack([part[index] for index in indices]) for part in parts)
        return Side(parts[0], parts[1], QuerySelection(*parts[2:]))


def _costs(logits: Tensor, goal: Tensor, boxes: Tensor, goal_boxes: Tensor, class_cost: float = 2.0) -> Tensor:
    """class_cost * BCE + 5 * L1 - 2 * GIoU of every student query [..., S] with every teacher query [..., T]: [..., S, T] float32.

    logits [..., S, K], goal [..., T, K] probabilities; boxes [..., S, 4], goal_boxes [..., T, 4] cxcywh. The BCE has soft
    targets and is summed over classes. NaN and infinity become the largest float.
    """
    with torch.autocast(logits.device.type, enabled=False):
        crossed = logits @ goal.transpose(-1, -2)
    cost = class_cost * (F.softplus(logits).sum(-1, keepdim=True) - crossed)
    cost += 5 * (boxes.unsqueeze(-2) - goal_boxes.unsqueeze(-3)).abs().sum(-1)
    cost -= 2 * pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(goal_boxes))
    worst = torch.finfo(torch.float32).max
    return torch.nan_to_num(cost, nan=worst, posinf=worst, neginf=worst)


@torch.no_grad()
def pair_by_assignment(student: Side, teacher: Side, num_objects: int, num_slots: int) -> Tensor:
    """Like `pair_by_rank`, but the hard negatives of a group are paired by the cheapest assignment.

    The cost is 2 * BCE + 5 * L1 - 2 * GIoU (ours), inside a group only. Waits for
    the device: the groups' sizes, the tables and the costs go to the host, one small solve for each (layer, image,
    object).
    """
    partner = pair_by_rank(student.selection, teacher.selection, num_objects, num_slots)
    slots = [side.selection.slot for side in (student, teacher)]
    used = [int(slot.max()) + 1 if slot.numel() else 0 for slot in slots]
    if not num_objects or min(used) < 2:
        return partner  # no hard negative on one side: nothing to choose
    tables = [
        slot_table(side.selection, num_objects, size)[..., :-1].unflatten(-1, (num_objects, size))[..., 1:]
        for side, size in zip((student, teacher), used, strict=True)
    ]  # [L, B, M, R]
    layer = torch.arange(partner.shape[0], device=partner.device)[:, None, None, None]
    batch = torch.arange(partner.shape[1], device=partner.device)[:, None, None]
    mine, theirs = (table.clamp(min=0) for table in tables)
    logits, goal = student.logits[layer, batch, mine], teacher.logits[layer, batch, theirs].sigmoid()
    boxes, goal_boxes = student.boxes_cxcywh[layer, batch, mine], teacher.boxes_cxcywh[layer, batch, theirs]
    cost_host = _costs(logits, goal, boxes, goal_boxes).cpu().numpy()
    mine_host, theirs_host = (table.cpu().numpy() for table in tables)
    result = torch.where(slots[0] > 0, -1, partner).cpu().numpy()
    for index in zip(*np.nonzero((mine_host[..., 0] >= 0) & (theirs_host[..., 0] >= 0)), strict=True):
        queries, rivals = (table[index][table[index] >= 0] for table in (mine_host, theirs_host))
        row, column = linear_sum_assignment(cost_host[index][: len(queries), : len(rivals)])
        result[index[0], index[1], queries[row]] = rivals[column]
    return torch.from_numpy(result).to(partner.device, non_blocking=True)


@torch.no_grad()
def pair_over_image(student: Side, teacher: Side, num_objects: int, num_slots: int) -> Tensor:
    """Like `pair_by_rank`, but the hard negatives are paired whatever their objects, by the cheapest assignment of all the
    image's on the one side to all on the other. What is left over has no partner.

    The cost is BCE + 5 * L1 - 2 * GIoU, as in TPRD's re-implementation of QSKD (equations.md 5). L * B solves a step, with a wait
    for the device.
    """
    partner = pair_by_rank(student.selection, teacher.selection, num_objects, num_slots)
    hard = [side.selection.slot > 0 for side in (student, teacher)]
    costs = _costs(student.logits, teacher.logits.sigmoid(), student.boxes_cxcywh, teacher.boxes_cxcywh, 1.0)
    costs_host, (mine, theirs) = costs.cpu().numpy(), (part.cpu().numpy() for part in hard)
    result = partner.masked_fill(hard[0], -1).cpu().numpy()
    for index in np.ndindex(*result.shape[:2]):
        queries, rivals = np.flatnonzero(mine[index]), np.flatnonzero(theirs[index])
        row, column = linear_sum_assignment(costs_host[index][np.ix_(queries, rivals)])
        result[index][queries[row]] = rivals[column]
    return torch.from_numpy(result).to(partner.device, non_blocking=True)


def unequal(student: int, teacher: int) -> QskdError:
    """What is said of two numbers of queries that are to be paired by index."""
    return QskdError(
        "distillation.predictions.pairing = index",
        f"{student} student queries and {teacher} teacher queries",
        "equally many",
        f"set student.queries: {teacher}, or use pairing: rank",
    )


def pair_by_index(student: Side, teacher: Side) -> Tensor:
    """Query i with query i, where the teacher's is kept: [L, B, Q] int64, -1 = none. For a student that started with the
    teacher's queries (`student.inherit`), whose query i asks what the teacher's asks (KD-DETR's idea, equations.md 3).

    Raises QskdError when the numbers of queries differ.
    """
    kept = teacher.selection.weight > 0
    if kept.shape[2] != student.logits.shape[2]:
        raise unequal(student.logits.shape[2], kept.shape[2])
    return torch.where(kept, torch.arange(kept.shape[2], device=kept.device), -1)


@torch.no_grad()
def pair_globally(student: Side, teacher: Side) -> Tensor:
    """The teacher query of each student query in one assignment over the whole image: [L, B, Q_s] int64, -1 = none.

    No selection is asked: all queries take part, but for absent ones of the teacher, as in DETRDistill's released code
    (equations.md 2, Logits), at its costs of BCE + 5 * L1 - 2 * GIoU. This is the matching QSKD does without: L * B solves of
    Q_s x Q_t a step, with a wait for the device.
    """
    goal = teacher.logits.sigmoid()
    absent = teacher.logits.amax(-1) <= SILENT_LOGIT / 2  # of no class at all: dropped by a derived crop
    every = _costs(student.logits, goal, student.boxes_cxcywh, teacher.boxes_cxcywh, 1.0)
    costs = every.masked_fill(absent.unsqueeze(-2), _LAST).cpu().numpy()
    gone = absent.cpu().numpy()
    result = np.full(costs.shape[:-1], -1, dtype=np.int64)
    for index in np.ndindex(*costs.shape[:2]):
        row, column = linear_sum_assignment(costs[index])
        result[index][row] = np.where(gone[index][column], -1, column)
    return torch.from_numpy(result).to(student.logits.device, non_blocking=True)
