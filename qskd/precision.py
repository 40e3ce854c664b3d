"""Which number format a network runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


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
