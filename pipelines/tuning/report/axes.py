"""A sweep's parameters laid out from 0 to 1, for drawing and for asking which of them matter."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

LEAST_TRIALS = 4  # fewer say nothing about which parameter matters
TREES = 32  # of the forest behind fANOVA; a few seconds with 200 trials of 20 parameters
LOG_RATIO = 10.0  # positive numbers that span this much are drawn by their logarithm


def value_text(value: Any) -> str:
    """A parameter's value to read: three digits, YAML's words."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(value_text, value)) + "]"
    return str(value)


@dataclass(frozen=True)
class Axis:
    """A parameter laid out from 0 to 1. positions: of each trial with an AP, None where it was not asked for."""

    name: str
    label: str
    positions: tuple[float | None, ...]
    ticks: tuple[tuple[float, str], ...]
    categorical: bool = False

    @property
    def space(self) -> str:
        """The search space that asks for it."""
        return self.name.partition(".")[0]

    @property
    def usual(self) -> float:
        """What a trial without the parameter counts as, where each must have a value: the most frequent, or the median."""
        present = [position for position in self.positions if position is not None]
        return Counter(present).most_common(1)[0][0] if self.categorical else median(present)


def _clipped(text: str, most: int = 36) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def make_axis(name: str, label: str, values: Sequence[Any], absent: Any = None) -> Axis | None:
    """The axis of these values, one a trial, `absent` where a trial has none; None when fewer than two differ."""
    label = _clipped(label)
    present = [value for value in values if value is not absent]
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in present)
    if not numeric:
        words = sorted({value_text(value) for value in present})
        if len(words) < 2:
            return None
        at = {word: i / (len(words) - 1) for i, word in enumerate(words)}
        where = tuple(None if value is absent else at[value_text(value)] for value in values)
        return Axis(
            name, label, where, tuple((position, _clipped(word)) for word, position in at.items()), categorical=True
        )
    low, high = min(present, default=0), max(present, default=0)
    if low == high:
        return None
    log = low > 0 and high / low >= LOG_RATIO

    def position(value: float) -> float:
        part = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return min(max(part, 0.0), 1.0)

    numbers = tuple(None if value is absent else position(value) for value in values)
    ticks = ((position(tick), value_text(tick)) for tick in _tick_values(present, log))
    return Axis(name, label, numbers, tuple(ticks))


def _tick_values(present: Sequence[float], log: bool) -> list[float]:
    """The values themselves where they are few, else round numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    distinct = sorted(set(present))
    if len(distinct) <= 6 and (not log or len(distinct) <= 3):
        gap = min(b - a for a, b in itertools.pairwise(distinct)) / (distinct[-1] - distinct[0])
        if log or gap > 0.08:
            return distinct
    low, high = distinct[0], distinct[-1]
    whole = all(isinstance(value, int) for value in distinct)
    decades = math.log10(high / low) if log else 0.0
    subs = (1.0,) if decades > 4 else (1.0, 3.0) if decades > 2 else (1.0, 2.0, 5.0)
    found = LogLocator(subs=subs, numticks=99).tick_values(low, high) if log else None
    locator = MaxNLocator(nbins=5, integer=whole)
    ticks = [float(tick) for tick in (found if found is not None else locator.tick_values(low, high))]
    inside = [int(tick) if whole else tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else [low, high]


def importances(axes: Sequence[Axis], values: Sequence[float]) -> dict[str, float]:
    """The part of the values' variance that each axis explains by itself, by Optuna's fANOVA; together 1, largest first.

    A trial without the parameter counts as the usual one: the parameter that decides whether it is asked for is an axis
    too. Empty where nothing can be said: fewer than LEAST_TRIALS values, all the same, or no axis.
    """
    if len(values) < LEAST_TRIALS or not axes or max(values) - min(values) < 1e-9:
        return {}
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    spaces: dict[str, BaseDistribution] = {
        axis.name: CategoricalDistribution([at for at, _ in axis.ticks])
        if axis.categorical
        else FloatDistribution(0, 1)
        for axis in axes
    }
    with _quiet_optuna():
        study = optuna.create_study(direction="maximize")
    for i, value in enumerate(values):
        placed = {axis.name: axis.usual if axis.positions[i] is None else axis.positions[i] for axis in axes}
        study.add_trial(optuna.trial.create_trial(params=placed, distributions=spaces, value=value))
    forest = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=forest)
    return dict(sorted(((name, float(part)) for name, part in found.items()), key=lambda item: (-item[1], item[0])))


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without "A new study created in memory" on the terminal."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
