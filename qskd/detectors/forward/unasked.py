"""What transformers asks the device in every forward and the host knows already.

A question drains the device's queue: until the answer is there nothing further is launched. Here the host says beforehand whether a
mask hides anything, and that sizes fit; and the maps' sizes are copied without waiting. Outputs stay the same, bit for bit.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Size = tuple[int, int]  # height, width
_MASKS = ("attention_mask", "encoder_attention_mask", "memory_key_padding_mask")
_ASKING = ("modeling_deformable_detr", "modeling_lw_detr", "modeling_rf_detr")
_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"  # transformers' own switch, read at each check


class KnownMask:
    """Tells one encoder or decoder, within `knowing`, what its mask of map cells holds.

    As with `Tap`, the hook is a bound method and registered once, so that a deep copy has its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.full: Callable[[], bool] | None = None
        module.register_forward_pre_hook(self._tell, with_kwargs=True)

    def _tell(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        kind = module.config._attn_implementation
        if self.full is None or kind not in ("sdpa", "eager"):
            return None
        given = {name: mask for name in _MASKS if isinstance(mask := kwargs.get(name), Tensor) and mask.dim() == 2}
        if not given:
            return None
        if self.full():
            return args, {**kwargs, **dict.fromkeys(given)}
        queries = kwargs["inputs_embeds"].shape[1]
        # Of four axes it is taken as it is: True where a query may look.
        wide = {name: mask.bool()[:, None, None].expand(-1, 1, queries, -1) for name, mask in given.items()}
        if kind == "eager":  # added to the scores
            dtype = kwargs.get("encoder_hidden_states", kwargs["inputs_embeds"]).dtype
            lowest = torch.finfo(dtype).min
            wide = {name: (~mask).to(dtype).masked_fill(~mask, lowest) for name, mask in wide.items()}
        return args, {**kwargs, **wide}


def hides_nothing(least: Size, padded: Size, cells: Size) -> bool:
    """Whether a mask of real pixels, shrunk to a map's `cells` as transformers shrinks it, is True everywhere. least: height and
    width that each image of the batch has at least. padded: those of the batch. Asked and answered on the host."""
    for real, pixels, count in zip(least, padded, cells, strict=True):
        # Of each cell one pixel is looked at, its first, in torch's own rounding; the last cell's is the farthest.
        farthest = int(np.floor(np.float32(count - 1) * (np.float32(pixels) / np.float32(count))))
        if min(farthest, pixels - 1) >= real:
            return False
    return True


def always() -> bool:
    """Of a mask that hides nothing."""
    return True


@contextmanager
def knowing(
    masks: list[KnownMask], full: Callable[[], bool] | None, model: nn.Module, traced: bool = False
) -> Iterator[None]:
    """Within it a forward of `model` asks the device for nothing that is known. full: whether the mask of the map's cells hides
    nothing; None where the host does not know, and transformers asks. traced: by torch.compile, to which maps' sizes are
    constants."""
    for mask in masks:
        mask.full = full
    before, os.environ[_CHECKS] = os.environ.get(_CHECKS), "1"
    try:
        with nullcontext() if traced else _sizes_copied_without_waiting(model):
            yield
    finally:
        for mask in masks:
            mask.full = None
        if before is None:
            del os.environ[_CHECKS]
        else:
            os.environ[_CHECKS] = before


@contextmanager
def _sizes_copied_without_waiting(model: nn.Module) -> Iterator[None]:
    """The forward of some families makes a tensor of its maps' sizes on the device: its file sees a torch whose `as_tensor` copies
    such a list without waiting."""
    module: Any = sys.modules[type(model).__module__]
    if not module.__name__.endswith(_ASKING) or torch.compiler.is_compiling():
        yield
        return
    module.torch = _patient_torch()
    try:
        yield
    finally:
        module.torch = torch


@cache
def _patient_torch() -> ModuleType:
    made = ModuleType("torch")
    made.__dict__.update(torch.__dict__)
    made.as_tensor = _as_tensor  # type: ignore[attr-defined]
    return made


def _as_tensor(data: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
    if device is None or isinstance(data, Tensor):
        return torch.as_tensor(data, dtype=dtype, device=device)
    return torch.tensor(data, dtype=dtype).to(device, non_blocking=True)
