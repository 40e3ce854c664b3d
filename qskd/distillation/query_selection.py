"""Group Query Selection: which of a network's queries are worth distilling, and to which object each belongs.

METHODS 1.3 GQS, our reconstruction. The paper's (as METHODS 1.1 has it): positives come from bipartite matching, the
other queries are split into hard and easy negatives by GIoU with the objects, and positives plus hard negatives are
kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, giou
from qskd.config import QuerySelectionConfig
from qskd.matching import packed_positions
from qskd.structures import Targets


@dataclass(frozen=True)
class QuerySelection:
    """What GQS says about each query. Leading dimensions (decoder layers) may stand before B.

    object_of_query: [..., B, Q] int64, the object whose group the query is in; -1 when the image has no object.
    giou: [..., B, Q] float32, with that object; -1 when the image has none.
    is_positive: [..., B, Q] bool, matched to that object.
    band: [..., B, Q] int64, the number of boundaries that `giou` reaches.
    weight: [..., B, Q] float32, 0 = dropped.
    """

    object_of_query: Tensor
    giou: Tensor
    is_positive: Tensor
    band: Tensor
    weight: Tensor


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


def _nothing(shape: torch.Size, device: torch.device) -> QuerySelection:
    none = torch.full(shape, -1, dtype=torch.int64, device=device)
    zeros = torch.zeros(shape, device=device)
    return QuerySelection(none, zeros - 1, none >= 0, none + 1, zeros)


@torch.no_grad()
def select_queries(
    boxes_cxcywh: Tensor, targets: Targets, assignment: Tensor, config: QuerySelectionConfig
) -> QuerySelection:
    """Group a network's queries by object, band them by GIoU, weight each band (METHODS 1.3 GQS, our reconstruction).

    boxes_cxcywh: [..., B, Q, 4] in 0..1, any float type; assignment: [..., B, M] query of each object, -1 = none.

    1. A query's group is the object of largest GIoU (ties: the first); a positive is in the group of its own object.
    2. Its band is the number of `config.boundaries` its GIoU reaches. With `relative` they are fractions of the best
       GIoU that any query of the image has with the object (Q-DETR's rule, METHODS 6); an object that none reaches with
       a GIoU above 0 then keeps no hard negative.
    3. A positive weighs `positive_weight`, any other query its band's weight.
    4. Of the others with a weight, an object keeps the `max_per_object` of largest GIoU (ties: the lower index; 0 =
       all).
    """
    shape, slots = boxes_cxcywh.shape[:-1], targets.valid.shape[1]
    if not slots:
        return _nothing(shape, boxes_cxcywh.device)
    # An image's queries with its own objects only, laid out as a table whose padding is below every GIoU and never wins.
    image, slot = packed_positions(targets.counts, boxes_cxcywh.device)
    queries, objects = boxes_cxcywh.float()[..., image, :, :], targets.boxes_cxcywh[image, slot].float().unsqueeze(1)
    overlaps = torch.full((*shape[:-1], slots, shape[-1]), -2.0, device=boxes_cxcywh.device)  # [..., B, M, Q]
    overlaps[..., image, slot, :] = giou(cxcywh_to_xyxy(queries), cxcywh_to_xyxy(objects))

    # Positives: the object of each query, by scattering the inverse; a spare last column takes the unmatched objects.
    assignment = assignment.masked_fill(~targets.valid, -1)
    spare = torch.where(assignment < 0, shape[-1], assignment)
    owner = torch.full((*shape[:-1], shape[-1] + 1), -1, dtype=torch.int64, device=boxes_cxcywh.device)
    owner = owner.scatter_(-1, spare, torch.arange(slots, device=owner.device).expand_as(spare))[..., :-1]
    is_positive = owner >= 0
    group = torch.where(is_positive, owner, overlaps.argmax(-2))
    overlap = overlaps.gather(-2, group.unsqueeze(-2)).squeeze(-2)
    has_object = targets.valid.any(-1, keepdim=True).expand(shape)

    thresholds = torch.tensor(config.boundaries, dtype=torch.float32).to(overlap.device, non_blocking=True)
    keepable = has_object & ~is_positive
    if config.relative:
        best = overlaps.amax(-1).gather(-1, group)  # [..., B, Q] best of any query with this query's object
        thresholds = thresholds * best.unsqueeze(-1)
        keepable = keepable & (best > 0)
    band = (overlap.unsqueeze(-1) >= thresholds).sum(-1)
    if config.relative:
        band = band.masked_fill(best <= 0, 0)
    band = band.masked_fill(~has_object, 0)

    weights = torch.tensor(config.band_weights, dtype=torch.float32).to(overlap.device, non_blocking=True)
    weight = torch.where(keepable, weights[band], 0.0)
    if config.max_per_object:
        candidate = weight > 0
        rank = rank_in_group(torch.where(candidate, group, slots), overlap, slots)
        weight = torch.where(rank < config.max_per_object, weight, 0.0)
    weight = torch.where(is_positive, config.positive_weight, weight)
    return QuerySelection(
        object_of_query=group.masked_fill(~has_object, -1),
        giou=overlap.masked_fill(~has_object, -1.0),
        is_positive=is_positive,
        band=band,
        weight=weight,
    )
