"""Queries of which a column of the cache keeps something: where each of them stands in it."""

from __future__ import annotations

import torch
from torch import Tensor


def places_of(kept: Tensor, number: int) -> Tensor:
    """[B, A] int64, the queries that are kept (-1 = none) -> [B, number], where each of all queries stands among them, -1 where
    it does not."""
    place = torch.full((len(kept), number + 1), -1, dtype=torch.int64, device=kept.device)
    order = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    place.scatter_(1, torch.where(kept < 0, number, kept), order)  # one more, for what is none
    return place[:, :-1]
