"""Which number format a network runs in, and in which order its numbers lie in memory.

A GPU's convolutions in bfloat16 and TF32 want each pixel's channels side by side; given otherwise, they are turned around before
and after. A CPU computes as it always has, bit for bit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

CHANNELS_LAST_ON = frozenset({"cuda", "cpu"})  # kinds of device


def has_bfloat16() -> bool:
    """Whether the GPU computes in it. torch would also count those that only emulate it, more slowly than float32."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def allow_tf32(device: torch.device) -> None:
    """Let a GPU multiply float32 matrices in TF32 (10 bits of mantissa, several times as fast), in this process. torch lets its
    convolutions do so by default, and its matrix products not. For programs: a library does not decide this for its callers.
    Nothing changes where a CPU computes."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """precision: "float32", "bfloat16", or "auto": bfloat16 autocast where the GPU has it, else float32."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and has_bfloat16() else "float32"
    return nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)


def cached_in(precision: str) -> str:
    """What a cache of teacher outputs is computed in: it is made once and read by every training, so "auto" means "float32"."""
    return "bfloat16" if precision == "bfloat16" else "float32"


def lay_out(backbone: nn.Module) -> None:
    """Order the weights (in place: they stay the same tensors) as their device wants them; what a backbone returns follows."""
    weight = next(backbone.parameters(), None)
    if weight is not None and weight.device.type in CHANNELS_LAST_ON:
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def channels_first(images: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W]: where channels lie last in any case nothing is moved."""
    turned = images.permute(0, 3, 1, 2)
    return turned if images.device.type in CHANNELS_LAST_ON else turned.contiguous()


def laid_out_as(value: Tensor, pattern: Tensor) -> Tensor:
    """`value` on the device and in the order of `pattern`: a fused optimizer wants its state as its weights lie."""
    if value.shape != pattern.shape:
        return value.to(pattern.device)
    return torch.empty_like(pattern, dtype=value.dtype).copy_(value)
