"""Listening in on a module of transformers while it runs, without changing what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


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
