"""What a sweep's trials say, before anyone draws it: order, the best, the Pareto front, axes, importance. No drawing here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines.tuning.report.axes import Axis, importances, make_axis, value_text
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.config.recipe import flatten, to_tree
from qskd.evaluation.shown import is_measured

RECIPE = 0  # the number of the trial that is the recipe itself
QUANTIZATION = "student.quantization"
BOUNDARIES = "distillation.selection.boundaries"


# --- ranking --------------------------------------------------------------------------------------------------------
def has_ap(row: TrialRow) -> bool:
    """Whether the trial counts: it was evaluated and has not failed. (A validation set without objects has AP -1.)"""
    return row.state != "failed" and row.best_ap >= 0


def _rank(row: TrialRow) -> tuple[float, float, int]:
    return -row.best_ap, row.parameters_m if row.parameters_m is not None else math.inf, row.number


def ranked(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Best first: by AP, of equals the smaller, then the earlier. Then those without an AP yet, then the failed."""
    scored = sorted((row for row in rows if has_ap(row)), key=_rank)
    rest = sorted((row for row in rows if not has_ap(row)), key=lambda row: (row.state == "failed", row.number))
    return scored + rest


def best_row(rows: Sequence[TrialRow], most_parameters_m: float | None = None) -> TrialRow | None:
    """The first of `ranked`, of those with no more parameters (millions) where a limit is given; None when there is none.

    Under a limit, a trial whose size is not known is left out.
    """
    fits = [
        row
        for row in rows
        if has_ap(row)
        and (most_parameters_m is None or (row.parameters_m is not None and row.parameters_m <= most_parameters_m))
    ]
    return min(fits, key=_rank, default=None)


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats: none is as cheap and as good, and cheaper or better. By ascending cost."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        twin = bool(front) and (costs[i], values[i]) == (costs[front[-1]], values[front[-1]])
        if not front or values[i] > values[front[-1]] or twin:
            front.append(i)
    return front


def measured_curve(row: TrialRow) -> list[tuple[float, float]]:
    """(epochs, AP) of the trial's evaluations that could be measured."""
    return [(epochs, ap) for epochs, ap in row.curve if is_measured(ap)]


# --- words ----------------------------------------------------------------------------------------------------------
def ap_text(ap: float) -> str:
    """AP as a fraction, as every program of qskd, MLflow and COCO's own evaluation have it."""
    return f"{ap:.3f}"


def epochs_text(epochs: float) -> str:
    return f"{epochs:.3g}" if epochs < 100 else f"{epochs:.0f}"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each dotted name without its first part, where the rest tells it from the others; underscores as spaces.

    distillation.predictions.l1_weight -> "predictions.l1 weight"; loss_weights.warmup -> "warmup".
    """
    counts = Counter(name.partition(".")[2] or name for name in set(names))
    shorts = {name: name.partition(".")[2] or name for name in names}
    return {name: (short if counts[short] == 1 else name).replace("_", " ") for name, short in shorts.items()}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and isinstance(a, bool) == isinstance(b, bool):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return bool(a == b)


def differences(row: TrialRow, own: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted fields in which the trial differs from `own`, the recipe's; what is not among those differs."""
    return {
        name: value for name, value in flatten(row.overrides).items() if name not in own or not _same(value, own[name])
    }


def differences_text(row: TrialRow, own: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Those fields as words, "width 96"; of the recipe itself, that it is it."""
    if row.number == RECIPE:
        return ["the recipe itself"]
    return [f"{names.get(name, name)} {value_text(value)}" for name, value in differences(row, own).items()]


def field_names(rows: Sequence[TrialRow]) -> dict[str, str]:
    """Every field that some trial sets -> its short name."""
    return short_names(list(dict.fromkeys(name for row in rows for name in flatten(row.overrides))))


# --- the whole -----------------------------------------------------------------------------------------------------
def boundaries(row: TrialRow, recipe: Config) -> list[float]:
    """The trial's GIoU boundaries, ascending: its own, or the recipe's."""
    own = flatten(to_tree(recipe)).get(BOUNDARIES, ())
    return [float(each) for each in flatten(row.overrides).get(BOUNDARIES, own)]


def bits_of(row: TrialRow, recipe: Config) -> str:
    """The bits that the trial's student learnt with, as student.quantization says them; empty: in float."""
    found = flatten(row.overrides)
    for name in (f"{QUANTIZATION}.bits", QUANTIZATION):
        if name in found:
            return str(found[name] or "")
    own = recipe.student.quantization
    return own.bits if own is not None else ""


def _shown_value(row: TrialRow, name: str, recipe: Config, absent: Any) -> Any:
    """What the trial has for a parameter. query_selection asks for shares of the room that is left: the GIoU says more."""
    if name not in row.parameters:
        return absent
    prefix, _, band = name.rpartition("_")
    chosen = boundaries(row, recipe)
    if prefix == "query_selection.boundary" and band.isdigit() and 1 <= int(band) <= len(chosen):
        return chosen[int(band) - 1]
    return row.parameters[name]


@dataclass(frozen=True)
class SweepSummary:
    """A sweep as its pictures see it."""

    rows: tuple[TrialRow, ...]
    recipe: Config

    @cached_property
    def scored(self) -> list[TrialRow]:
        """Trials with an AP, in the order of their numbers: what axes' positions refer to."""
        return sorted((row for row in self.rows if has_ap(row)), key=lambda row: row.number)

    @cached_property
    def failed(self) -> list[TrialRow]:
        return sorted((row for row in self.rows if row.state == "failed"), key=lambda row: row.number)

    @cached_property
    def best(self) -> TrialRow | None:
        return best_row(self.rows)

    @cached_property
    def _own(self) -> dict[str, Any]:
        return flatten(to_tree(self.recipe))

    @cached_property
    def names(self) -> dict[str, str]:
        return field_names(self.rows)

    @cached_property
    def axes(self) -> list[Axis]:
        """Of the parameters that vary between trials with an AP; the most important first, where that is known."""
        found = self._all_axes
        place = {name: i for i, name in enumerate(self.importances)}
        return sorted(found, key=lambda axis: place.get(axis.name, len(place)))

    @cached_property
    def importances(self) -> dict[str, float]:
        return importances(self._all_axes, [row.best_ap for row in self.scored])

    @cached_property
    def _all_axes(self) -> list[Axis]:
        names = list(dict.fromkeys(name for row in self.scored for name in row.parameters))
        labels, absent = short_names(names), object()
        values = {name: [_shown_value(row, name, self.recipe, absent) for row in self.scored] for name in names}
        found = (make_axis(name, labels[name], values[name], absent) for name in names)
        return [axis for axis in found if axis is not None]

    @cached_property
    def _ap_range(self) -> tuple[float, float]:
        aps = [row.best_ap for row in self.scored]
        return min(aps), max(aps)

    def shade(self, ap: float) -> float:
        """AP -> 0 (the worst trial's) to 1 (the best's)."""
        low, high = self._ap_range
        return (ap - low) / (high - low) if high > low else 1.0

    def differences(self, row: TrialRow) -> list[str]:
        return differences_text(row, self._own, self.names)

    @cached_property
    def ap_axis(self) -> Axis:
        """AP as the first of the parallel coordinates."""
        aps = [row.best_ap for row in self.scored]
        found = make_axis("AP", "AP", aps)
        return found or Axis("AP", "AP", (1.0,) * len(aps), ((1.0, ap_text(aps[0])),))

    @cached_property
    def spaces(self) -> list[str]:
        """The search spaces whose parameters have axes."""
        return sorted({axis.space for axis in self.axes})


def best_so_far(rows: Sequence[TrialRow]) -> list[float]:
    """The largest AP of the trials up to each."""
    return [max(row.best_ap for row in rows[: i + 1]) for i in range(len(rows))]


def cost_rows(sweep: SweepSummary, cost: str) -> list[TrialRow]:
    """The trials with an AP whose cost is known."""
    return [row for row in sweep.scored if getattr(row, cost) is not None]


def front_rows(sweep: SweepSummary, cost: str) -> list[TrialRow]:
    """Of those the ones that no other beats, cheapest first."""
    rows = cost_rows(sweep, cost)
    return [rows[i] for i in pareto_front([getattr(row, cost) for row in rows], [row.best_ap for row in rows])]


def band_label(band: int) -> str:
    return f"{('lowest', 'second', 'third')[band] if band < 3 else f'{band + 1}th'} boundary"
