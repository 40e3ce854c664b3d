"""Which number format a network runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """precision: "float32", "bfloat16", or "auto": bfloat16 autocast where the GPU has it, else float32."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)
