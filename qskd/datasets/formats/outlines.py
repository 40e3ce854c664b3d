"""The box of a COCO annotation that has an outline (polygons or RLE) and no `bbox`, as some tools write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qskd.printable import shown_value

_FARTHEST = 1e9  # pixels; where a box is in its image is the reader's to judge


def with_bbox(entry: Any, images: Mapping[int, Any]) -> tuple[Any, str]:
    """The annotation with the `bbox` [x, y, width, height] of its `segmentation`, if it has none; else as it is. And what is
    wrong with the outline, or the empty string.

    images: by id, with their `width` and `height` in pixels, which those of an RLE must equal.
    """
    if not isinstance(entry, dict) or entry.get("bbox") not in (None, []) or not entry.get("segmentation"):
        return entry, ""
    outline, key = entry["segmentation"], entry.get("image_id")
    image = images.get(key) if isinstance(key, int) else None
    try:
        bbox = _box_of_rle(outline, image) if isinstance(outline, dict) else _box_of_polygons(outline)
    except ValueError as error:
        return entry, f"no `bbox`, and its `segmentation` gives none: {error}"
    return {**entry, "bbox": bbox}, ""


def _box_of_polygons(outline: Any) -> list[float]:
    if not isinstance(outline, list):
        raise ValueError(f"a {type(outline).__name__}, neither polygons nor RLE")
    polygons = outline if all(isinstance(part, list) for part in outline) else [outline]
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon of {len(polygon)} numbers, where three points or more have x and y")
        for value in polygon:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not abs(value) < _FARTHEST:  # NaN too
                raise ValueError(f"{shown_value(value)} in a polygon")
    points = np.array([value for polygon in polygons for value in polygon], np.float64).reshape(-1, 2)
    low, high = points.min(axis=0), points.max(axis=0)
    return [*low.tolist(), *(high - low).tolist()]


def _box_of_rle(outline: dict[str, Any], image: Any) -> list[float]:
    size, counts = outline.get("size"), outline.get("counts")
    # Looked at before pycocotools' C code, which divides by the height.
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"an RLE of size {shown_value(size)}")
    height, width = size
    if image is not None and (height, width) != (image.height, image.width):
        raise ValueError(f"an RLE of {width} x {height} pixels in an image of {image.width} x {image.height}")
    if height * width >= 2**32:
        raise ValueError(f"an RLE of {width} x {height} pixels")
    from pycocotools import mask

    if isinstance(counts, str):
        counts = _uncompressed(counts)
    if not isinstance(counts, list) or not all(type(count) is int and 0 <= count <= height * width for count in counts):
        raise ValueError(f"an RLE with the counts {shown_value(counts)}")
    if sum(counts) != height * width:
        raise ValueError(f"an RLE of {sum(counts)} pixels in all, not {width} x {height}")
    found = mask.toBbox(mask.frPyObjects({"size": size, "counts": counts}, height, width))
    return [float(value) for value in np.asarray(found).reshape(4)]


def _uncompressed(text: str) -> list[int]:
    """COCO's compressed counts as numbers, as pycocotools reads them: it makes masks of broken ones without a word."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48  # five bits of a number, lowest first; the sixth says that more follow
        if not 0 <= code < 64 or shift > 60:
            raise ValueError(f"an RLE with the counts {shown_value(text)}")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError(f"an RLE whose counts are cut off, {shown_value(text)}")
    return counts
