"""Means over seeds with their 95 % intervals (Student's t)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t

Scores = dict[int, float]  # by seed


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95 % interval; NaN with fewer than two values."""

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        if len(values) < 2:
            return cls(values[0] if values else math.nan, math.nan, len(values))
        half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), half, len(values))

    def show(self, scale: float = 1.0, digits: int = 1, sign: str = "") -> str:
        spread = "" if math.isnan(self.half) else f" ± {scale * self.half:.{digits}f}"
        return f"{scale * self.mean:{sign}.{digits}f}{spread}"


def paired(a: Scores, b: Scores) -> list[float]:
    """Differences of the seeds that both have."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
