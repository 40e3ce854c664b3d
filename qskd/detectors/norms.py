"""Norms of a backbone in other forms than transformers builds them: the same names, values and outputs."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5  # of every FrozenBatchNorm2d in transformers


class FrozenBatchNorm2d(nn.Module):
    """transformers' frozen norm, whose outputs are as wide as its inputs. transformers multiplies by float32 scales, which
    makes float32 of bfloat16, and so of every convolution's output under autocast; and it takes seven kernels to do so."""

    def __init__(self, norm: nn.Module) -> None:
        """norm: a frozen one, or a batch norm that is to be one."""
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # of a norm that was not frozen, as transformers' drops it
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        bias, mean, variance = self.bias, self.running_mean, self.running_var
        if x.is_cuda:  # one kernel, computed in float32 and rounded once
            return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, EPS)  # type: ignore[arg-type]
        # As transformers has it, in float32 to the last bit.
        weight, bias, variance, mean = (each.reshape(1, -1, 1, 1) for each in (weight, bias, variance, mean))  # type: ignore[operator]
        scale = weight * (variance + EPS).rsqrt()
        moved: Tensor = x * scale + (bias - mean * scale)
        return moved.to(x.dtype)


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether it is transformers' (each family has its own class), or the one above."""
    return type(module).__name__.endswith("FrozenBatchNorm2d")


def keep_precision(module: nn.Module, batch_too: bool = False) -> None:
    """Put a `FrozenBatchNorm2d` of ours in the place of each of transformers', or of each batch norm too (in place)."""
    for name, child in list(module.named_children()):
        frozen = is_frozen_norm(child) and not isinstance(child, FrozenBatchNorm2d)
        if frozen or (batch_too and isinstance(child, nn.BatchNorm2d)):
            setattr(module, name, FrozenBatchNorm2d(child))
        else:
            keep_precision(child, batch_too)
