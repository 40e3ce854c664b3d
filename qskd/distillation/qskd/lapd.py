"""Local Alignment Prediction Distillation: the student's selected queries learn from the teacher's, object by object.

equations.md 1.3 LAPD, our reconstruction. The paper's (as equations.md 1.1 has it): the selection is applied to both networks'
predictions and gives the pairing, which spares the global bipartite matching between student and teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, giou
from qskd.distillation.qskd.pairing import (
    Side,
    pair_by_assignment,
    pair_by_index,
    pair_by_rank,
    pair_globally,
    pair_over_image,
)
from qskd.distillation.qskd.settings import PredictionDistillationConfig
from qskd.distillation.shared.classes import soft_cross_entropy
from qskd.errors import QskdError
from qskd.structures import LossTerm

LIKELY = 0.05  # a class of which the teacher says so much is never dropped


def teacher_layer_of_student(
    student_layers: int, teacher_layers: int, config: PredictionDistillationConfig
) -> tuple[list[int], list[int]]:
    """Student layers to distil and the teacher layer each learns from, as two lists of equal length.

    "same_index" (DETRDistill, equations.md 2) spreads the student's layers evenly over the teacher's: l -> round(l * (L_t -
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


def _partners(
    student: Side, teacher: Side, num_objects: int, num_slots: int, config: PredictionDistillationConfig
) -> Tensor:
    """[L, B, Q_s] int64: the teacher's query of each of the student's, -1 = none."""
    if config.pairing == "global":
        return pair_globally(student, teacher)
    if config.pairing == "index":
        return pair_by_index(student, teacher)
    if config.pairing == "image":
        return pair_over_image(student, teacher, num_objects, num_slots)
    if config.pairing == "hungarian":
        return pair_by_assignment(student, teacher, num_objects, num_slots)
    return pair_by_rank(student.selection, teacher.selection, num_objects, num_slots)


def alignment_terms(
    student: Side,
    teacher: Side,
    num_objects: int,
    num_slots: int,
    config: PredictionDistillationConfig,
    partner: Tensor | None = None,
) -> dict[str, LossTerm]:
    """The LAPD terms (equations.md 1.3, our reconstruction), over the pairs (s, t) of all L layers:

        lapd_class  sum of w_t * sum over classes of |p_t - p_s|^gamma * BCE(p_s, p_t),   p = sigmoid(c)
        lapd_l1     sum of w_t * |b_s - b_t|_1, over the four cxcywh numbers
        lapd_giou   sum of w_t * (1 - GIoU(b_s, b_t))

    w_t is the selection weight of the teacher's query (1 with the `global` pairing, which asks no selection), times its
    max_c sigmoid(c_t) when `pair_weight` is "confidence" (KD-DETR's weight, equations.md 3). Both sides have L layers; the
    teacher's queries may differ in number. num_slots: at least 1 + the largest number of hard negatives of an object, on
    either side.

    gamma is `class_gamma`: 0 in equations.md 1.3; above it, the modulation of quality focal loss (Li et al., NeurIPS 2020). The sum
    over classes leaves out those that `kept_classes` drops.

    Several teachers (`terms_together`): each has a part in the sum, of its own classes.

    Each counts pairs / L (or, with `divide_by: weights`, the sum of w_t / L), so that a term's value is L times the mean
    over all pairs of all layers: the sum over layers of the layers' means when they have equally many pairs, and near it
    when not. Only the student gets a gradient.
    Without pairs the terms are 0 and attached to the graph. partner: of `pair_globally`, where it is known already.
    """
    if partner is None:
        partner = _partners(student, teacher, num_objects, num_slots, config)
    learnt = _learnt(student, teacher, partner, config)
    count = (learnt.weight.sum() if config.divide_by == "weights" else learnt.paired.sum().float()) / len(partner)
    return {name: LossTerm((learnt.weight * loss).sum(), count) for name, loss in learnt.losses.items()}


def terms_together(
    sides: Sequence[tuple[Side, Side]],
    strange: Sequence[Tensor],
    num_objects: int,
    num_slots: int,
    config: PredictionDistillationConfig,
) -> dict[str, LossTerm]:
    """`alignment_terms` of several teachers, each with the student as it learns from it: (student, teacher). strange: for each
    [L, B, Q_s] bool, the student's queries at objects that this teacher knows nothing of, which learn nothing of it.

    A query of the student may have a partner of each (with pairings over the image). It learns each teacher's classes of that
    one's partner, but its box of the surest partner alone (the largest max_c sigmoid(c_t); ties: the first): two boxes would draw
    it to a place between them. A term counts queries with a partner, or the largest of their weights.
    """
    learnt = []
    for (own, theirs), left_out in zip(sides, strange, strict=True):
        partner = _partners(own, theirs, num_objects, num_slots, config).masked_fill(left_out, -1)
        learnt.append(_learnt(own, theirs, partner, config))
    layers = len(learnt[0].weight)
    weights, paired = torch.stack([each.weight for each in learnt]), torch.stack([each.paired for each in learnt])
    count = (weights.amax(0).sum() if config.divide_by == "weights" else paired.any(0).sum().float()) / layers
    surest = torch.stack([each.sure.masked_fill(~each.paired, -1.0) for each in learnt]).argmax(0)
    terms = {}
    for name in learnt[0].losses:
        shares = [
            each.weight if name == "lapd_class" else each.weight * (surest == number)
            for number, each in enumerate(learnt)
        ]
        total = torch.stack(
            [(share * each.losses[name]).sum() for share, each in zip(shares, learnt, strict=True)]
        ).sum()
        terms[name] = LossTerm(total, count)
    return terms


@dataclass(frozen=True)
class _Learnt:
    """Of each of the student's queries [L, B, Q_s]: whether it has a partner, what that counts, how sure the partner is, and the
    losses by term."""

    paired: Tensor
    weight: Tensor
    sure: Tensor
    losses: dict[str, Tensor]


def _learnt(student: Side, teacher: Side, partner: Tensor, config: PredictionDistillationConfig) -> _Learnt:
    goal_logits, goal_boxes = teacher.logits.detach(), teacher.boxes_cxcywh.detach()
    unpaired, query = partner < 0, partner.clamp(min=0)

    # Indexed by student query, not by (object, slot): never more than Q_s rows, and nothing of the student is gathered.
    goal = goal_logits.gather(2, query.unsqueeze(-1).expand(*query.shape, goal_logits.shape[-1])).sigmoid()
    theirs = goal_boxes.gather(2, query.unsqueeze(-1).expand(*query.shape, 4))
    chosen = torch.ones_like(teacher.selection.weight) if config.pairing == "global" else teacher.selection.weight
    weight, sure = chosen.gather(2, query), goal.amax(-1)
    if config.pair_weight == "confidence":
        weight = weight * sure
    weight = weight.masked_fill(unpaired, 0.0)

    mine = student.boxes_cxcywh
    classes = soft_cross_entropy(student.logits, goal, config.class_gamma)
    if 0 < config.kept_classes < goal.shape[-1]:
        # The smallest of the likeliest, not their places: equally likely ones are kept together.
        least = goal.topk(config.kept_classes, dim=-1).values[..., -1:].clamp(max=LIKELY)
        classes = classes.masked_fill(goal < least, 0.0)
    losses = {
        "lapd_class": classes.sum(-1),
        "lapd_l1": (mine - theirs).abs().sum(-1),
        "lapd_giou": 1 - giou(cxcywh_to_xyxy(mine), cxcywh_to_xyxy(theirs)),
    }
    return _Learnt(~unpaired, weight, sure, losses)
