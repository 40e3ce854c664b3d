"""Group Query Selection: which of a network's queries are worth distilling, and to which object each belongs.

equations.md 1.3 GQS, our reconstruction. The paper's (as equations.md 1.1 has it): positives come from bipartite matching, the
other queries are split into hard and easy negatives by GIoU with the objects, and positives plus hard negatives are
kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, giou
from qskd.distillation.qskd.settings import QuerySelectionConfig
from qskd.losses.matching import positions_of
from qskd.structures import Targets


@dataclass(frozen=True)
class QuerySelection:
    """What GQS says about each query. Leading dimensions (decoder layers) may stand before B.

    object_of_query: [..., B, Q] int64, the object whose group the query is in; -1 when the image has no object.
    giou: [..., B, Q] float32, with that object; -1 when the image has none.
    is_positive: [..., B, Q] bool, matched to that object.
    band: [..., B, Q] int64, the number of boundaries that `giou` reaches.
    weight: [..., B, Q] float32, 0 = dropped.
    slot: [..., B, Q] int64, place in the group: 0 the positive, 1, 2, ... hard negatives by falling GIoU; -1 dropped.
    """

    object_of_query: Tensor
    giou: Tensor
    is_positive: Tensor
    band: Tensor
    weight: Tensor
    slot: Tensor

    def __getitem__(self, layers: int | slice | list[int]) -> QuerySelection:
        """The selection of one decoder layer, or of some."""
        return QuerySelection(**{name: value[layers] for name, value in vars(self).items()})


def rank_in_group(group: Tensor, score: Tensor, num_groups: int) -> Tensor:
    """Place of each query in its own group, largest score first, ties to the lower index: [..., Q] -> [..., Q] int64.

    group: int64 in 0..num_groups; queries of group `num_groups` are ranked among themselves too, to no use.
    """
    order = score.argsort(dim=-1, descending=True, stable=True)
    groups, by_group = group.gather(-1, order).sort(dim=-1, stable=True)
    order = order.gather(-1, by_group)
    ones = torch.ones_like(group)
    sizes = group.new_zeros(*group.shape[:-1], num_groups + 1).scatter_add_(-1, group, ones)
    starts = sizes.cumsum(-1) - sizes
    place = torch.arange(group.shape[-1], device=group.device) - starts.gather(-1, groups)
    return torch.empty_like(order).scatter_(-1, order, place)


def none_selected(shape: torch.Size, device: torch.device) -> QuerySelection:
    """As of images without objects. shape: [..., B, Q]."""
    none = torch.full(shape, -1, dtype=torch.int64, device=device)
    zeros = torch.zeros(shape, device=device)
    return QuerySelection(none, zeros - 1, none >= 0, none + 1, zeros, none)


@torch.no_grad()
def select_queries(
    boxes_cxcywh: Tensor,
    targets: Targets,
    assignment: Tensor,
    config: QuerySelectionConfig,
    absent: Tensor | None = None,
    strange: Tensor | None = None,
) -> QuerySelection:
    """Group a network's queries by object, band them by GIoU, weight each band (equations.md 1.3 GQS, our reconstruction).

    boxes_cxcywh: [..., B, Q, 4] in 0..1, any float type; assignment: [..., B, M] query of each object, -1 = none.
    absent: [..., B, Q] bool, queries that can't be kept, none of which is assigned (`TeacherRecord.absent`).
    strange: [B, M] bool, objects that are passed over, as if they were not there: of classes that this network knows nothing of.

    1. A query's group is the object of largest GIoU (ties: the first); a positive is in the group of its own object.
    2. Its band is the number of `config.boundaries` its GIoU reaches. With `relative` they are fractions of the best
       GIoU that any query of the image has with the object (Q-DETR's rule, equations.md 4); an object that none reaches with
       a GIoU above 0 then keeps no hard negative.
    3. A positive weighs `positive_weight`, any other query its band's weight.
    4. Of the others with a weight, an object keeps the `max_per_object` of largest GIoU (ties: the lower index; 0 =
       all).
    """
    shape, slots = boxes_cxcywh.shape[:-1], targets.valid.shape[1]
    if not slots:
        return none_selected(shape, boxes_cxcywh.device)
    # An image's queries with its own objects only, laid out as a table whose padding is below every GIoU and never wins.
    image, slot = positions_of(targets)
    queries, objects = (cxcywh_to_xyxy(boxes.float()) for boxes in (boxes_cxcywh, targets.boxes_cxcywh))
    overlaps = torch.full((*shape[:-1], slots, shape[-1]), -2.0, device=boxes_cxcywh.device)  # [..., B, M, Q]
    overlaps[..., image, slot, :] = giou(queries[..., image, :, :], objects[image, slot].unsqueeze(1))
    theirs = targets.valid
    if strange is not None:
        theirs = theirs & ~strange
        overlaps = overlaps.masked_fill(strange.unsqueeze(-1), -2.0)

    # Positives: the object of each query, by scattering the inverse; a spare last column takes the unmatched objects.
    columns, assignment = shape[-1] + 1, assignment.masked_fill(~theirs, -1)
    owner = torch.full((*shape[:-1], columns), -1, dtype=torch.int64, device=boxes_cxcywh.device)
    every = torch.arange(slots, device=owner.device).expand_as(assignment)
    owner = owner.scatter_(-1, assignment % columns, every)[..., :-1]  # -1 % columns is the last
    is_positive = owner >= 0
    group = torch.where(is_positive, owner, overlaps.argmax(-2))
    overlap = overlaps.gather(-2, group.unsqueeze(-2)).squeeze(-2).clamp(min=-1)  # no object at all: -1, in band 0
    has_object = targets.valid[:, :1] if strange is None else theirs.any(1, keepdim=True)  # valid objects come first

    thresholds = torch.tensor(config.boundaries, dtype=torch.float32).to(overlap.device, non_blocking=True)
    keepable = has_object & ~is_positive
    if absent is not None:
        keepable = keepable & ~absent
    if config.relative:
        best = overlaps.amax(-1).gather(-1, group)  # [..., B, Q] best of any query with this query's object
        thresholds = thresholds * best.unsqueeze(-1)
        keepable = keepable & (best > 0)
    band = (overlap.unsqueeze(-1) >= thresholds).sum(-1)
    if config.relative:
        band = band.masked_fill(best <= 0, 0)

    weights = torch.tensor(config.band_weights, dtype=torch.float32).to(overlap.device, non_blocking=True)
    weight = weights[band].masked_fill(~keepable, 0.0)
    kept = weight > 0
    rank = rank_in_group(torch.where(kept, group, slots), overlap, slots)
    if config.max_per_object:
        kept = kept & (rank < config.max_per_object)
        weight = torch.where(kept, weight, 0.0)
    place = torch.where(kept, rank + 1, -1)
    if config.positive_weight:
        place = torch.where(is_positive, 0, place)
    selection = QuerySelection(
        object_of_query=torch.where(has_object, group, -1),
        giou=overlap,
        is_positive=is_positive,
        band=band,
        weight=torch.where(is_positive, config.positive_weight, weight),
        slot=place,
    )
    return shuffle(selection, boxes_cxcywh) if config.shuffled else selection


def of_known_classes(selection: QuerySelection, targets: Targets, silent: Tensor) -> QuerySelection:
    """The selection without the groups of objects whose class the teacher knows nothing of: whatever it takes them for is wrong.

    silent: [K] bool (`TeacherRecord.silent`).
    """
    if not targets.valid.shape[1]:
        return selection
    strange = silent[targets.labels].expand(*selection.slot.shape[:-1], -1)
    dropped = strange.gather(-1, selection.object_of_query.clamp(min=0))
    weight, slot = selection.weight.masked_fill(dropped, 0.0), selection.slot.masked_fill(dropped, -1)
    return replace(selection, weight=weight, slot=slot)


def shuffle(selection: QuerySelection, boxes_cxcywh: Tensor) -> QuerySelection:
    """Ablation control: as many queries per object and weight, but random ones of the same image and layer.

    The order is drawn by a hash of the boxes, so that it depends on nothing else and is drawn anew as they move.
    """
    mixed = (boxes_cxcywh.float() * boxes_cxcywh.new_tensor([12.9898, 78.233, 37.719, 93.989]).float()).sum(-1)
    order = ((mixed.sin() * 43758.5453) % 1.0).argsort(-1)
    return QuerySelection(**{name: value.gather(-1, order) for name, value in vars(selection).items()})


def select_both(
    boxes: tuple[Tensor, Tensor],
    targets: Targets,
    assignments: tuple[Tensor, Tensor],
    config: QuerySelectionConfig,
    absent: Tensor | None = None,
) -> tuple[QuerySelection, QuerySelection]:
    """`select_queries` of two networks, [L, B, Q, 4] and [L', B, Q', 4]; absent: of the second one's. Where Q = Q' and none is
    absent all layers go through together: it is many small operations, whose number costs more than their sizes."""
    if boxes[0].shape[2] != boxes[1].shape[2] or absent is not None:
        mine = select_queries(boxes[0], targets, assignments[0], config)
        return mine, select_queries(boxes[1], targets, assignments[1], config, absent)
    both = select_queries(torch.cat([b.detach().float() for b in boxes]), targets, torch.cat(assignments), config)
    return both[: len(boxes[0])], both[len(boxes[0]) :]
