"""Whether what a graph says is what is said of it: shapes, numbers, scores, labels and coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qskd.checkpoints.graph_words import words_file
from qskd.checkpoints.graphs import Graph
from qskd.datasets.classes import UNNAMED
from qskd.errors import QskdError

Floats = NDArray[np.float32]
_SEEN = 0.05  # a box of less is not looked at when its coordinates are
_FEW = 10  # boxes: fewer may lie anywhere
_SHAPES = {
    "logits": ("[B, N, K]", "[B, N, 4]"),
    "rows": ("[B, N, 6]",),
    "scored": ("[B, N, 5]", "[B, N]"),
    "detections": ("[B, N, 4]", "[B, N]", "[B, N]"),
}


def as_batch(graph: Graph, said: Sequence[Any], count: int) -> list[Floats]:
    """The outputs in the shapes of `_SHAPES`, B being `count`. Those without a batch get one; a last axis of one number for each
    box is taken off. QskdError where they have others."""
    parts, shapes = [np.asarray(each) for each in said], _SHAPES[graph.form]
    found: list[Floats] = []
    boxes = parts[graph.form == "logits"]
    boxes = boxes[None] if boxes.ndim == 2 else boxes
    for part, shape in zip(parts, shapes, strict=True):
        each = part
        if shape == "[B, N]" and _without_ones(part.shape) == _without_ones(boxes.shape[:2]):
            each = part.reshape(boxes.shape[:2])
        elif shape != "[B, N]" and part.ndim == 2:
            each = part[None]
        found.append(each)
    numbers = {"[B, N, 4]": 4, "[B, N, 5]": 5, "[B, N, 6]": 6}
    right = boxes.ndim == 3 and len(boxes) == count
    for part, shape in zip(found, shapes, strict=True):
        right = right and part.shape[:2] == boxes.shape[:2] and part.ndim == shape.count(",") + 1
        right = right and part.shape[-1] == numbers.get(shape, part.shape[-1])
    if not right:
        had = ", ".join(f"{name} {list(part.shape)}" for name, part in zip(graph.outputs, parts, strict=True))
        wanted = ", ".join(f"{name} {shape}" for name, shape in zip(graph.outputs, shapes, strict=True))
        raise QskdError(
            graph.file,
            f"outputs of {count} image(s): {had}",
            f"{wanted}: of B images N boxes each",
            f"export it so; or name other outputs of it (outputs in {words_file(graph.file).name})",
        )
    return [each.astype(np.float32, copy=False) for each in found]


def check_logits(graph: Graph, logits: Floats, boxes: Floats) -> None:
    """QskdError where they can't be what the form "logits" has. logits: [b, Q, K], with that of "no object"; boxes: [b, Q, 4]."""
    expected = (graph.queries, len(graph.labels) + graph.softmax)
    if logits.shape[1:] != expected:
        found, wanted = (" x ".join(map(str, each)) for each in (logits.shape[1:], expected))
        raise QskdError(
            graph.file, f"{found} logits", f"{wanted}, boxes and classes", "state them in the graph's shapes"
        )
    again, own = "export it again, in float32", graph.words is None
    for name, each in zip(graph.outputs, (logits, boxes), strict=True):
        if not np.isfinite(each).all():
            _refuse_infinite(graph, name, each, again)
    queries = logits.shape[0] * logits.shape[1]
    if queries > 1 and ((logits >= 0) & (logits <= 1)).all():
        found = f"{graph.outputs[0]}: each of {queries} queries' numbers lies in 0 to 1, as probabilities do"
        remedy = "export it without the sigmoid or softmax at its end" + (
            ", as `qskd export` does" if own else "; or with outputs boxes, scores and labels, which are probabilities"
        )
        raise QskdError(graph.file, found, "logits, of which most are below 0", remedy)
    best = logits[..., : len(graph.labels)].max(-1)
    sure = boxes[best > (logits[..., -1] if graph.softmax else 0)]
    remedy = "export it again with `qskd export`" if own else _remedy(graph)
    _check_coordinates(graph, sure if len(sure) else boxes.reshape(-1, 4), remedy)


def check_boxes(graph: Graph, boxes: Floats, scores: Floats, labels: Floats) -> None:
    """As `check_logits`, of the other forms. boxes: [b, N, 4]; scores, labels: [b, N]."""
    remedy = _remedy(graph)
    wrong = scores[~(np.isfinite(scores) & (scores <= 1 + 1e-3))]
    if len(wrong):
        strange = wrong[~np.isfinite(wrong)]
        worst = float(strange[0] if len(strange) else wrong.max())
        raise QskdError(graph.file, f"a score of {worst:g}", "scores of 0 to 1", remedy)
    there = scores > 0
    if not np.isfinite(boxes[there]).all():
        _refuse_infinite(graph, graph.outputs[0], boxes[there], "export it again, in float32")
    known = np.array([name != UNNAMED for name in graph.labels])
    right = (labels >= 0) & (labels < len(known))
    right[right] = known[labels[right].astype(np.int64)]
    if (there & ~right).any():
        found = f"a box of label {labels[there & ~right][0]:g}"
        listed = f"labels that have a name: {np.flatnonzero(known).tolist()[:20]}"
        raise QskdError(graph.file, found, listed, remedy)
    seen = boxes[scores >= _SEEN]
    if len(seen) >= _FEW:
        _check_coordinates(graph, seen, remedy)


def _check_coordinates(graph: Graph, boxes: Floats, remedy: str) -> None:
    """boxes: [n, 4], n above 0, as the graph writes them. Single ones may lie anywhere."""
    first, second = boxes[:, :2], boxes[:, 2:]
    if graph.boxes == "xyxy" and (second <= first).any(1).mean() > 0.5:
        raise QskdError(graph.file, "boxes whose right bottom corner is not right and below", "xyxy", remedy)
    largest = np.abs(boxes).max(1)
    most = float(largest.max())
    if graph.units == "pixels" and most <= 1.5:
        raise QskdError(graph.file, f"no coordinate above {most:.2f}", "pixels", f"units: relative? {remedy}")
    if graph.units == "relative" and (largest > 3).mean() > 0.5:
        units = "" if graph.words is None else "units: pixels? "
        raise QskdError(graph.file, f"coordinates up to {most:.0f}", "shares of the picture", f"{units}{remedy}")


def _refuse_infinite(graph: Graph, name: str, values: Floats, remedy: str) -> None:
    found = f"{name}: {values[~np.isfinite(values)][0]:g} among its numbers"
    raise QskdError(graph.file, found, "finite numbers", remedy)


def _remedy(graph: Graph) -> str:
    return f"correct {words_file(graph.file).name}, or the export"


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]
