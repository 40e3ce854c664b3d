"""Modules of transformers that run in float32 while the rest runs under autocast.

Where a box is takes more than bfloat16's 8 bits: at 0.7 of the image two neighbouring numbers are 0.4 % of it apart, some 2 pixels
of 640. And the score by which a query is chosen decides what every later layer sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Exact:
    """One module, without autocast and on float32, within `exactly`. Elsewhere, and where there is no autocast, as it is.

    As with `Tap`, hooks are bound methods and registered once, so that a deep copy has its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.active = False
        self.opened: list[AbstractContextManager[Any]] = []
        module.register_forward_pre_hook(self._enter, with_kwargs=True)
        module.register_forward_hook(self._leave)

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.active:
            return None
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        without = torch.autocast(device, enabled=False)
        without.__enter__()
        self.opened.append(without)
        return tuple(map(_float32, args)), {name: _float32(value) for name, value in kwargs.items()}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.opened:
            self.opened.pop().__exit__(None, None, None)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def exactly(parts: Sequence[Exact], device: str) -> Iterator[None]:
    """Let `parts` run in float32 within the block, if it is under autocast; also what an error left open is closed at its end."""
    under_autocast = torch.is_autocast_enabled(device)
    for part in parts:
        part.active = under_autocast
    try:
        yield
    finally:
        for part in parts:
            part.active = False
            while part.opened:
                part.opened.pop().__exit__(None, None, None)
