"""A sweep's pictures to play with: HTML by plotly, each page by itself and offline. `pictures` has the PNGs."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from pipelines.tuning.report.results import (
    RECIPE,
    SweepSummary,
    ap_text,
    band_label,
    best_so_far,
    boundaries,
    cost_rows,
    epochs_text,
    front_rows,
    measured_curve,
)
from pipelines.tuning.report.style import (
    AP_LABEL,
    BAND_COLOURS,
    COSTS,
    CROWD,
    FAILED,
    FAINT,
    INK,
    RECIPE_COLOUR,
    SHADES,
    numbered,
    part_text,
    shade_colour,
    space_colours,
)
from pipelines.tuning.trial.row import TrialRow

MOST_LINES = 16  # in what is shown of a trial under the pointer
_AXIS = {"showgrid": True, "gridcolor": "#ececec", "zeroline": False, "linecolor": FAINT, "ticks": "outside"}


def safe_text(text: str) -> str:
    """plotly's texts know some HTML: none of it may come from a name."""
    return html.escape(text, quote=False)


def about(sweep: SweepSummary, row: TrialRow) -> str:
    """What is shown of a trial under the pointer."""
    what = "the recipe" if row.number == RECIPE else f"trial {row.number}"
    head = f"<b>{what}</b>, {row.state}" + (", the best" if row is sweep.best else "")
    facts = [f"AP {ap_text(row.best_ap)}"] if row.best_ap >= 0 else []
    facts += [f"AP50 {ap_text(row.metrics['AP50'])}"] if row.metrics.get("AP50", -1) >= 0 else []
    facts += [f"{epochs_text(row.epochs)} epochs"]
    facts += [f"{row.parameters_m:.2f} M parameters"] if row.parameters_m is not None else []
    facts += [f"{row.size_mb:.3g} MB"] if row.size_mb is not None else []
    facts += [f"{row.latency_ms:.1f} ms"] if row.latency_ms is not None else []
    lines = [head, ", ".join(facts)]
    differs = [] if row.number == RECIPE else [safe_text(text) for text in sweep.differences(row)]
    lines += [*differs[:MOST_LINES], f"and {len(differs) - MOST_LINES} more"] if len(differs) > MOST_LINES else differs
    lines += [safe_text(row.reason[:160])] if row.reason else []
    return "<br>".join(lines)


def new_plot(x: str, y: str, height: int = 480) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        margin={"l": 70, "r": 20, "t": 40, "b": 60},
        xaxis={**_AXIS, "title": {"text": x}, "showgrid": False},
        yaxis={**_AXIS, "title": {"text": y}},
        hoverlabel={"bgcolor": "white", "align": "left", "font": {"size": 12, "color": INK}, "bordercolor": FAINT},
        hovermode="closest",
    )
    return figure


def _line(figure: Any, x: Sequence[float], y: Sequence[float], name: str, **style: Any) -> None:
    line = {"color": INK, "width": 2, **style}
    figure.add_scatter(x=list(x), y=list(y), mode="lines", name=name, line=line, hoverinfo="skip")


def _colours(sweep: SweepSummary, rows: Sequence[TrialRow]) -> list[str]:
    return [RECIPE_COLOUR if row.number == RECIPE else shade_colour(sweep.shade(row.best_ap)) for row in rows]


def _dots(figure: Any, sweep: SweepSummary, rows: Sequence[TrialRow], x: Sequence[float]) -> None:
    """Trials as dots at (x, AP), in groups that the legend switches on and off."""
    at = dict(zip((row.number for row in rows), x, strict=True))
    groups = {
        "finished": [row for row in rows if row.number != RECIPE and row.state != "stopped"],
        "stopped early": [row for row in rows if row.number != RECIPE and row.state == "stopped"],
        "the recipe": [row for row in rows if row.number == RECIPE],
        "the best": [row for row in rows if row is sweep.best],
    }
    for name, those in groups.items():
        colours = _colours(sweep, those)
        shape: dict[str, Any] = {
            "size": 10,
            "symbol": "circle",
            "line": {"width": 2, "color": colours},
            "color": colours,
        }
        if name == "stopped early":
            shape |= {"color": "white"}
        if name == "the recipe":
            shape |= {"size": 17, "symbol": "star"}
        if name == "the best":
            shape = {"size": 19, "symbol": "circle-open", "line": {"width": 2}, "color": INK}
        if those:
            figure.add_scatter(
                x=[at[row.number] for row in those],
                y=[row.best_ap for row in those],
                mode="markers",
                name=name,
                marker=shape,
                text=[about(sweep, row) for row in those],
                hoverinfo="text",
            )


def plot_history(sweep: SweepSummary) -> Any:
    figure = new_plot("trial", AP_LABEL)
    rows, last = sweep.scored, max(row.number for row in sweep.rows)
    best = best_so_far(rows)
    _line(figure, [*(row.number for row in rows), last], [*best, best[-1]], "best so far", shape="hv")
    _dots(figure, sweep, rows, [row.number for row in rows])
    if sweep.failed:
        low, high = min(row.best_ap for row in rows), best[-1]
        figure.add_scatter(
            x=[row.number for row in sweep.failed],
            y=[low - 0.08 * (high - low or 0.01)] * len(sweep.failed),
            mode="markers",
            name="failed",
            marker={"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": FAILED}},
            text=[about(sweep, row) for row in sweep.failed],
            hoverinfo="text",
        )
    return figure


def plot_curves(sweep: SweepSummary) -> Any:
    figure = new_plot("epochs trained", AP_LABEL)
    marked = {RECIPE, sweep.best.number if sweep.best is not None else RECIPE}  # drawn last, on top
    for row in sorted(sweep.failed + sweep.scored, key=lambda row: (row.number in marked, row.best_ap)):
        curve = measured_curve(row)
        if not curve:
            continue
        line: dict[str, Any] = {"color": shade_colour(sweep.shade(row.best_ap)), "width": 1.6}
        if row.state == "failed":
            line |= {"color": FAILED, "dash": "dot"}
        if row.number == RECIPE:
            line |= {"color": RECIPE_COLOUR, "dash": "dash", "width": 3}
        if row is sweep.best:
            line |= {"width": 4}
        told = about(sweep, row)
        figure.add_scatter(
            x=[epochs for epochs, _ in curve],
            y=[ap for _, ap in curve],
            mode="lines" if len(sweep.rows) > CROWD and len(curve) > 1 else "lines+markers",
            line=line,
            marker={"size": 5, "color": line["color"]},
            name="the recipe" if row.number == RECIPE else f"the best, trial {row.number}",
            showlegend=row.number in marked,
            text=[f"epoch {epochs_text(at)}: AP {ap_text(ap)}<br>{told}" for at, ap in curve],
            hoverinfo="text",
        )
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    _colour_bar(figure, sweep)
    return figure


def _colour_bar(figure: Any, sweep: SweepSummary) -> None:
    """A trace without points that carries the scale of AP."""
    aps = [row.best_ap for row in sweep.scored]
    if min(aps) < max(aps):
        bar = {
            "title": {"text": "best AP"},
            "thickness": 14,
            "len": 0.75,
            "y": 0.0,
            "yanchor": "bottom",
            "outlinewidth": 0,
        }
        scale = {"colorscale": list(SHADES), "cmin": min(aps), "cmax": max(aps), "color": [min(aps)], "showscale": True}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker={**scale, "colorbar": bar}, showlegend=False)


def plot_importance(sweep: SweepSummary) -> Any:
    found = list(sweep.importances.items())
    figure = new_plot("part of the variance of AP that it explains, %", "", height=130 + 26 * len(found))
    labels = {axis.name: safe_text(axis.label) for axis in sweep.axes}
    spaces, space_of = space_colours(sweep), {axis.name: axis.space for axis in sweep.axes}
    for space in spaces or {"": SHADES[3]}:
        those = [(i, name, part) for i, (name, part) in enumerate(found) if not spaces or space_of[name] == space]
        figure.add_bar(
            x=[100 * part for _, _, part in those],
            y=[i for i, _, _ in those],
            name=safe_text(space),
            orientation="h",
            marker={"color": spaces.get(space, SHADES[3])},
            text=[part_text(part) for _, _, part in those],
            textposition="outside",
            cliponaxis=False,
            hovertext=[f"{safe_text(name)}: {100 * part:.1f} %" for _, name, part in those],
            hoverinfo="text",
        )
    figure.update_layout(bargap=0.3, barmode="overlay", showlegend=bool(spaces))
    # Numbers with texts, not texts: two labels that read alike would become one bar.
    ticks = {"tickvals": list(range(len(found))), "ticktext": [labels[name] for name, _ in found]}
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", automargin=True, **ticks)
    return figure


def plot_front(sweep: SweepSummary, cost: str) -> Any:
    figure = new_plot(COSTS[cost], AP_LABEL)
    rows, front = cost_rows(sweep, cost), front_rows(sweep, cost)
    x, y = [getattr(row, cost) for row in front], [row.best_ap for row in front]
    _line(figure, [*x, max(getattr(row, cost) for row in rows)], [*y, y[-1]], "Pareto front", shape="hv")
    _dots(figure, sweep, rows, [getattr(row, cost) for row in rows])
    for row in numbered(sweep, cost):
        at = {"x": getattr(row, cost), "y": row.best_ap, "xshift": -14, "yshift": 14}
        figure.add_annotation(**at, text=str(row.number), showarrow=False, font={"size": 12})
    return figure


def plot_boundary(sweep: SweepSummary) -> Any:
    figure = new_plot("GIoU boundary", AP_LABEL)
    chosen = [(row, boundaries(row, sweep.recipe)) for row in sweep.scored]
    for row, places in chosen:
        style = {"color": RECIPE_COLOUR, "width": 2.5} if row.number == RECIPE else {"color": "#c4c4c4", "width": 1}
        _line(figure, places, [row.best_ap] * len(places), "", **style)
        figure.data[-1].showlegend = False

    def dots(those: Sequence[tuple[TrialRow, float]], name: str, **marker: Any) -> None:
        y = [row.best_ap for row, _ in those]
        text = [f"boundary {at:.3g}<br>{about(sweep, row)}" for row, at in those]
        place = {"x": [at for _, at in those], "y": y, "text": text}
        figure.add_scatter(**place, mode="markers", name=name, hoverinfo="text", marker=marker)

    for band in range(max(len(places) for _, places in chosen)):
        those = [(row, places[band]) for row, places in chosen if len(places) > band and row.number != RECIPE]
        dots(those, band_label(band), size=10, color=BAND_COLOURS[band % len(BAND_COLOURS)])
    recipe = [(row, at) for row, places in chosen if row.number == RECIPE for at in places]
    if recipe:
        dots(recipe, "the recipe's", size=17, symbol="star", color=RECIPE_COLOUR)
    best = [(row, at) for row, places in chosen if row is sweep.best for at in places]
    dots(best, "the best trial's", size=19, symbol="circle-open", color=INK, line={"width": 2})
    return figure


def fragment(figure: Any, name: str) -> str:
    """The figure as a <div>, without plotly.js. Nothing on it sends data anywhere."""
    unwanted = ["sendChartToCloud", "sendDataToCloud", "select2d", "lasso2d"]
    config = {"displaylogo": False, "responsive": True, "showSendToCloud": False, "modeBarButtonsToRemove": unwanted}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config))
