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
from qskd.datasets.pictures.decoding import Decoded
from qskd.datasets.pictures.quick_jpeg import decoded_into
from qskd.datasets.views import Pixels, View, decoded, view_image, viewed_size

Cuts: TypeAlias = NDArray[np.float64]
# The columns of Cuts [n, 11]: offset of the first byte in the flat buffer, height and width of the picture that lies there, height
# and width of the result, flip (0 or 1), left, top, right and bottom of what is cut, in pixels of that picture (in float32's
# precision, as Pillow has it), and whether Pillow resizes this one's height before its width (0 or 1).
SHIP_BYTES = 2**20  # a picture of more bytes is shipped finished, where that is less
# A larger JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves so many times the pixels that are needed, a side. Of COCO's
# photographs the mean difference is then 0.4 to 0.5 of 255 levels, of the worst one 1.1, and of the worst pixel 17 (2 times:
# 0.7 to 1.1, 2.4 and 20).
KEPT_TIMES = 3
# A stronger reduction is made here: few bytes leave, and a batch's kernels are as many as its strongest needs.
MOST_TAPS = 32


@dataclass(frozen=True, eq=False)
class Plan:
    """What is shipped of one image, known from its size alone. resizes, scales: one for each model; a scale is the part of its size
    that the picture is decoded at. cuts: [resizes, 11], offsets from the start of this image's own bytes. nbytes: of its pixels."""

    size: tuple[int, int]  # height, width
    view: View
    resizes: tuple[ResizeConfig, ...]
    is_raw: bool
    scales: tuple[int, ...]
    cuts: Cuts
    nbytes: int

    def fill(self, encoded: bytes, where: str, out: NDArray[np.uint8]) -> tuple[int, int]:
        """Decode the picture, and put what is shipped into `out` [nbytes], unless its real (height, width), which this returns, is
        another than the plan's. Raises QskdError naming `where` when the picture can't be decoded."""
        if self.is_raw and decoded_into(encoded, self.size, out):
            return self.size
        pictures: dict[int, Decoded] = {}
        for scale in sorted(set(self.scales), reverse=True):
            whole = next(
                (one for one in pictures.values() if one.rgb.size == one.size), None
            )  # not all formats are reduced
            pictures[scale] = whole or decoded(encoded, where, scale)
        width, height = pictures[scale].size
        if (height, width) == self.size:
            self._put([pictures[scale] for scale in self.scales], out)
        return height, width

    def fill_from(self, picture: Image.Image, out: NDArray[np.uint8]) -> None:
        """The same of a whole picture that was decoded, of the plan's size."""
        whole = Decoded(picture, 1, False, "", picture.size, (0, 0, *picture.size))
        self._put([whole] * len(self.scales), out)

    def finished(self, pixels: NDArray[np.uint8], number: int) -> Pixels:
        """What model `number` sees, [h, w, 3], of an image that the reader has finished."""
        start, height, width = (int(value) for value in self.cuts[number, :3])
        return pixels[start : start + 3 * height * width].reshape(height, width, 3)

    def _put(self, pictures: Sequence[Decoded], out: NDArray[np.uint8]) -> None:
        if self.is_raw:
            out[:] = np.asarray(pictures[0].rgb).reshape(-1)
            return
        for picture, resize, cut in zip(pictures, self.resizes, self.cuts, strict=True):
            pixels, start = _finished(picture, self.view, resize), int(cut[0])
            out[start : start + pixels.nbytes] = pixels.reshape(-1)


def planned(size: tuple[int, int], view: View, resizes: Sequence[ResizeConfig], finish: bool) -> Plan:
    """size: (height, width) of the picture. resizes: of each model that sees it.

    finish: by Pillow, on the reader, whatever the size (the models run on a CPU, where Pillow is faster). Otherwise raw, unless
    that is more than SHIP_BYTES and than the finished pixels, or a reduction beyond MOST_TAPS. A large JPEG is decoded at a part
    of its size where that is enough (KEPT_TIMES), for each resize on its own: what a model sees does not depend on what another
    one is shown.
    """
    raw = np.stack([raw_cut(*size, view, resize) for resize in resizes])
    scales = tuple(reduced_scale(line) for line in raw)
    raw_bytes, finished_bytes = 3 * size[0] * size[1], (3 * raw[:, 3] * raw[:, 4]).astype(int)
    heavy = raw_bytes > max(SHIP_BYTES, finished_bytes.sum()) or set(scales) != {1} or max(taps(raw)) > MOST_TAPS
    if not (finish or heavy):
        return Plan(size, view, tuple(resizes), True, scales, raw, raw_bytes)
    starts = np.cumsum(finished_bytes) - finished_bytes
    lines = [finished_cut(int(h), int(w), int(start)) for (h, w), start in zip(raw[:, 3:5], starts, strict=True)]
    return Plan(size, view, tuple(resizes), False, scales, np.stack(lines), int(finished_bytes.sum()))


def placed(plans: Sequence[Plan]) -> list[Cuts]:
    """For each resize the lines [n, 11] of images whose bytes follow each other, without a gap. There must be an image."""
    cuts = np.stack([plan.cuts for plan in plans], axis=1)
    cuts[:, :, 0] += np.cumsum([0, *(plan.nbytes for plan in plans[:-1])])
    return list(cuts)


def reduced_scale(cut: Cuts) -> int:
    """1, 2, 4 or 8: the part of its size that a JPEG need be decoded at. cut: [11], of the whole picture."""
    if 3 * cut[1] * cut[2] <= SHIP_BYTES:
        return 1
    times = min((cut[8] - cut[6]) / cut[4], (cut[9] - cut[7]) / cut[3]) / KEPT_TIMES
    return next(scale for scale in (8, 4, 2, 1) if scale == 1 or times >= scale)


def _finished(picture: Decoded, view: View, resize: ResizeConfig) -> Pixels:
    if picture.rgb.size == picture.size:
        return view_image(picture.rgb, view, resize)
    low_x, low_y, high_x, high_y = picture.extent_xyxy
    wide, high = high_x - low_x, high_y - low_y
    left, top, right, bottom = view.crop_xyxy
    box = (low_x + left * wide, low_y + top * high, low_x + right * wide, low_y + bottom * high)
    out_height, out_width = viewed_size(picture.size[1], picture.size[0], view, resize)
    resized = picture.rgb.resize((out_width, out_height), Image.Resampling.BILINEAR, box=box)
    pixels: Pixels = np.asarray(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else resized)
    return pixels


def raw_cut(height: int, width: int, view: View, resize: ResizeConfig) -> Cuts:
    """The line [11] for a whole picture of this size; offset 0."""
    left, top, right, bottom = view.crop_xyxy
    box = np.array([left * width, top * height, right * width, bottom * height], np.float32)
    out = viewed_size(height, width, view, resize)
    return np.array([0, height, width, *out, view.flip, *box, _y_first((height, width), out)], np.float64)


def finished_cut(height: int, width: int, offset: int = 0) -> Cuts:
    """The line [11] for pixels that are as they shall be."""
    return np.array([offset, height, width, height, width, 0, 0, 0, width, height, 0], np.float64)


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
