"""What a reader ships of a picture: uint8 pixels once, and a line of numbers that says what is cut from them, how large it
becomes, and whether it is mirrored.

Two kinds of lines, of one form. A raw one: the whole picture, which `qskd.datasets.pictures.resample` resizes where the model
runs. A finished one: what Pillow has made of it here; nothing is left to do but padding. Both give the same pixels, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qskd.config import ResizeConfig
from qskd.datasets.views import Pixels, View, view_image, viewed_size

Cuts: TypeAlias = NDArray[np.float64]
# The columns of Cuts [n, 11]. offset: of the first byte in the flat buffer. height, width: of the picture that lies there.
# out_height, out_width: of the result. flip: 0 or 1. The box is in pixels of that picture, in float32 precision, as Pillow has it.
# y_first: whether Pillow resizes this one's height before its width; 0 or 1.
COLUMNS = ("offset", "height", "width", "out_height", "out_width", "flip", "left", "top", "right", "bottom", "y_first")
SHIP_BYTES = 2**20  # a picture of more bytes is shipped finished, where that is less
MOST_TAPS = (
    32  # a stronger reduction is made here: few bytes leave, and a batch's kernels are as many as its strongest needs
)


@dataclass(frozen=True, eq=False)
class Shipment:
    """One image on its way. pictures: uint8 [h, w, 3], one where all models are served by it, else one for each. cuts: a line
    for each resize, [resizes, 11], its offset from the start of this image's own bytes."""

    pictures: tuple[Pixels, ...]
    cuts: Cuts

    @property
    def nbytes(self) -> int:
        return sum(picture.nbytes for picture in self.pictures)


def shipped(picture: Image.Image, view: View, resizes: Sequence[ResizeConfig], finish: bool) -> Shipment:
    """A decoded RGB picture, the view of it, and the size for each model -> what is shipped.

    finish: by Pillow, here, whatever the size (the models run on a CPU, where Pillow is faster). Otherwise raw, unless that is
    more than SHIP_BYTES and than the finished pixels, or a reduction beyond MOST_TAPS.
    """
    width, height = picture.size
    raw = np.stack([raw_cut(height, width, view, resize) for resize in resizes])
    finished_bytes = int(3 * (raw[:, 3] * raw[:, 4]).sum())
    heavy = 3 * height * width > max(SHIP_BYTES, finished_bytes)
    if not (finish or heavy or max(taps(raw)) > MOST_TAPS):
        return Shipment((np.asarray(picture),), raw)
    pictures, lines, offset = [], [], 0
    for resize in resizes:
        pixels = view_image(picture, view, resize)
        pictures.append(pixels)
        lines.append(finished_cut(pixels.shape[0], pixels.shape[1], offset))
        offset += pixels.nbytes
    return Shipment(tuple(pictures), np.stack(lines))


def raw_cut(height: int, width: int, view: View, resize: ResizeConfig) -> Cuts:
    """The line [11] for a whole picture of this size; offset 0."""
    left, top, right, bottom = view.crop_xyxy
    box = np.array([left * width, top * height, right * width, bottom * height], np.float32)
    out = viewed_size(height, width, view, resize)
    return np.array([0, height, width, *out, view.flip, *box, _y_first((height, width), out)], np.float64)


def finished_cut(height: int, width: int, offset: int = 0) -> Cuts:
    """The line [11] for pixels that are as they shall be."""
    return np.array([offset, height, width, height, width, 0, 0, 0, width, height, 0], np.float64)


def joined(shipments: Sequence[Shipment], resizes: int) -> tuple[NDArray[np.uint8], list[Cuts]]:
    """The images of a batch, of which there may be none -> all bytes, uint8 [bytes], and for each resize the lines [n, 11], offsets
    from the start of it."""
    if not shipments:
        return np.zeros(0, np.uint8), [np.zeros((0, 11))] * resizes
    cuts = np.stack([shipment.cuts for shipment in shipments], axis=1)
    cuts[:, :, 0] += np.cumsum([0, *(shipment.nbytes for shipment in shipments[:-1])])
    return np.concatenate([part.reshape(-1) for shipment in shipments for part in shipment.pictures]), list(cuts)


def sizes_of(cuts: Cuts) -> NDArray[np.int32]:
    """[n, 11] -> the (height, width) of each result, [n, 2]."""
    return cuts[:, 3:5].astype(np.int32)


def is_finished(cuts: Cuts) -> NDArray[np.bool_]:
    """[n, 11] -> [n]: which need padding alone."""
    whole = (cuts[:, 6:8] == 0).all(1) & (cuts[:, 8:10] == cuts[:, 2:0:-1]).all(1)
    found: NDArray[np.bool_] = whole & (cuts[:, 1:3] == cuts[:, 3:5]).all(1) & (cuts[:, 5] == 0)
    return found


def taps(cuts: Cuts) -> tuple[int, int]:
    """The most pixels of a picture's column, and of its row, that one pixel of the result is made of. cuts: [n, 11]."""
    most = []
    for size, out, low, high in ((1, 3, 7, 9), (2, 4, 6, 8)):
        stretch = (cuts[:, high] - cuts[:, low]) / cuts[:, out]
        count = np.minimum(np.ceil(2 * np.maximum(stretch, 1.0)), cuts[:, size])
        most.append(int(count.max(initial=1)))
    return most[0], most[1]


def _y_first(size: tuple[int, int], out: tuple[int, int]) -> bool:
    """Whether Pillow resizes the height first: it rounds between the two, so the order shows."""
    less_high, less_wide = size[0] - out[0], size[1] - out[1]
    if _pillow_weighs():
        return less_high > max(0, 2 * less_wide)
    return less_high > 0 and size[0] > 100 * size[1]


@functools.cache
def _pillow_weighs() -> bool:
    """Whether this Pillow chooses the order by how much either side shrinks (13 does), or all but always takes the width first."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 20, 3)).astype(np.uint8))
    at_once = picture.resize((15, 10), Image.Resampling.BILINEAR)
    width_first = picture.resize((15, 40), Image.Resampling.BILINEAR).resize((15, 10), Image.Resampling.BILINEAR)
    return at_once.tobytes() != width_first.tobytes()
