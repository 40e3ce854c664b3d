"""Listening in on a module of transformers while it runs, without changing what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


class Tap:
    """Keeps what one module was given (keyword arguments) and what it returned in the forward being listened to.

    The hook is a bound method and is registered once: so a deep copy or a pickle of the model carries a tap of its own,
    and a compiled model always meets the same hook. Outside `listening` nothing is kept: between two steps no
    tensor is held on to.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.active = False
        self.given: dict[str, Any] = {}
        self.returned: Any = None
        module.register_forward_hook(self._hear, with_kwargs=True)

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.active:
            self.given, self.returned = kwargs, output


@contextmanager
def listening(taps: Sequence[Tap]) -> Iterator[None]:
    """Let `taps` hear within the block; what they heard must be read within it too, for it is forgotten at its end."""
    for tap in taps:
        tap.active = True
    try:
        yield
    finally:
        for tap in taps:
            tap.active, tap.given, tap.returned = False, {}, None
