"""Which number format a network runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def has_bfloat16() -> bool:
    """Whether the GPU computes in it. torch would also count those that only emulate it, more slowly than float32."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """precision: "float32", "bfloat16", or "auto": bfloat16 autocast where the GPU has it, else float32."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and has_bfloat16() else "float32"
    return nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)
