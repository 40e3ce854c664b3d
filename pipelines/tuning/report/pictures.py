"""A sweep's pictures as PNG, by matplotlib without its global state. `plots` draws the same to play with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.tuning.report import style
from pipelines.tuning.report.results import (
    RECIPE,
    SweepSummary,
    band_label,
    best_so_far,
    boundaries,
    cost_rows,
    front_rows,
)
from pipelines.tuning.trial.row import TrialRow

MOST_BARS = 20


def plain_text(text: str) -> str:
    """matplotlib takes what is between two $ for mathematics."""
    return text.replace("$", r"\$")


def new_picture(width: float = 7.2, height: float = 4.4) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(style.FAINT)
    axes.tick_params(colors=style.FAINT)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    return figure, axes


def _labels(axes: Any, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(plain_text(title), loc="left", fontweight="bold")


def _colour_bar(figure: Any, axes: Any, sweep: SweepSummary) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    aps = [100 * row.best_ap for row in sweep.scored]
    if min(aps) < max(aps):
        scale = ScalarMappable(Normalize(min(aps), max(aps)), LinearSegmentedColormap.from_list("ap", style.SHADES))
        bar = figure.colorbar(scale, ax=axes, label=style.AP_LABEL, fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=style.FAINT)


def _dots(axes: Any, sweep: SweepSummary, rows: Sequence[TrialRow], x: Sequence[float]) -> None:
    """Trials as dots at (x, AP): hollow those stopped early, a star the recipe, a ring the best."""
    for row, at in zip(rows, x, strict=True):
        colour = style.RECIPE_COLOUR if row.number == RECIPE else style.shade_colour(sweep.shade(row.best_ap))
        hollow = row.state == "stopped" and row.number != RECIPE
        shape = {"marker": "*", "s": 190} if row.number == RECIPE else {"marker": "o", "s": 34}
        axes.scatter(
            at,
            100 * row.best_ap,
            fc="white" if hollow else colour,
            ec=colour,
            lw=1.3,
            zorder=4 if hollow else 5,
            **shape,
        )
        if row is sweep.best:
            axes.scatter(at, 100 * row.best_ap, s=150, fc="none", ec=style.INK, lw=1.3, zorder=6)


def _legend(axes: Any, sweep: SweepSummary, rows: Sequence[TrialRow], extra: Sequence[Any] = (), **where: Any) -> None:
    """Of the marks there are."""
    from matplotlib.lines import Line2D

    def mark(label: str, **look: Any) -> Line2D:
        return Line2D([], [], ls="", label=label, **{"marker": "o", "ms": 6, "color": style.SHADES[3], **look})

    states = {row.state for row in rows if row.number != RECIPE}
    handles = list(extra)
    handles += [mark("finished")] if states - {"stopped"} else []
    handles += [mark("stopped early", mfc="white")] if "stopped" in states else []
    handles += (
        [mark("the recipe", marker="*", ms=13, color=style.RECIPE_COLOUR)]
        if any(r.number == RECIPE for r in rows)
        else []
    )
    handles += [mark("the best", ms=11, mfc="none", color=style.INK)] if sweep.best in rows else []
    axes.legend(handles=handles, frameon=False, labelcolor=style.INK, fontsize=9, **{"loc": "best", **where})


def draw_history(sweep: SweepSummary, title: str, path: Path) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_picture()
    rows = sweep.scored
    last = max(row.number for row in sweep.rows)
    best = [100 * ap for ap in best_so_far(rows)]
    axes.step([*(row.number for row in rows), last], [*best, best[-1]], where="post", color=style.INK, lw=1.5, zorder=3)
    _dots(axes, sweep, rows, [row.number for row in rows])
    extra = [Line2D([], [], color=style.INK, lw=1.5, label="best so far")]
    if sweep.failed:
        numbers = [row.number for row in sweep.failed]
        axes.scatter(
            numbers, [0.02] * len(numbers), marker="x", c=style.FAILED, s=34, transform=axes.get_xaxis_transform()
        )
        extra.append(Line2D([], [], ls="", marker="x", ms=6, color=style.FAILED, label="failed"))
    axes.margins(y=0.12)
    axes.set_xlim(-0.5 - 0.03 * last, last + 0.5 + 0.03 * last)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _labels(axes, "trial", style.AP_LABEL, title)
    _legend(axes, sweep, rows, extra, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path)


def draw_curves(sweep: SweepSummary, title: str, path: Path) -> None:
    from matplotlib.lines import Line2D

    figure, axes = new_picture()
    crowd = len(sweep.rows) > style.CROWD
    for row in sorted(sweep.failed + sweep.scored, key=lambda row: row.best_ap):
        if not row.curve:
            continue
        epochs, aps = [at for at, _ in row.curve], [100 * ap for _, ap in row.curve]
        look: dict[str, Any] = {
            "color": style.shade_colour(sweep.shade(row.best_ap)),
            "lw": 1.0 if crowd else 1.5,
            "zorder": 3,
        }
        if row.state == "failed":
            look |= {"color": style.FAILED, "ls": (0, (1, 1.2)), "zorder": 2}
        if row.number == RECIPE:
            look |= {"color": style.RECIPE_COLOUR, "ls": (0, (5, 2)), "lw": 2.2, "zorder": 5}
        if row is sweep.best:
            look |= {"lw": 3.0, "zorder": 4}
        axes.plot(epochs, aps, marker="" if crowd and len(epochs) > 1 else "o", ms=3.5, **look)
        end = {"marker": "x" if row.state == "failed" else "o", "ms": 3 if crowd else 5.5}
        axes.plot(epochs[-1], aps[-1], color=look["color"], zorder=5, **end)
    handles = []
    if any(row.number == RECIPE for row in sweep.scored):
        handles.append(Line2D([], [], color=style.RECIPE_COLOUR, ls=(0, (5, 2)), lw=2.2, label="the recipe"))
    if sweep.best is not None and sweep.best.number != RECIPE:
        colour = style.shade_colour(1.0)
        handles.append(Line2D([], [], color=colour, lw=3, label=f"the best, trial {sweep.best.number}"))
    if any(row.curve for row in sweep.failed):
        handles.append(Line2D([], [], color=style.FAILED, ls=(0, (1, 1.2)), marker="x", label="failed"))
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    _labels(axes, "epochs trained", style.AP_LABEL, title)
    axes.legend(handles=handles, frameon=False, fontsize=9, loc="upper left")
    _colour_bar(figure, axes, sweep)
    figure.savefig(path)


def draw_importance(sweep: SweepSummary, title: str, path: Path) -> None:
    from matplotlib.patches import Patch

    found = list(sweep.importances.items())[:MOST_BARS]
    figure, axes = new_picture(7.2, 1.3 + 0.28 * len(found))
    labels = {axis.name: axis.label for axis in sweep.axes}
    spaces, space_of = style.space_colours(sweep), {axis.name: axis.space for axis in sweep.axes}
    colours = [spaces.get(space_of[name], style.SHADES[3]) for name, _ in found]
    bars = axes.barh(range(len(found)), [100 * part for _, part in found], color=colours, height=0.66)
    axes.bar_label(bars, [style.part_text(part) for _, part in found], padding=4, color=style.INK)
    if spaces:
        handles = [Patch(color=colour, label=plain_text(space)) for space, colour in spaces.items()]
        axes.legend(handles=handles, frameon=False, fontsize=9, loc="lower right")
    axes.set_yticks(range(len(found)), [plain_text(labels[name]) for name, _ in found], color=style.INK)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    more = len(sweep.importances) - len(found)
    said = f" ({more} more have less)" if more else ""
    _labels(axes, f"part of the variance of AP that it explains, %{said}", "", title)
    figure.savefig(path)


def draw_front(sweep: SweepSummary, title: str, path: Path, cost: str) -> None:
    from matplotlib.lines import Line2D

    figure, axes = new_picture()
    rows, front = cost_rows(sweep, cost), front_rows(sweep, cost)
    x = [getattr(row, cost) for row in front]
    y = [100 * row.best_ap for row in front]
    right = max(getattr(row, cost) for row in rows)
    axes.step([*x, right], [*y, y[-1]], where="post", color=style.INK, lw=1.5, zorder=3)
    _dots(axes, sweep, rows, [getattr(row, cost) for row in rows])
    axes.margins(x=0.06, y=0.14)
    for row in style.numbered(sweep, cost):  # above the line and to its left, where the front leaves room
        place = {
            "xytext": (-7, 7),
            "textcoords": "offset points",
            "ha": "right",
            "fontsize": 9,
            "color": style.INK,
            "zorder": 7,
        }
        axes.annotate(str(row.number), (getattr(row, cost), 100 * row.best_ap), **place)
    _labels(axes, style.COSTS[cost], style.AP_LABEL, title)
    _legend(
        axes,
        sweep,
        rows,
        [Line2D([], [], color=style.INK, lw=1.5, label="Pareto front")],
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )
    figure.savefig(path)


def draw_boundary(sweep: SweepSummary, title: str, path: Path) -> None:
    figure, axes = new_picture()
    chosen = [(row, boundaries(row, sweep.recipe)) for row in sweep.scored]
    for row, places in chosen:
        recipe = row.number == RECIPE
        ap = 100 * row.best_ap
        axes.plot(
            places,
            [ap] * len(places),
            color=style.RECIPE_COLOUR if recipe else "0.75",
            lw=1.6 if recipe else 1,
            zorder=2,
        )
    for band in range(max(len(places) for _, places in chosen)):
        those = [(row, places[band]) for row, places in chosen if len(places) > band]
        colour = style.BAND_COLOURS[band % len(style.BAND_COLOURS)]
        plain = [(at, 100 * row.best_ap) for row, at in those if row.number != RECIPE]
        axes.scatter(
            *(zip(*plain, strict=True) if plain else ([], [])), s=38, color=colour, label=band_label(band), zorder=3
        )
        for row, at in those:
            if row is sweep.best:
                axes.scatter(at, 100 * row.best_ap, s=150, fc="none", ec=style.INK, lw=1.3, zorder=5)
            if row.number == RECIPE:
                axes.scatter(
                    at, 100 * row.best_ap, s=190, marker="*", fc=style.RECIPE_COLOUR, ec="white", lw=0.6, zorder=4
                )
    if any(row.number == RECIPE for row, _ in chosen):
        axes.scatter([], [], s=150, marker="*", color=style.RECIPE_COLOUR, label="the recipe's")
    axes.scatter([], [], s=110, fc="none", ec=style.INK, lw=1.3, label="the best trial's")
    axes.margins(y=0.1)
    _labels(axes, "GIoU boundary", style.AP_LABEL, title)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)
