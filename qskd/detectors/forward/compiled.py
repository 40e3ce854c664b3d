"""What of a detector goes through torch.compile, and which sizes its graphs keep open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class CompiledForward:
    """One module's forward, compiled, within `compiled`; elsewhere as it is.

    It stands before the module's `forward` on the one instance, as `qskd.detectors.forward.exact.Exact` does: the class, the names
    of its state and what is saved of it stay, and a deep copy has its own.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        self.active = False
        self.module = module
        self.compiled = torch.compile(type(module).forward, **options)
        module.forward = self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.compiled if self.active else type(self.module).forward
        return run(self.module, *args, **kwargs)


@contextmanager
def compiled(part: CompiledForward | None, learns: bool) -> Iterator[None]:
    """Let `part` run as it is compiled, in a forward that learns."""
    if part is None or not learns:
        yield
        return
    part.active = True
    try:
        yield
    finally:
        part.active = False


def varies(dimension: int, *tensors: Tensor | None) -> None:
    """Sizes that change from batch to batch: one graph for all but 0 and 1."""
    from torch._dynamo import maybe_mark_dynamic  # seconds, of which a training without it has no use

    for tensor in tensors:
        if tensor is not None:
            maybe_mark_dynamic(tensor, dimension)
