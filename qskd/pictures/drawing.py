"""What several pictures draw alike: an image at its panel's size, objects' outlines, heat over an image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from qskd.pictures.panels import draw_dashed
from qskd.pictures.plots import Colour, Picture

SIDE = 512  # pixels of a panel's longer side
OBJECT: Colour = (255, 255, 255)
_MANY = 40  # boxes, from which on their lines are thinner


def fitted(image: npt.NDArray[Any], side: int = SIDE) -> tuple[Picture, float]:
    """uint8 [H, W, 3] -> its longer side `side` pixels long, and the factor. Small pictures keep their pixels as squares
    of whole size, and come out at most so large."""
    longer = max(image.shape[:2])
    if 2 * longer <= side:
        whole = side // longer
        return image.repeat(whole, axis=0).repeat(whole, axis=1), float(whole)
    factor = side / longer
    size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)), factor


def corners(box: npt.NDArray[Any], canvas: Image.Image) -> tuple[float, float, float, float]:
    """Pillow takes the last pixel inside the box, and an inverted or empty box would be an error there; sides far outside
    are brought near, for dashes would be drawn all the way."""
    beyond = max(canvas.size) + 100
    left, top, right, bottom = np.nan_to_num(np.asarray(box, float)).clip(-beyond, 2 * beyond).tolist()
    return left, top, max(right - 1, left), max(bottom - 1, top)


def line_width(canvas: Image.Image, boxes: int) -> int:
    """In pixels; thinner where boxes are many."""
    return max(1, round(max(canvas.size) / 220) - (1 if boxes > _MANY else 0))


def draw_objects(canvas: Image.Image, objects_xyxy: npt.ArrayLike, line: int) -> None:
    draw = ImageDraw.Draw(canvas)
    for box in np.asarray(objects_xyxy, dtype=float).reshape(-1, 4):
        draw_dashed(draw, corners(box, canvas), OBJECT, line)


@lru_cache
def heat_colours() -> tuple[Colour, ...]:
    """256 colours from 0 to the largest value: dark violet to light yellow, as light as they are high."""
    from matplotlib import colormaps

    table = np.asarray(colormaps["inferno"](np.linspace(0.12, 0.97, 256)))[:, :3]
    return tuple((round(r), round(g), round(b)) for r, g, b in (table * 255).tolist())


def draw_mask(
    image: npt.NDArray[Any], mask: npt.NDArray[Any], objects_xyxy: Sequence[Any] | npt.NDArray[Any] = ()
) -> Picture:
    """The image in grey under the mask's heat (`heat_colours`), and its objects (white, dashed).

    image: uint8 [H, W, 3]; objects_xyxy [M, 4] in its pixels. mask: float [h, w] >= 0 over the whole image, any resolution;
    it is scaled by its maximum and smoothed between its cells' centres.
    """
    top = float(mask.max()) if mask.size else 0.0
    scaled = np.asarray(mask, np.float32) / top if top > 0 else np.zeros((1, 1), np.float32)
    size = image.shape[1], image.shape[0]
    smooth = np.asarray(Image.fromarray(scaled, mode="F").resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    heat = np.array(heat_colours(), np.float32)[(smooth * 255).round().astype(int)]
    grey = np.asarray(image, np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    opaque = (0.5 + 0.35 * smooth)[..., None]
    shown = 0.6 * grey[..., None] * (1 - opaque) + heat * opaque
    canvas = Image.fromarray(np.clip(shown, 0, 255).astype(np.uint8))
    draw_objects(canvas, objects_xyxy, line_width(canvas, 4 * len(objects_xyxy)))
    return np.asarray(canvas)


def counted(count: int, one: str, many: str = "") -> str:
    return f"{count if count else 'no'} {one if count == 1 else many or one + 's'}"
