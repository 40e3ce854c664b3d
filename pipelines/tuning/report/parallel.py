"""A sweep's parallel coordinates: a line a trial, an axis a parameter. As PNG and to play with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.tuning.report.pictures import new_picture, plain_text
from pipelines.tuning.report.plots import new_plot, safe_text
from pipelines.tuning.report.results import RECIPE, SweepSummary
from pipelines.tuning.report.style import ABSENT, CROWD, FAINT, INK, RECIPE_COLOUR, SHADES, shade_colour, space_colours

MOST_AXES = 12  # side by side in a PNG; the page has all
LEFT, RIGHT = 170, 110  # margins of the plot, in pixels: the colour bar's, and the last name's


def draw_parallel(sweep: SweepSummary, title: str, path: Path) -> None:
    shown = [sweep.ap_axis, *sweep.axes[:MOST_AXES]]
    figure, axes = new_picture(max(7.2, 1.5 + 0.95 * len(shown)), 5.4)
    axes.set_axis_off()
    crowd = len(sweep.scored) > CROWD
    drawn = sorted(enumerate(sweep.scored), key=lambda each: (each[1].number == RECIPE, each[1].best_ap))
    for i, row in drawn:
        heights = [ABSENT if axis.positions[i] is None else axis.positions[i] for axis in shown]
        style: dict[str, Any] = {"lw": 1.0, "alpha": 0.35} if crowd else {"lw": 1.4, "alpha": 0.85}
        style |= {"color": shade_colour(sweep.shade(row.best_ap))}
        if row is sweep.best:
            style |= {"lw": 3.2, "alpha": 1.0}
        if row.number == RECIPE:
            style |= {"color": RECIPE_COLOUR, "lw": 2.2, "ls": (0, (5, 2)), "alpha": 1.0}
        axes.plot(range(len(shown)), heights, **style)
    box = {"boxstyle": "square,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.8}
    beside = {"ha": "right", "va": "center", "fontsize": 8, "bbox": box, "zorder": 6}
    spaces = space_colours(sweep)
    for x, axis in enumerate(shown):
        axes.plot([x, x], [0, 1], color=FAINT, lw=1, zorder=5)
        for at, text in axis.ticks:
            axes.plot([x - 0.04, x], [at, at], color=FAINT, lw=1, zorder=5)
            axes.text(x - 0.07, at, plain_text(text), color=INK, **beside)
        if None in axis.positions:
            axes.text(x - 0.07, ABSENT, "none", color=FAINT, **beside)
        above = {"rotation": 28, "rotation_mode": "anchor", "ha": "left", "va": "baseline", "fontsize": 9}
        axes.text(x - 0.05, 1.05, plain_text(axis.label), color=spaces.get(axis.space, INK), **above)
    longest = max(len(axis.label) for axis in shown)
    axes.set_ylim(ABSENT - 0.05, 1.07 + 0.0105 * longest)  # room for the names, which lean
    axes.set_xlim(-0.6, len(shown) - 1 + 0.085 * len(shown[-1].label))
    more = len(sweep.axes) + 1 - len(shown)
    which = "most important" if sweep.importances else "first"
    said = f" (the {MOST_AXES} {which} of {len(sweep.axes)} parameters)" if more else ""
    axes.set_title(plain_text(title) + said, loc="left", fontweight="bold")
    _parallel_legend(axes, sweep, spaces)
    figure.savefig(path)


def _parallel_legend(axes: Any, sweep: SweepSummary, spaces: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=shade_colour(1), lw=3.2, label="the best")]
    if any(row.number == RECIPE for row in sweep.scored):
        handles += [Line2D([], [], color=RECIPE_COLOUR, ls=(0, (5, 2)), lw=2.2, label="the recipe")]
    handles += [Line2D([], [], color=shade_colour(0), lw=1.4, label="the worst")]
    names = [Line2D([], [], ls="", marker="s", color=c, label=plain_text(s)) for s, c in spaces.items()]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "ncols": len(handles) + len(names)}
    axes.legend(handles=handles + names, frameon=False, fontsize=9, **place)


def plot_parallel(sweep: SweepSummary) -> Any:
    """All parameters that vary; parts of axes can be chosen with the pointer, and axes moved."""
    shown, spaces = [sweep.ap_axis, *sweep.axes], space_colours(sweep)
    width = max(900, LEFT + RIGHT + 90 * len(shown))
    top_margin = 75 + 4 * max(len(axis.label) for axis in shown)
    figure = new_plot("", "", height=450 + top_margin)
    dimensions = []
    for axis in shown:
        ticks = [*axis.ticks, *([(ABSENT, "none")] if None in axis.positions else [])]
        dimensions.append(
            {
                "label": f'<span style="color:{spaces.get(axis.space, INK)}">{safe_text(axis.label)}</span>',
                "values": [ABSENT if at is None else at for at in axis.positions],
                "range": [ABSENT if None in axis.positions else 0, 1],
                "tickvals": [at for at, _ in ticks],
                "ticktext": [text for _, text in ticks],  # plotly takes these as they are
            }
        )
    # The recipe has the colour above the scale of AP.
    top, last = 1.25, len(SHADES) - 1
    scale = [[i / last / top, colour] for i, colour in enumerate(SHADES)]
    scale += [[1 / top + 1e-3, "white"], [1.15 / top, "white"], [1.15 / top + 1e-3, RECIPE_COLOUR], [1, RECIPE_COLOUR]]
    has_recipe = any(row.number == RECIPE for row in sweep.scored)
    ticks = [*sweep.ap_axis.ticks, *([(1.2, "the recipe")] if has_recipe else [])]
    bar = {
        "thickness": 14,
        "outlinewidth": 0,
        "x": -115 / (width - LEFT - RIGHT),
        "xref": "paper",
        "ticklabelposition": "outside",
    }
    bar |= {"tickvals": [at for at, _ in ticks], "ticktext": [text for _, text in ticks]}
    colours = [1.2 if row.number == RECIPE else sweep.shade(row.best_ap) for row in sweep.scored]
    line = {"color": colours, "cmin": 0, "cmax": top if has_recipe else 1, "showscale": True, "colorbar": bar}
    line["colorscale"] = scale if has_recipe else list(SHADES)
    figure.add_parcoords(
        dimensions=dimensions,
        line=line,
        labelangle=-28,
        labelside="top",
        tickfont={"size": 11, "color": INK},
        unselected={"line": {"color": "#dddddd", "opacity": 0.25}},
    )
    names = [f'<span style="color:{colour}">■ {safe_text(space)}</span>' for space, colour in spaces.items()]
    place = {"xref": "paper", "yref": "paper", "x": 0, "y": 0, "xanchor": "left", "yanchor": "top", "yshift": -14}
    figure.add_annotation(text="&nbsp;&nbsp; ".join(names), showarrow=False, **place)
    # Names lean to the right; what says most is at the left, in sight however many axes there are.
    figure.update_layout(margin={"l": LEFT, "r": RIGHT, "t": top_margin, "b": 50}, width=width)
    return figure
