"""Boxes as a file gives them, before they are clipped: do they fit their images, and if not, would they in another order?"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qskd.datasets.findings.finding import MOST_EXAMPLES, Finding
from qskd.printable import one_line

Numbers = NDArray[np.float64]
SLACK = 1.0  # pixels that a box may reach beyond its image: what rounding does
MANY = 0.01  # of all boxes
_NEARLY_ALL = 0.99
_BLOCK = 2**18  # boxes that are looked at together: all readings of ten million are gigabytes
_FARTHEST = 1e9  # pixels; what is farther reads no better


# What four numbers may mean, as the box's low and high corner (x, y). COCO's own reading first.
READINGS: dict[str, Callable[[Numbers], tuple[Numbers, Numbers]]] = {
    "[x, y, width, height]": lambda box: (box[:, :2], box[:, :2] + box[:, 2:]),
    "[x1, y1, x2, y2]": lambda box: (box[:, :2], box[:, 2:]),
    "[centre x, centre y, width, height]": lambda box: (box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2),
    "[y1, x1, y2, x2]": lambda box: (box[:, [1, 0]], box[:, [3, 2]]),
}


@dataclass(frozen=True)
class Layout:
    """How a format writes boxes. boxes: whose they are, for a sentence. reading: one of READINGS. unit: of its numbers. remedies:
    what to do where another reading fits, by that reading; by default the boxes are to be rewritten."""

    boxes: str
    reading: str
    unit: str = "in pixels"
    remedies: Mapping[str, str] = field(default_factory=dict)


COCO = Layout("COCO's boxes", "[x, y, width, height]")


class GivenBoxes:
    """Collects boxes; `findings` says what they look like together."""

    def __init__(self, layout: Layout = COCO) -> None:
        self._layout = layout
        self._numbers = array("d")
        self._ids = array("q")

    def add(self, box: list[float], width: int, height: int, image_id: int, annotation_id: int) -> None:
        """box: four finite numbers, as given (importers: in pixels); width, height: the image's, in pixels."""
        self._numbers.extend((*box, width, height))
        self._ids.extend((image_id, annotation_id))

    def add_block(self, boxes: Numbers, sizes: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        """The same of many: boxes [N, 4], sizes [N, 2] (width, height), ids [N, 2] (image, annotation)."""
        self._numbers.frombytes(np.concatenate([boxes, sizes], axis=1, dtype=np.float64).tobytes())
        self._ids.frombytes(np.ascontiguousarray(ids).tobytes())

    def findings(self, example: Callable[[int, int], str]) -> list[Finding]:
        """example: where an annotation stands, of its image's id and its own."""
        numbers = np.asarray(self._numbers, np.float64).reshape(-1, 6)
        if not len(numbers):
            return []
        blocks = [numbers[start : start + _BLOCK] for start in range(0, len(numbers), _BLOCK)]
        relative = self._layout.unit == COCO.unit and all(
            bool((block[:, :4] <= 1).all() and (block[:, :4] >= 0).all()) for block in blocks
        )
        own, ids = self._layout.reading, np.asarray(self._ids, np.int64).reshape(-1, 2)
        fitting = {name: 0 for name in READINGS if name != own}
        found_misfits, found_reach = [], []
        for number, block in enumerate(blocks):
            boxes, sizes = block[:, :4], block[:, 4:]
            if relative:  # of the image's size: as such they may fit or not
                boxes = boxes * np.tile(sizes, 2)
            with np.errstate(over="ignore", invalid="ignore"):
                reach = {name: _reach(*read(boxes), sizes) for name, read in READINGS.items()}
            for name in fitting:
                fitting[name] += int((reach[name] <= SLACK).sum())
            rows = np.flatnonzero(
                reach[own] > SLACK
            )  # those without an area too: a width where a right edge is meant gives such
            found_misfits.append(rows + number * _BLOCK)
            found_reach.append(reach[own][rows])
        misfit, reaches = np.concatenate(found_misfits), np.concatenate(found_reach)
        outside = np.isfinite(reaches)
        total, said = len(numbers), ""
        if outside.any():
            far = reaches[outside]
            said = (
                f"{len(far)} of {total} boxes reach outside their images, by up to {far.max():.1f} px, "
                f"half of them by {np.median(far):.1f} px or more"
            )
        count, no_area = len(misfit), int(len(misfit) - outside.sum())
        if not count or count < MANY * total:
            return []
        best = max(fitting, key=lambda name: fitting[name])
        if count > 1 and fitting[best] >= _NEARLY_ALL * total and fitting[best] > total - count:
            unit = " of numbers relative to the image's size" if relative else ""
            lost = f"{no_area} of {total} boxes have no area" if no_area else ""
            found = f"{', and '.join(filter(None, (said, lost)))}; read as {best}{unit}, "
            found += f"{fitting[best]} of {total} lie inside: they look like that"
            told = f"{own} {self._layout.unit}"
            meaning = f"{self._layout.boxes} are {told}. Read so, these cover the wrong part of their images."
            remedy = self._layout.remedies.get(best, f"write them as {told}")
            examples = _examples(ids[misfit], example)
            return [Finding("boxes-in-another-format", count, found, examples, meaning, remedy)]
        count = int(outside.sum())
        if relative or not count or count < MANY * total:
            return []
        examples = _examples(ids[misfit[outside]], example)
        meaning = "They are clipped: the learned box is of what is left."
        remedy = "were the pictures cropped or resized after they were annotated? Correct the boxes, or leave them out"
        return [Finding("boxes-clipped", count, said, examples, meaning, remedy)]


def _examples(ids: NDArray[np.int64], example: Callable[[int, int], str]) -> tuple[str, ...]:
    return tuple(one_line(example(image, annotation)) for image, annotation in ids[:MOST_EXAMPLES].tolist())


def _reach(low: Numbers, high: Numbers, sizes: Numbers) -> Numbers:
    """How far each box reaches outside its image, in pixels; infinitely, where it has no area."""
    far = np.minimum(np.maximum(-low, high - sizes).max(axis=1), _FARTHEST)
    return np.where((high > low).all(axis=1), far, np.inf)
