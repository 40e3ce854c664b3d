"""Listening in on a module of transformers while it runs, without changing what it computes; attention, computed again from what
was heard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qskd.families.family import Family


class Tap:
    """Keeps what one module was given and what it returned in the forward being listened to.

    The hook is a bound method and is registered once: so a deep copy or a pickle of the model carries a tap of its own,
    and a compiled model always meets the same hook. Outside `listening` nothing is kept: between two steps no
    tensor is held on to.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.start(False)
        module.register_forward_hook(self._hear, with_kwargs=True)

    def start(self, active: bool = True) -> None:
        """Listen from now on, or no longer; what was heard is forgotten."""
        self.active = active
        self.args: tuple[Any, ...] = ()
        self.given: dict[str, Any] = {}  # by keyword
        self.returned: Any = None

    @property
    def state(self) -> Tensor:
        """What a layer returned, without what may be beside it."""
        found: Tensor = self.returned[0] if isinstance(self.returned, tuple) else self.returned
        return found

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.active:
            self.args, self.given, self.returned = args, kwargs, output


@contextmanager
def listening(taps: Sequence[Tap]) -> Iterator[None]:
    """Let `taps` hear within the block; what they heard must be read within it too, for it is forgotten at its end."""
    for tap in taps:
        tap.start()
    try:
        yield
    finally:
        for tap in taps:
            tap.start(False)


@dataclass(frozen=True)
class CrossAttention:
    """One decoder layer's cross-attention and what it was given: enough to compute the attention of any query again."""

    module: nn.Module
    given: dict[str, Any]


def detached(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in given.items()}


def attention_of(
    family: Family,
    layers: Sequence[CrossAttention],
    queries: Tensor,
    *,
    shapes: Sequence[tuple[int, int]],
    valid: Tensor,
    first: int = 0,
    learns: bool = False,
) -> tuple[Tensor, ...]:
    """Query indices [B, S] (-1 = none) -> maps [B, S, H, W], float32, averaged over `layers`. first: where the model's own queries
    begin among those that the layers were given. learns: with gradient, where there is one at all."""
    learns = learns and torch.is_grad_enabled()
    with torch.set_grad_enabled(learns), torch.autocast(queries.device.type, enabled=False):
        wanted = queries.clamp(min=0) + first
        total = torch.zeros((*queries.shape, valid.shape[1]), device=queries.device)
        for layer in layers:
            total += family.attention(layer.module, layer.given, wanted, shapes, valid)
        total *= (queries >= 0)[..., None] / len(layers)
        parts = total.split([height * width for height, width in shapes], dim=-1)
        return tuple(part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True))


def attention_of_each(
    attend: Callable[[Sequence[CrossAttention], Tensor], tuple[Tensor, ...]],
    layers: Sequence[CrossAttention],
    num_queries: int,
    queries: Tensor,
) -> tuple[Tensor, ...]:
    """Like `attend`, of the queries of any layer: number n * num_queries + i is query i of the n-th layer before the last."""
    total: list[Tensor] = []
    for before, layer in enumerate(reversed(layers)):
        # No layer has more than all its queries: theirs come first, the rest are none.
        other = queries.div(num_queries, rounding_mode="floor") != before
        place = other.int().sort(dim=1, stable=True).indices[:, :num_queries]
        own = torch.where(other.gather(1, place), -1, queries.gather(1, place) % num_queries)
        maps = attend([layer], own)
        total = total or [map_.new_zeros(*queries.shape, *map_.shape[2:]) for map_ in maps]
        for whole, map_ in zip(total, maps, strict=True):
            whole.scatter_add_(1, place[..., None, None].expand_as(map_), map_)
    return tuple(total)


def not_kept(queries: Tensor) -> tuple[Tensor, ...]:
    raise RuntimeError("this forward ran with with_attention=False and kept nothing to compute attention from")
