"""How boxes of a Hugging Face dataset may be written (`--box-format`), which says nothing of it itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qskd.datasets.findings.given_boxes import Layout
from qskd.untrusted import is_number

BOX_FORMATS = ("xywh", "xyxy", "cxcywh", "xywh-relative", "xyxy-relative", "cxcywh-relative")
_READINGS = {
    "xywh": "[x, y, width, height]",
    "xyxy": "[x1, y1, x2, y2]",
    "cxcywh": "[centre x, centre y, width, height]",
}


def layout_of(box_format: str) -> Layout:
    """box_format: one of BOX_FORMATS."""
    name, _, relative = box_format.partition("-")
    ending = "-relative" if relative else ""
    remedies = {reading: f"pass `--box-format {other}{ending}`" for other, reading in _READINGS.items()}
    unit = "relative to the picture" if relative else "in pixels"
    return Layout("This dataset's boxes, as they are read,", _READINGS[name], unit, remedies)


def in_pixels(numbers: Sequence[float], box_format: str, width: int, height: int) -> list[float]:
    """Four numbers as written, in the same order in pixels. width, height: the picture's."""
    scales = (width, height, width, height) if box_format.endswith("-relative") else (1, 1, 1, 1)
    return [value * scale for value, scale in zip(numbers, scales, strict=True)]


def area_in_pixels(area: Any, box_format: str, width: int, height: int) -> Any:
    """An object's area as written, in square pixels: beside relative boxes one of up to 1 is a share of the picture. What is no
    number stays, for the reader to complain of."""
    share = box_format.endswith("-relative") and is_number(area) and area <= 1
    return area * width * height if share else area


def as_xywh(numbers: Sequence[float], box_format: str) -> list[float]:
    """Left, top, width, height of four numbers in pixels."""
    layout, (a, b, c, d) = box_format.partition("-")[0], numbers
    if layout == "xyxy":
        return [a, b, c - a, d - b]
    return [a - c / 2, b - d / 2, c, d] if layout == "cxcywh" else [a, b, c, d]
