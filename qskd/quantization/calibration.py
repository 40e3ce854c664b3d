"""Where quantisers begin: the ranges and steps that lose the least of what the first batches, and the weights, have.

What is seen is counted in whole numbers, so that the counts of several workers add up to those of one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PER_OCTAVE = 16  # bins: a bin's numbers differ by 4.4 %
_OCTAVES = 24  # below 1 and above it
_SIDE = 2 * _OCTAVES * _PER_OCTAVE  # bins of one sign
_SAMPLES = 16_384  # numbers of an image that are looked at, evenly spread
_CANDIDATES = 48
BINS = 2 * _SIDE + 1  # negative ones, the largest first; zero; positive ones
ROWS, NUMBERS = BINS, BINS + 1  # behind the bins: images, and all of their numbers


class Seen:
    """How often numbers of each size were seen. counts: [BINS + 2] int64."""

    def __init__(self, device: torch.device, counts: Tensor | None = None) -> None:
        if counts is None:
            counts = torch.zeros(BINS + 2, dtype=torch.int64)
        self.counts = counts.to(device)

    def count(self, x: Tensor) -> None:
        """x: [B, ...]."""
        each = max(x.numel() // max(x.shape[0], 1), 1)
        stride = max(each // _SAMPLES, 1)
        while math.gcd(stride, each) > 1:  # else some channels would never be looked at
            stride += 1
        numbers = x.reshape(x.shape[0], -1)[:, ::stride].flatten().float()
        size = (numbers.abs().clamp(min=2.0**-_OCTAVES).log2() * _PER_OCTAVE).round().long()
        place = (size + _OCTAVES * _PER_OCTAVE).clamp(0, _SIDE)
        place = (_SIDE + place * numbers.sign().long()).clamp(0, BINS - 1)
        self.counts.scatter_add_(0, place, torch.ones_like(place))
        self.counts[ROWS] += x.shape[0]
        self.counts[NUMBERS] += x.numel()

    @property
    def anything(self) -> bool:
        return bool(self.counts[:BINS].sum())

    @property
    def numbers_of_one(self) -> float:
        """Numbers that one image has there."""
        return float(self.counts[NUMBERS] / self.counts[ROWS].clamp(min=1))


def _middles() -> Tensor:
    """[BINS] float64: the number that stands for each bin."""
    side = 2.0 ** ((torch.arange(1, _SIDE + 1, dtype=torch.float64) - _OCTAVES * _PER_OCTAVE) / _PER_OCTAVE)
    return torch.cat([-side.flip(0), torch.zeros(1, dtype=torch.float64), side])


def best_range(seen: Seen, steps: int) -> tuple[float, float]:
    """(low, high), with 0 between them, of a quantiser of so many steps whose squared error on what was seen is the least."""
    counts, middles = seen.counts[:BINS].cpu().double(), _middles()
    there = middles[counts > 0]
    least, most = min(float(there.min()), 0.0), max(float(there.max()), 0.0)
    if least == most:  # nothing but zeros
        return -0.5, 0.5
    shares = torch.linspace(1, 1 / _CANDIDATES, _CANDIDATES, dtype=torch.float64)
    lows, highs = (-shares * abs(end) if end < 0 else shares * end if end else shares[:1] * 0 for end in (least, most))
    number = counts[counts > 0]
    best, lost = (least, most), math.inf
    for low in lows.tolist():
        step = (highs[:, None] - low) / steps
        below = (-low / step).round()  # steps below zero: its place is one of them
        level = (there / step).round().clamp(-below, steps - below)
        errors = ((level * step - there).square() * number).sum(1)
        place = int(errors.argmin())
        if float(errors[place]) < lost:
            best, lost = (low, float(highs[place])), float(errors[place])
    return best


def best_steps(weight: Tensor, lowest: int, highest: int) -> Tensor:
    """[C]: of each channel of a weight [C, ...], the step whose squared error is the least. A channel of zeros has 1."""
    flat = weight.flatten(1)
    largest = flat.abs().amax(1) / highest
    best, least = torch.where(largest > 0, largest, 1.0), torch.full_like(largest, float("inf"))
    for share in torch.linspace(1, 1 / _CANDIDATES, _CANDIDATES).tolist():
        step = torch.where(largest > 0, largest * share, 1.0)
        level = (flat / step[:, None]).round().clamp(lowest, highest)
        error = (level * step[:, None] - flat).square().sum(1)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best.clamp(min=torch.finfo(torch.float32).tiny)
