"""What the distillation looks at, for people: kept queries coloured by band, and the mask of AGFD over the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from qskd.plots import PALETTE, Colour, Picture

POSITIVE: Colour = PALETTE[4]  # blue
OBJECT: Colour = (255, 255, 255)
# Hard negatives by band, lowest first: yellow to red, as heat.
BANDS: tuple[Colour, ...] = ((240, 228, 66), (230, 159, 0), (213, 94, 0), (150, 30, 0))


def enlarged(image: npt.NDArray[Any], smallest_side: int = 384) -> tuple[Picture, int]:
    """uint8 [H, W, 3] -> the same pixels, each `factor` times as wide and high, and the factor."""
    factor = max(1, -(-smallest_side // max(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1), factor


def draw_selection(
    image: npt.NDArray[Any],
    objects_xyxy: npt.ArrayLike,
    queries_xyxy: npt.ArrayLike,
    is_positive: Sequence[bool] | npt.NDArray[Any],
    band: Sequence[int] | npt.NDArray[Any],
    weight: Sequence[float] | npt.NDArray[Any],
) -> Picture:
    """A copy of the image with its objects (white, dashed), the positives (blue) and the hard negatives (by band).

    image: uint8 [H, W, 3]; boxes in its pixels: objects [M, 4], queries [Q, 4]. weight [Q]: 0 = dropped, not drawn.
    Positives are drawn last, on top. Small images are enlarged by a whole factor.
    """
    pixels, factor = enlarged(image)
    canvas = Image.fromarray(pixels)
    draw = ImageDraw.Draw(canvas)
    line = max(2, max(canvas.size) // 200)
    boxes = np.asarray(queries_xyxy, dtype=float).reshape(-1, 4) * factor
    bands, positive, kept = (
        np.asarray(band, dtype=int),
        np.asarray(is_positive, dtype=bool),
        np.asarray(weight, dtype=float) > 0,
    )
    for box in np.asarray(objects_xyxy, dtype=float).reshape(-1, 4) * factor:
        _dashed(draw, box, line)
    for chosen in (np.flatnonzero(kept & ~positive), np.flatnonzero(kept & positive)):
        for query in chosen:
            colour = POSITIVE if positive[query] else BANDS[min(int(bands[query]), len(BANDS)) - 1]
            left, top, right, bottom = boxes[query]
            corners = (left, top, max(right - 1, left), max(bottom - 1, top))
            draw.rectangle(corners, outline=colour, width=line + (1 if positive[query] else 0))
    return np.asarray(canvas)


def _dashed(draw: ImageDraw.ImageDraw, box: npt.NDArray[Any], width: int) -> None:
    left, top, right, bottom = (float(side) for side in box)
    for start, end in (
        ((left, top), (right, top)),
        ((right, top), (right, bottom)),
        ((right, bottom), (left, bottom)),
        ((left, bottom), (left, top)),
    ):
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        dashes = max(1, int(length // (6 * width)))
        for dash in range(dashes):
            a, b = dash / dashes, (dash + 0.5) / dashes
            points = [(start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * t) for t in (a, b)]
            draw.line(points, fill=OBJECT, width=width)


def draw_mask(image: npt.NDArray[Any], mask: npt.NDArray[Any]) -> Picture:
    """The image darkened where the mask is 0, in its own light where it is at its largest, under a warm tint.

    image: uint8 [H, W, 3]. mask: float [h, w] >= 0 over the whole image, any resolution; it is scaled by its maximum.
    """
    pixels, _ = enlarged(image)
    top = float(mask.max()) if mask.size else 0.0
    scaled = np.asarray(mask, np.float32) / top if top > 0 else np.zeros_like(mask, np.float32)
    size = pixels.shape[1], pixels.shape[0]
    smooth = np.asarray(Image.fromarray(scaled, mode="F").resize(size, Image.Resampling.BILINEAR))[..., None]
    grey = pixels.mean(axis=2, keepdims=True) * 0.35
    tint = np.array([255.0, 140.0, 20.0]) * 0.25
    shown = grey * (1 - smooth) + (pixels * 0.85 + tint) * smooth
    return np.clip(shown, 0, 255).astype(np.uint8)
