"""Fake quantisers whose steps are learned (LSQ, Esser et al., ICLR 2020; LSQ+, Bhalgat et al., CVPRW 2020).

Forward and gradients are torch's own `_fake_quantize_learnable_per_*_affine`: rounding passes gradients straight through, what is
clipped gets none, and a step's gradient is q - x / step inside the range and q - zero point outside. What torch leaves open is
here: the step is learned as its logarithm, and where zero lies in the range as a share of it, so that one step of Adam moves both
by its learning rate in proportion, whatever their size; both gradients are divided by sqrt(numbers * largest level), as in LSQ.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from qskd.quantization.calibration import Seen, best_range, best_steps

Mode = Literal["off", "observing", "on"]


def levels_of(bits: int) -> tuple[int, int]:
    """The lowest and the highest whole number of a weight: -128 and 127 of 8 bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def counts_of(bits: int) -> tuple[int, int]:
    """The lowest and the highest whole number of an activation: 0 and 255 of 8 bits. Not -128 and 127, which would be the same to
    the eye: torch 2.13 rounds a zero point below 0 in one way forward and in another backward."""
    return 0, 2**bits - 1


def scaled_gradient(value: Tensor, factor: Tensor | float) -> Tensor:
    """`value` as it is, with a gradient that is multiplied by `factor`."""
    fixed = value.detach()
    return fixed + (value - fixed) * factor


class WeightQuantiser(nn.Module):
    """Of a weight [C, ...]: one step a channel of its output, symmetric (zero is zero).

    log_step: [C], the logarithm of the step. mode: "off" gives the weight back as it is.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.bits, self.mode = bits, "off"
        self.lowest, self.highest = levels_of(bits)
        self.log_step = nn.Parameter(torch.zeros(len(weight), device=weight.device))
        self.factor = 1 / math.sqrt(weight[0].numel() * self.highest)

    @torch.no_grad()
    def calibrate(self, weight: Tensor) -> None:
        """The step of each channel that loses the least of it, squared."""
        self.log_step.copy_(best_steps(weight.float(), self.lowest, self.highest).log())

    @property
    def step(self) -> Tensor:
        return self.log_step.detach().exp()

    def forward(self, weight: Tensor) -> Tensor:
        if self.mode != "on" or weight.is_meta:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            if not (torch.is_grad_enabled() and self.log_step.requires_grad):
                zero = torch.zeros_like(self.log_step, dtype=torch.int32)
                return torch.fake_quantize_per_channel_affine(
                    weight.float(), self.step, zero, 0, self.lowest, self.highest
                )
            step = scaled_gradient(self.log_step.exp(), self.factor)
            zero = torch.zeros_like(self.log_step).detach()
            quantised: Tensor = torch._fake_quantize_learnable_per_channel_affine(
                weight.float(), step, zero, 0, self.lowest, self.highest, 1.0
            )
            return quantised


class ActivationQuantiser(nn.Module):
    """Of an activation of any shape: one step for all of it, and a zero point, a whole number of steps within the range, as every
    runtime has it (the paper's offset is any number).

    log_step: the step's logarithm. zero: where zero lies between the lowest level (0) and the highest (1). factor: of the
    gradients; of the numbers that one image has there. All [1]. mode: "observing" counts what it sees in training and changes
    nothing.
    """

    def __init__(self, bits: int, device: torch.device) -> None:
        super().__init__()
        self.bits, self.mode = bits, "off"
        self.lowest, self.highest = counts_of(bits)
        self.log_step = nn.Parameter(torch.zeros(1, device=device))
        self.zero = nn.Parameter(torch.full((1,), 0.5, device=device))
        self.register_buffer("factor", torch.ones(1, device=device))
        self.seen: Seen | None = None

    @torch.no_grad()
    def calibrate(self) -> bool:
        """Take the range that loses the least of what was seen, squared. False where nothing was: it stays off."""
        seen, self.seen = self.seen, None
        if seen is None or not seen.anything:
            return False
        low, high = best_range(seen, self.highest - self.lowest)
        self.log_step.fill_(math.log((high - low) / (self.highest - self.lowest)))
        self.zero.fill_(round(-low / (high - low) * (self.highest - self.lowest)) / (self.highest - self.lowest))
        self.get_buffer("factor").fill_(1 / math.sqrt(seen.numbers_of_one * self.highest))
        return True

    @property
    def step(self) -> Tensor:
        return self.log_step.detach().exp()

    @property
    def zero_point(self) -> Tensor:
        """[1] int32, within the levels."""
        place = self.lowest + self.zero.detach() * (self.highest - self.lowest)
        return place.round().clamp(self.lowest, self.highest).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "off" or x.is_meta:
            return x
        if self.mode == "observing":
            if self.training:
                assert self.seen is not None
                self.seen.count(x.detach())
            return x
        with torch.autocast(x.device.type, enabled=False):
            if not (torch.is_grad_enabled() and self.log_step.requires_grad):
                return torch.fake_quantize_per_tensor_affine(
                    x.float(), self.step, self.zero_point, self.lowest, self.highest
                ).to(x.dtype)
            factor = self.get_buffer("factor")
            step = scaled_gradient(self.log_step.exp(), factor)
            place = scaled_gradient(self.lowest + self.zero * (self.highest - self.lowest), factor)
            quantised: Tensor = torch._fake_quantize_learnable_per_tensor_affine(
                x.float(), step, place, self.lowest, self.highest, 1.0
            )
            return quantised.to(x.dtype)


class SavedWeight(nn.Module):
    """A weight's quantiser as a file has it; it learns no more. step: [C]."""

    step: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, step: Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.lowest, self.highest = levels_of(bits)
        # Not persistent: what is saved of the model stays plain transformers'.
        self.register_buffer("step", step, persistent=False)
        self.register_buffer("zero_point", torch.zeros(len(step), dtype=torch.int32), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        # As it was loaded it has its quantised values. ONNX has a name for those of 8 bits alone.
        if weight.is_meta or (self.bits < 8 and torch.onnx.is_in_onnx_export()):
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            return torch.fake_quantize_per_channel_affine(
                weight.float(), self.step, self.zero_point, 0, self.lowest, self.highest
            )


class SavedActivation(nn.Module):
    """An activation's quantiser as a file has it. step, zero_point: scalars."""

    step: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, step: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.lowest, self.highest = counts_of(bits)
        self.register_buffer("step", step, persistent=False)
        self.register_buffer("zero_point", zero_point, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x
        if self.bits < 8 and torch.onnx.is_in_onnx_export():  # the same in float
            level = (x * (1 / self.step)).round() + self.zero_point.to(x.dtype)
            return (level.clamp(self.lowest, self.highest) - self.zero_point.to(x.dtype)) * self.step
        with torch.autocast(x.device.type, enabled=False):
            return torch.fake_quantize_per_tensor_affine(
                x.float(), self.step, self.zero_point, self.lowest, self.highest
            ).to(x.dtype)
