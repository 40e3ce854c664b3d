"""Boxes as a file gives them, before they are clipped: do they fit their images, and if not, would they in another order?"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qskd.datasets.findings.finding import MOST_EXAMPLES, Finding

Numbers = NDArray[np.float64]
SLACK = 1.0  # pixels that a box may reach beyond its image: what rounding does
MANY = 0.01  # of all boxes
_NEARLY_ALL = 0.99
_FARTHEST = 1e9  # pixels; what is farther reads no better


# What four numbers may mean, as the box's low and high corner (x, y). COCO's own reading first.
READINGS: dict[str, Callable[[Numbers], tuple[Numbers, Numbers]]] = {
    "[x, y, width, height]": lambda box: (box[:, :2], box[:, :2] + box[:, 2:]),
    "[x1, y1, x2, y2]": lambda box: (box[:, :2], box[:, 2:]),
    "[centre x, centre y, width, height]": lambda box: (box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2),
    "[y1, x1, y2, x2]": lambda box: (box[:, [1, 0]], box[:, [3, 2]]),
}


class GivenBoxes:
    """Collects boxes; `findings` says what they look like together."""

    def __init__(self) -> None:
        self._numbers = array("d")
        self._ids = array("q")

    def add(self, box: list[float], width: int, height: int, image_id: int, annotation_id: int) -> None:
        """box: four finite numbers, as given; width, height: the image's, in pixels."""
        self._numbers.extend((*box, width, height))
        self._ids.extend((image_id, annotation_id))

    def findings(self) -> list[Finding]:
        numbers = np.array(self._numbers, np.float64).reshape(-1, 6)
        if not len(numbers):
            return []
        boxes, sizes = numbers[:, :4], numbers[:, 4:]
        relative = bool((boxes <= 1).all() and (boxes >= 0).all())
        if relative:  # of the image's size: as such they may fit or not
            boxes = boxes * np.tile(sizes, 2)
        with np.errstate(over="ignore", invalid="ignore"):
            reach = {name: _reach(*read(boxes), sizes) for name, read in READINGS.items()}
        own, *others = reach
        outside = (reach[own] > SLACK) & np.isfinite(reach[own])
        count, total = int(outside.sum()), len(boxes)
        if not count or count < MANY * total:
            return []
        ids = np.array(self._ids, np.int64).reshape(-1, 2)[outside][:MOST_EXAMPLES]
        examples = tuple(f"image {image}, annotation {annotation}" for image, annotation in ids.tolist())
        far = reach[own][outside]
        said = (
            f"{count} of {total} boxes reach outside their images, by up to {far.max():.1f} px, "
            f"half of them by {np.median(far):.1f} px or more"
        )
        fitting = {name: int((reach[name] <= SLACK).sum()) for name in others}
        best = max(others, key=lambda name: fitting[name])
        if count > 1 and fitting[best] >= _NEARLY_ALL * total and fitting[best] > total - count:
            unit = " of numbers relative to the image's size" if relative else ""
            found = f"{said}; read as {best}{unit}, {fitting[best]} of {total} lie inside: they look like that"
            meaning = f"COCO's boxes are {own} in pixels. Read so, these cover the wrong part of their images."
            return [Finding("boxes-in-another-format", count, found, examples, meaning, f"write them as {own}")]
        if relative:
            return []
        meaning = "They are clipped: the learned box is of what is left."
        remedy = "were the pictures cropped or resized after they were annotated? Correct the boxes, or leave them out"
        return [Finding("boxes-clipped", count, said, examples, meaning, remedy)]


def _reach(low: Numbers, high: Numbers, sizes: Numbers) -> Numbers:
    """How far each box reaches outside its image, in pixels; infinitely, where it has no area."""
    far = np.minimum(np.maximum(-low, high - sizes).max(axis=1), _FARTHEST)
    return np.where((high > low).all(axis=1), far, np.inf)
