"""AP of exported files against what they cost, as a picture (`qskd benchmark --out`): time of an image, and size on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.deployment.found import Benchmark
from pipelines.tuning.report.results import pareto_front
from qskd.deploy.runtimes import BFLOAT16
from qskd.deploy.variants import ONNXRUNTIME, OPENVINO
from qskd.errors import QskdError
from qskd.evaluation.shown import is_measured
from qskd.pictures.plots import FAINT, INK, class_colour
from qskd.printable import one_line

# Full is float32; the less of a mark is filled, the fewer bits.
FILLS = {"float32": "full", "float16": "left", BFLOAT16: "bottom", "int8": "none"}
MARKS = {ONNXRUNTIME: "s", OPENVINO: "^"}
_LEAST_AP = 0.04  # that the axis spans: differences of a thousandth are chance and must not fill the picture
_WIDE = 8  # an axis of a wider range than this is logarithmic


@dataclass(frozen=True)
class Point:
    """One file. model: its short name. ms: of an image. megabytes: on disk."""

    model: str
    precision: str
    runtime: str
    ap: float
    ms: float
    megabytes: float


def points_of(found: Benchmark) -> list[Point]:
    """Every exported file whose AP could be measured, at the smallest batch that it was timed with. ms: the first row's, times
    the ratio of rounds, which a machine that slows down does not change."""
    first = {timing.batch: timing.ms_per_image for timing in found.rows[0].timings}
    points = []
    for row in found.rows:
        if row.variant is not None and is_measured(row.metrics.get("AP")):
            timing = min(row.timings, key=lambda each: each.batch)
            ms = timing.ratio * first[timing.batch]
            points.append(
                Point(row.name, row.variant.computes, row.variant.runtime, row.metrics["AP"], ms, row.bytes / 1e6)
            )
    if not points:
        raise nothing_to_draw()
    return points


def nothing_to_draw() -> QskdError:
    """Where no AP can be measured."""
    return QskdError("--out", "no AP could be measured: no labelled object", "labelled shards with objects")


def draw(points: Sequence[Point], how: str) -> np.ndarray:
    """RGB uint8 [H, W, 3]: two panels with AP upwards, in each the files that no other beats joined by a line. how: of the
    times, for the label of their axis. Colours are models, shapes runtimes, and how much of a mark is filled says its precision."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.2), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    models = list(dict.fromkeys(point.model for point in points))
    costs: list[tuple[str, Callable[[Point], float]]] = [
        (f"ms an image ({how})", lambda point: point.ms),
        ("MB on disk", lambda point: point.megabytes),
    ]
    for axes, (label, cost) in zip(panels, costs, strict=True):
        _panel(axes, points, models, cost)
        axes.set_xlabel(label)
    low, high = min(point.ap for point in points), max(point.ap for point in points)
    rim = max(0.12 * (high - low), (_LEAST_AP - (high - low)) / 2)
    panels[0].set_ylim(max(0.0, low - rim), high + rim)
    panels[0].set_ylabel("AP")
    panels[0].set_title("Exported files: AP against time and size", loc="left", fontweight="bold")
    figure.legend(handles=_legend(points, models), loc="outside right upper", frameon=False, labelcolor=_rgb(INK))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _rgb(colour: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(part / 255 for part in colour)


def _mark(colour: tuple[float, ...], runtime: str, precision: str) -> dict[str, Any]:
    return {
        "color": colour,
        "markerfacecoloralt": "white",
        "marker": MARKS.get(runtime, "o"),
        "fillstyle": FILLS.get(precision, "full"),
        "ms": 9,
        "mew": 1.6,
        "ls": "",
    }


def _colours(models: Sequence[str]) -> dict[str, tuple[float, ...]]:
    return {model: _rgb(class_colour(i + 4)) for i, model in enumerate(models)}  # blue first: the palest come late


def _panel(axes: Any, points: Sequence[Point], models: Sequence[str], cost: Callable[[Point], float]) -> None:
    x, y = [cost(point) for point in points], [point.ap for point in points]
    front = pareto_front(x, y)
    axes.step(
        [*(x[i] for i in front), max(x)], [*(y[i] for i in front), y[front[-1]]], where="post", color="0.7", lw=1.2
    )
    for point in points:
        axes.plot(cost(point), point.ap, **_mark(_colours(models)[point.model], point.runtime, point.precision))
    if max(x) > _WIDE * min(x):
        axes.set_xscale("log")
    else:
        axes.set_xlim(0, 1.06 * max(x))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_rgb(FAINT))
    axes.tick_params(colors=_rgb(FAINT))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)


def _legend(points: Sequence[Point], models: Sequence[str]) -> list[Any]:
    """Of what there is: models where there are several, runtimes, precisions, the front."""
    from matplotlib.lines import Line2D

    def entry(label: str, colour: tuple[float, ...], runtime: str, precision: str) -> Any:
        return Line2D([], [], label=label.replace("$", r"\$"), **_mark(colour, runtime, precision))

    grey = _rgb(FAINT)
    found = [entry(one_line(model), colour, "", "float32") for model, colour in _colours(models).items()]
    found = found if len(models) > 1 else []
    found += [entry(name, grey, name, "float32") for name in MARKS if any(point.runtime == name for point in points)]
    found += [entry(name, grey, "", name) for name in FILLS if any(point.precision == name for point in points)]
    return [*found, Line2D([], [], color="0.7", lw=1.2, label="Pareto front")]
