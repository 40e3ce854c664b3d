"""What an evaluation found, for people: precision against recall, scores as thresholds, each class, what is taken for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qskd.evaluation.details import ClassFigures, Curve, Evaluation
from qskd.pictures.fonts import font_file, shown_name
from qskd.pictures.plots import FAINT, PALETTE, Picture
from qskd.printable import one_line

MOST_CLASSES = 20  # of the matrix: what is beyond is one row and one column
MOST_ROWS = 40  # of the picture of classes
_LONGEST_NAME = 22
_LINES = (PALETTE[4], PALETTE[3], PALETTE[2])
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)))


def pictures_of(evaluation: Evaluation) -> dict[str, Picture]:
    """Each picture that can be drawn, by its file's name."""
    found: dict[str, Picture] = {}
    if evaluation.precision_recall:
        found["precision_recall.png"] = precision_recall_picture(evaluation.precision_recall)
    if evaluation.thresholds and evaluation.best:
        found["thresholds.png"] = thresholds_picture(evaluation)
    if evaluation.best and shown_classes(evaluation)[0]:
        found["classes.png"] = classes_picture(evaluation)
    if evaluation.confusions:
        found["confusion.png"] = confusion_picture(evaluation)
    return found


def precision_recall_picture(lines: Mapping[str, Curve]) -> Picture:
    """Interpolated precision at each recall, mean over classes: the area under a line is its AP."""
    figure, axes = _plot("recall", "precision", "Precision against recall, mean over classes")
    for (name, curve), colour, dash in zip(lines.items(), _LINES, _DASHES, strict=False):
        axes.plot(
            curve.x, curve.y, color=_part(colour), ls=dash, lw=2, label=f"IoU {name} (AP {float(np.mean(curve.y)):.3f})"
        )
    axes.legend(frameon=False)
    return _drawn(figure)


def thresholds_picture(evaluation: Evaluation) -> Picture:
    """Precision, recall and F1 of what is kept at each score."""
    best, lines = evaluation.best, evaluation.thresholds or {}
    assert best is not None
    title = f"Best F1 {best.f1:.3f} at score {best.score:.3f} (IoU 0.5, all classes together)"
    figure, axes = _plot("lowest score that is kept", "", title)
    for (name, curve), colour, dash in zip(lines.items(), (_LINES[0], _LINES[1], _LINES[2]), _DASHES, strict=False):
        axes.plot(curve.x, curve.y, color=_part(colour), ls=dash, lw=2, label=name)
    axes.axvline(best.score, color=_part(FAINT), lw=1, ls=":")
    axes.legend(frameon=False)
    return _drawn(figure)


def shown_classes(evaluation: Evaluation, most: int = MOST_ROWS) -> tuple[list[ClassFigures], list[ClassFigures]]:
    """Those that the picture of classes has, each part the worst AP first: all that have objects, or the worst half of `most` and,
    of the others, as many that have the most objects (of a thousand classes the worst are all rare, and at 0)."""
    measured = [one for one in evaluation.classes if one.ap is not None]
    if len(measured) <= most:
        return measured, []
    worst, others = measured[: most // 2], measured[most // 2 :]
    frequent = sorted(others, key=lambda one: -one.objects)[: most - most // 2]
    return worst, [one for one in others if one in frequent]


def classes_picture(evaluation: Evaluation) -> Picture:
    """A row a class: precision and recall at the best threshold of all classes together, and AP."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best, (worst, frequent) = evaluation.best, shown_classes(evaluation)
    assert best is not None
    classes = [*worst, *frequent]
    figure = Figure(figsize=(7.2, 1.7 + 0.21 * len(classes)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = np.arange(len(classes))
    axes.barh(rows, [one.ap or 0.0 for one in classes], height=0.72, color="0.87", label="AP")
    # A line or a point that has a None is not drawn: numpy makes it NaN.
    ends = np.array([(one.shared_precision, one.shared_recall) for one in classes], float)
    axes.hlines(rows, *ends.T, color="0.55", lw=1, zorder=2)
    # The second smaller than the first, so that both are seen where they are equal.
    for side, (name, marker, size) in enumerate((("precision", "o", 46), ("recall", "D", 12))):
        colour = [_part(_LINES[side])]
        axes.scatter(ends[:, side], rows, s=size, color=colour, marker=marker, label=name, zorder=3, clip_on=False)
    names = [shown_name(one.name, one.id) for one in classes]
    told = [f"{_short(name)} ({one.objects})" for name, one in zip(names, classes, strict=True)]
    axes.set_yticks(rows, told, fontsize=8)
    _as_they_are(axes.get_yticklabels(), names)
    axes.set_ylim(len(classes) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_part(FAINT))
    axes.tick_params(colors=_part(FAINT), length=0)
    axes.tick_params(axis="y", labelcolor="black")
    count = sum(one.ap is not None for one in evaluation.classes)
    which = "The worst class first"
    if frequent:
        axes.axhline(len(worst) - 0.5, color="0.4", lw=1)
        which = f"The worst {len(worst)} of {count} classes; below the line the {len(frequent)} others with the most objects"
    empty = len(evaluation.classes) - count
    without = f"; {empty} classes without objects are left out" if empty else ""
    title = f"{which}\nPrecision and recall at score {best.score:.3f}, IoU 0.5; objects in brackets{without}"
    # Of the figure, not of the axes, which begin where the names end.
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    return _drawn(figure)


def matrix_of(evaluation: Evaluation, most: int = MOST_CLASSES) -> tuple[list[str], np.ndarray]:
    """Names of the rows and columns, and counts int64 [n + 1, n + 1]: row: the true class, and last "nothing there"; column:
    what was found, and last "missed". Of many classes those with the most mistakes are told apart."""
    by_id = sorted(evaluation.classes, key=lambda one: one.id)
    mistakes = {one.id: 0 for one in by_id}
    for pair in evaluation.confusions:
        if pair.true != pair.predicted:
            for side in (pair.true, pair.predicted):
                if side is not None:
                    mistakes[side] += pair.count
    shown = {one.id for one in by_id}
    if len(by_id) > most:
        shown = set(sorted(mistakes, key=lambda number: (-mistakes[number], number))[:most])
    kept = [one for one in by_id if one.id in shown]
    place = {one.id: at for at, one in enumerate(kept)}
    rest = len(kept) if len(kept) < len(by_id) else None
    names = [shown_name(one.name, one.id) for one in kept]
    names += [] if rest is None else [f"{len(by_id) - len(kept)} other classes"]
    counts = np.zeros((len(names) + 1, len(names) + 1), np.int64)
    for pair in evaluation.confusions:
        row, column = (len(names) if side is None else place.get(side, rest) for side in (pair.true, pair.predicted))
        counts[row, column] += pair.count
    return names, counts


def confusion_picture(evaluation: Evaluation) -> Picture:
    """The matrix, a row's colours by the share of its objects."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, counts = matrix_of(evaluation)
    size = 2.6 + 0.42 * len(counts)
    figure = Figure(figsize=(max(size, 5.4), max(size - 0.4, 4.6)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shares[-1] = 0.0  # of what is not there are no shares
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(counts), strict=True):
        ink = "white" if shares[row, column] > 0.55 else "black"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=ink, fontsize=7)
    rows, columns = [*names, "nothing there"], [*names, "missed"]
    axes.set_xticks(range(len(columns)), [_short(name) for name in columns], rotation=45, ha="left", fontsize=8)
    axes.set_yticks(range(len(rows)), [_short(name) for name in rows], fontsize=8)
    axes.xaxis.tick_top()
    _as_they_are(axes.get_xticklabels(), columns)
    _as_they_are(axes.get_yticklabels(), rows)
    axes.axhline(len(names) - 0.5, color="0.4", lw=1)
    axes.axvline(len(names) - 0.5, color="0.4", lw=1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    best = evaluation.best
    at = f"at score {best.score:.3f} or more, IoU 0.5" if best else ""
    every = len(evaluation.classes)
    some = (
        f"; the {MOST_CLASSES} of {every} classes with the most mistakes are told apart" if every > MOST_CLASSES else ""
    )
    title = f"What is there (rows) and what was found (columns),\n{at}{some}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")
    return _drawn(figure)


def _as_they_are(ticks: Sequence[Any], texts: Sequence[str]) -> None:
    """Names of classes as labels: in a font that has them, and no formula, whatever dollars they hold."""
    for tick, text in zip(ticks, texts, strict=True):
        tick.set_parse_math(False)
        if path := font_file(text):
            tick.set_fontfamily(_family(path))


def _family(path: str) -> str:
    """The name by which matplotlib knows a font file."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    name: str = font_manager.FontProperties(fname=path).get_name()
    if not any(entry.fname == path for entry in manager.ttflist):
        manager.addfont(path)
    return name


def _short(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _part(colour: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(part / 255 for part in colour)


def _plot(xlabel: str, ylabel: str, title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_part(FAINT))
    axes.tick_params(colors=_part(FAINT))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    return figure, axes


def _drawn(figure: Any) -> Picture:
    """uint8 [height, width, 3]."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
