"""Modules of transformers that run in float32 while the rest runs under autocast.

Where a box is takes more than bfloat16's 8 bits: at 0.7 of the image two neighbouring numbers are 0.4 % of it apart, some 2 pixels
of 640. And the score by which a query is chosen decides what every later layer sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Exact:
    """One module, without autocast and on float32, within `exactly`. Elsewhere, and where there is no autocast, as it is.

    It stands before the module's `forward` on the one instance: its class, the names of its state and what is saved of it stay. A
    context that one hook opens and another closes could not be traced by torch.compile; one around a call can. As with `Tap`, what
    is put there is a bound method, so that a deep copy has its own. The class's forward is looked up when it is called: a layer
    that is quantised later has another class by then.
    """

    def __init__(self, module: nn.Module) -> None:
        self.active = False
        self.module = module
        self.before = module.__dict__.get("forward")  # what stood there before the class's own
        module.forward = self._forward

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.inner(*args, **kwargs)
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(device, enabled=False):
            return self.inner(*map(_float32, args), **{name: _float32(value) for name, value in kwargs.items()})


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def exactly(parts: Sequence[Exact], device: str) -> Iterator[None]:
    """Let `parts` run in float32 within the block, if it is under autocast."""
    under_autocast = torch.is_autocast_enabled(device)
    for part in parts:
        part.active = under_autocast
    try:
        yield
    finally:
        for part in parts:
            part.active = False
