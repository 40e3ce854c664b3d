"""What an evaluation found, for people: precision against recall, scores as thresholds, what is taken for what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qskd.evaluation.details import Curve, Evaluation
from qskd.pictures.fonts import font_file, shown_name
from qskd.pictures.plots import FAINT, PALETTE, Picture
from qskd.printable import one_line

MOST_CLASSES = 20  # of the matrix: what is beyond is one row and one column
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
    for ticks, texts in ((axes.get_xticklabels(), columns), (axes.get_yticklabels(), rows)):
        for tick, text in zip(ticks, texts, strict=True):
            if path := font_file(text):
                tick.set_fontfamily(_family(path))
    axes.axhline(len(names) - 0.5, color="0.4", lw=1)
    axes.axvline(len(names) - 0.5, color="0.4", lw=1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    best = evaluation.best
    at = f" of score {best.score:.3f} or more, IoU 0.5" if best else ""
    axes.set_title(f"What is there (rows) and what was found (columns){at}", loc="left", fontsize=9, fontweight="bold")
    return _drawn(figure)


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
