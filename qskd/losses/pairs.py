"""Queries, and the objects whose boxes they learn: as each layer's own matching gives them, or those of all layers together.

The union of the layers' matchings is D-FINE's (GO-LSD; Peng et al., ICLR 2025, `_get_go_indices` of its repository) and DEIMv2's;
equal to transformers' `Deimv2Loss._get_dense_o2o_indices`. A query that a layer has matched with an object learns its box in every
layer, so that what it says does not change from one layer to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qskd.structures import Targets


@dataclass(frozen=True)
class Pairs:
    """query [L, B, P] int64, 0 where there is none; matched [L, B, P] bool; objects_cxcywh [B, P, 4]; count: what their losses are
    divided by on one worker."""

    query: Tensor
    matched: Tensor
    objects_cxcywh: Tensor
    count: Tensor

    def after(self, early: int) -> Pairs:
        """Without the first layers."""
        return Pairs(self.query[early:], self.matched[early:], self.objects_cxcywh, self.count)


def own_pairs(assignment: Tensor, targets: Targets) -> Pairs:
    """assignment [L, B, M]: the query of each object, -1 = none. A pair an object; the count is all objects."""
    matched = (assignment >= 0) & targets.valid
    return Pairs(assignment.clamp(min=0), matched, targets.boxes_cxcywh.float(), targets.valid.sum().float())


@torch.no_grad()
def united_pairs(assignment: Tensor, targets: Targets, queries: int) -> Pairs:
    """A pair a query, the same in all layers: the object that it is matched with in most of them, of several the first. The count
    is the pairs."""
    layers, batch, slots = assignment.shape
    matched = (assignment >= 0) & targets.valid
    place = torch.where(matched, assignment, queries)  # one more for objects without a query
    votes = assignment.new_zeros(batch, slots + 1, queries + 1)  # and an object that nobody is matched with
    votes[:, :slots].scatter_add_(2, place.permute(1, 2, 0), torch.ones_like(place).permute(1, 2, 0))
    order = torch.arange(slots, -1, -1, device=votes.device)[:, None]
    rank, chosen = (votes[..., :queries] * (slots + 1) + order).max(1)  # [B, Q]
    found = rank > slots
    objects = F.pad(targets.boxes_cxcywh.float(), (0, 0, 0, 1)).gather(1, chosen[..., None].expand(-1, -1, 4))
    query = torch.arange(queries, device=votes.device).expand(layers, batch, -1)
    return Pairs(query, found.expand(layers, -1, -1), objects, found.sum().float())
