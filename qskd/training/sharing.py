"""Numbers that workers tell each other in a step, beside gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from qskd.structures import LossTerm, with_rest


@torch.no_grad()
def mean_counts(terms: Mapping[str, LossTerm]) -> dict[str, Tensor]:
    """Each term's count averaged over workers, put together with that of its rest: one collective for all of them."""
    rests = {name: term.rest for name, term in terms.items() if term.rest is not None}
    counts = torch.stack([term.count.float() for term in terms.values()] + list(rests.values()))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
        counts /= dist.get_world_size()
    mean = dict(zip(terms, counts[: len(terms)].unbind(), strict=True))
    beside = dict(zip(rests, counts[len(terms) :].unbind(), strict=True))
    return mean | {name: with_rest(mean[name], rest) for name, rest in beside.items()}


def most_of_all(own: int, world: int, hosts: dist.ProcessGroup | None) -> int:
    """The largest of all workers' numbers, from host to host: no device is waited for."""
    if world == 1:
        return own
    most = torch.tensor(own)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=hosts)
    return int(most)
