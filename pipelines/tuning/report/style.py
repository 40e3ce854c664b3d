"""Colours and words that a sweep's PNGs and its HTML plots share."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.tuning.report.results import SweepSummary, cost_rows, front_rows
from pipelines.tuning.trial.row import TrialRow

# From the worst AP to the best. The palest of such scales is left out: it can't be seen on white.
SHADES = ("#8fd0bd", "#5dbcc4", "#35a0c4", "#2279b5", "#24539f", "#1a2f7d")
RECIPE_COLOUR = "#d55e00"  # vermilion, far from all shades with every kind of colour blindness
INK, FAINT, FAILED = "#212121", "#6e6e6e", "#9e9e9e"
BAND_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
SPACE_COLOURS = ("#2279b5", "#7b4fa3", "#3f7d20", "#b03a6b", "#6b5b3e")
COSTS = {
    "latency_ms": "latency of one image, ms",
    "parameters_m": "parameters, millions",
    "size_mb": "size at its bits, MB",
}
AP_LABEL = "AP"
CROWD = 60  # so many trials are drawn thinner
ABSENT = -0.13  # where a line passes an axis that its trial has no value on


def shade_colour(shade: float) -> str:
    """0..1 -> a colour between SHADES, as hex."""
    at = min(max(shade, 0.0), 1.0) * (len(SHADES) - 1)
    low = min(int(at), len(SHADES) - 2)
    pair = [[int(SHADES[i][c : c + 2], 16) for c in (1, 3, 5)] for i in (low, low + 1)]
    return "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in zip(*pair, strict=True))


def space_colours(sweep: SweepSummary) -> dict[str, str]:
    """Of each search space, where there are several to tell apart; otherwise none."""
    several = sweep.spaces if len(sweep.spaces) > 1 else []
    return {space: SPACE_COLOURS[i % len(SPACE_COLOURS)] for i, space in enumerate(several)}


def part_text(part: float) -> str:
    """An importance, 0..1."""
    return f"{100 * part:.0f} %" if part >= 0.005 else "< 1 %"


def numbered(sweep: SweepSummary, cost: str) -> list[TrialRow]:
    """The trials of the front that have room for their number beside them; where it is crowded, the better."""
    rows, kept = cost_rows(sweep, cost), list[TrialRow]()

    def spread(values: Sequence[float]) -> float:
        return max(values) - min(values) or 1.0

    wide, high = spread([getattr(row, cost) for row in rows]), spread([row.best_ap for row in rows])
    for row in reversed(front_rows(sweep, cost)):
        apart = not kept or (getattr(kept[-1], cost) - getattr(row, cost)) / wide > 0.04
        if apart or kept[-1].best_ap - row.best_ap > 0.06 * high:
            kept.append(row)
    return kept
