"""Local Alignment Prediction Distillation: the student's selected queries learn from the teacher's, object by object.

METHODS 1.3 LAPD, our reconstruction. The paper's (as METHODS 1.1 has it): the selection is applied to both networks'
predictions and gives the pairing, which spares the global bipartite matching between student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, giou, pairwise_giou
from qskd.config import PredictionDistillationConfig
from qskd.distillation.query_selection import QuerySelection
from qskd.errors import QskdError
from qskd.structures import LossTerm


def teacher_layer_of_student(
    student_layers: int, teacher_layers: int, config: PredictionDistillationConfig
) -> tuple[list[int], list[int]]:
    """Student layers to distil and the teacher layer each learns from, as two lists of equal length.

    "same_index" (DETRDistill, METHODS 2) spreads the student's layers evenly over the teacher's: l -> round(l * (L_t -
    1) / (L_s - 1)). It needs every teacher layer, so a record of one is an error when several student layers ask.
    """
    students = list(range(student_layers)) if config.student_layers == "all" else [student_layers - 1]
    if config.teacher_layers == "last" or len(students) == 1:
        return students, [teacher_layers - 1] * len(students)
    if teacher_layers == 1:
        raise QskdError(
            "distillation.predictions.teacher_layers = same_index",
            "the teacher's record holds one decoder layer",
            "all of the teacher's layers",
            "cache the teacher with all layers, or use teacher_layers: last",
        )
    return students, [round(layer * (teacher_layers - 1) / (student_layers - 1)) for layer in students]


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
            *(getattr(self.selection, field.name) for field in fields(QuerySelection)),
        )
        if indices == list(range(first, first + count)):
            parts = tuple(part[first : first + count] for part in parts)
        elif set(indices) == {first}:
            parts = tuple(part[first : first + 1].expand(count, *part.shape[1:]) for part in parts)
        else:
            parts = tuple(torch.stack([part[index] for index in indices]) for part in parts)
        return Side(parts[0], parts[1], QuerySelection(*parts[2:]))


@torch.no_grad()
def pair_by_assignment(student: Side, teacher: Side, num_objects: int, num_slots: int) -> Tensor:
    """Like `pair_by_rank`, but the hard negatives of a group are paired by the cheapest assignment.

    The cost is 2 * BCE + 5 * L1 - 2 * GIoU (METHODS 1.3's option, our reconstruction), inside a group only. Waits for
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
    with torch.autocast(logits.device.type, enabled=False):
        crossed = logits @ goal.transpose(-1, -2)
    cost = 2 * (F.softplus(logits).sum(-1, keepdim=True) - crossed)  # BCE with soft targets, summed over classes
    cost += 5 * (boxes.unsqueeze(-2) - goal_boxes.unsqueeze(-3)).abs().sum(-1)
    cost -= 2 * pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(goal_boxes))
    worst = torch.finfo(torch.float32).max
    cost_host = torch.nan_to_num(cost, nan=worst, posinf=worst, neginf=worst).cpu().numpy()
    mine_host, theirs_host = (table.cpu().numpy() for table in tables)
    result = torch.where(slots[0] > 0, -1, partner).cpu().numpy()
    for index in zip(*np.nonzero((mine_host[..., 0] >= 0) & (theirs_host[..., 0] >= 0)), strict=True):
        queries, rivals = (table[index][table[index] >= 0] for table in (mine_host, theirs_host))
        row, column = linear_sum_assignment(cost_host[index][: len(queries), : len(rivals)])
        result[index[0], index[1], queries[row]] = rivals[column]
    return torch.from_numpy(result).to(partner.device, non_blocking=True)


def alignment_terms(
    student: Side, teacher: Side, num_objects: int, num_slots: int, config: PredictionDistillationConfig
) -> dict[str, LossTerm]:
    """The LAPD terms (METHODS 1.3, our reconstruction), over the pairs (s, t) of all L layers:

        lapd_class  sum of w_t * sum over classes of |p_t - p_s|^gamma * BCE(p_s, p_t),   p = sigmoid(c)
        lapd_l1     sum of w_t * |b_s - b_t|_1, over the four cxcywh numbers
        lapd_giou   sum of w_t * (1 - GIoU(b_s, b_t))

    w_t is the selection weight of the teacher's query, times its max_c sigmoid(c_t) when `pair_weight` is "confidence"
    (KD-DETR's weight, METHODS 3). Both sides have L layers; the teacher's queries may differ in number. num_slots: at
    least 1 + the largest number of hard negatives of an object, on either side.

    gamma is `class_gamma`: 0 in METHODS 1.3; above it, the modulation of quality focal loss (Li et al., NeurIPS 2020).

    Each counts pairs / L (or, with `divide_by: weights`, the sum of w_t / L), so that a term's value is L times the mean
    over all pairs of all layers: the sum over layers of the layers' means when they have equally many pairs, and near it
    when not. Only the student gets a gradient.
    Without pairs the terms are 0 and attached to the graph.
    """
    goal_logits, goal_boxes = teacher.logits.detach(), teacher.boxes_cxcywh.detach()
    if config.pairing == "hungarian":
        partner = pair_by_assignment(student, teacher, num_objects, num_slots)
    else:
        partner = pair_by_rank(student.selection, teacher.selection, num_objects, num_slots)
    paired, query = partner >= 0, partner.clamp(min=0)

    # Indexed by student query, not by (object, slot): never more than Q_s rows, and nothing of the student is gathered.
    goal = goal_logits.gather(2, query.unsqueeze(-1).expand(*query.shape, goal_logits.shape[-1])).sigmoid()
    theirs = goal_boxes.gather(2, query.unsqueeze(-1).expand(*query.shape, 4))
    weight = teacher.selection.weight.gather(2, query)
    if config.pair_weight == "confidence":
        weight = weight * goal.amax(-1)
    weight = torch.where(paired, weight, 0.0)

    mine = student.boxes_cxcywh
    count = (weight.sum() if config.divide_by == "weights" else paired.sum().float()) / len(paired)
    classes = F.binary_cross_entropy_with_logits(student.logits, goal, reduction="none")
    if config.class_gamma:
        classes = classes * (goal - student.logits.sigmoid()).abs() ** config.class_gamma
    losses = {
        "lapd_class": classes.sum(-1),
        "lapd_l1": (mine - theirs).abs().sum(-1),
        "lapd_giou": 1 - giou(cxcywh_to_xyxy(mine), cxcywh_to_xyxy(theirs)),
    }
    return {name: LossTerm((weight * loss).sum(), count) for name, loss in losses.items()}
