"""A View: the seeded crop and flip of one image, the same for teacher and student, whatever size each resizes it to.

Also where encoded bytes become pixels, by the one rule of `qskd.datasets.pictures.decoding`: upright, as EXIF says.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.pictures.decoding import Decoded, PictureError, decode, loaded, opened, orientation_of
from qskd.datasets.pictures.facts import Seen
from qskd.errors import QskdError

Pixels: TypeAlias = NDArray[np.uint8]  # [H, W, 3] RGB
_REMEDY = "replace or remove the picture; `--on-error skip` in `qskd prepare` leaves such images out"


@dataclass(frozen=True)
class View:
    """crop_xyxy: left, top, right, bottom relative to the image (0..1); flip: mirror left and right after the crop."""

    crop_xyxy: tuple[float, float, float, float]
    flip: bool

    IDENTITY: ClassVar[View]

    @property
    def is_whole(self) -> bool:
        """Whether the crop is the whole image."""
        return self.crop_xyxy == (0.0, 0.0, 1.0, 1.0)


View.IDENTITY = View((0.0, 0.0, 1.0, 1.0), False)


def _uniforms(seed: int, image_id: int, index: int) -> list[float]:
    """Eight numbers in [0, 1) from a hash: no library's random stream that could change with a release."""
    digest = hashlib.blake2b(f"qskd view {seed} {image_id} {index}".encode(), digest_size=64).digest()
    return [int.from_bytes(digest[i : i + 8], "little") / 2**64 for i in range(0, 64, 8)]


def make_view(policy: ViewConfig, image_id: int, index: int) -> View:
    """The view number `index` of an image; depends on the arguments only. Index 0 may already be flipped or cropped.

    Each decision has its own random number, so changing the crop policy moves no flip and the other way round. With derived
    flips, numbers from `policy.count` up have the crop of the view that they are derived from (`source_view`); with derived crops
    one of their own, and those below show the whole image.
    """
    source, crops_too = source_view(policy, index), policy.derived_taken == "flip_and_crop"
    flip_draw = _uniforms(policy.seed, image_id, index)[0]
    crop_draws = _uniforms(policy.seed, image_id, index if crops_too else source)[1:6]
    crop_draw, width_draw, height_draw, x_draw, y_draw = crop_draws
    crop = View.IDENTITY.crop_xyxy
    if crop_draw < policy.crop_probability and not (crops_too and source == index):
        width = policy.crop_min_scale + (1 - policy.crop_min_scale) * width_draw
        height = policy.crop_min_scale + (1 - policy.crop_min_scale) * height_draw
        left, top = (1 - width) * x_draw, (1 - height) * y_draw
        crop = (left, top, min(1.0, left + width), min(1.0, top + height))
    return View(crop, flip_draw < policy.flip_probability)


def source_view(policy: ViewConfig, index: int) -> int:
    """The number, below `policy.count`, of the view that number `index` is derived from; itself, where none is derived."""
    return index if policy.derived_taken == "none" else index % policy.count


def is_mirrored(policy: ViewConfig, image_id: int, index: int) -> bool:
    """Whether view number `index` is the mirror image of the one that it is derived from."""
    source = source_view(policy, index)
    return source != index and make_view(policy, image_id, index).flip != make_view(policy, image_id, source).flip


def derived_crop(policy: ViewConfig, image_id: int, index: int) -> tuple[float, float, float, float]:
    """left, top, right, bottom (0..1) of what view number `index` shows of the one that it is derived from, after that is mirrored
    where `is_mirrored`; 0, 0, 1, 1 where it shows all of it."""
    if policy.derived_taken != "flip_and_crop":
        return View.IDENTITY.crop_xyxy
    view = make_view(policy, image_id, index)
    left, top, right, bottom = view.crop_xyxy
    return (1 - right, top, 1 - left, bottom) if view.flip else view.crop_xyxy


def resized_size(height: int, width: int, resize: ResizeConfig) -> tuple[int, int]:
    """(height, width) a picture has after `resize`. The shortest_edge rule is transformers' DETR rule to the pixel,
    save that a very long picture keeps at least one pixel (transformers would fail)."""
    if resize.mode == "square":
        return resize.size, resize.size
    short, long = min(height, width), max(height, width)
    edge, exact = resize.size, float(resize.size)
    if long / short * edge > resize.longest:
        exact = resize.longest * short / long
        edge = round(exact)
    if short == edge:
        return height, width
    # The longer side comes from the unrounded shorter one; int(), not round(): what DETR has always done.
    if width < height:
        return max(1, int(exact * height / width)), max(1, edge)
    return max(1, edge), max(1, int(exact * width / height))


def crop_size(height: int, width: int, view: View) -> tuple[int, int]:
    """(height, width) of what a view shows of a picture of this size, in its own pixels, rounded to whole ones."""
    if view.is_whole:
        return height, width
    left, top, right, bottom = view.crop_xyxy
    return max(1, round(bottom * height - top * height)), max(1, round(right * width - left * width))


def viewed_size(height: int, width: int, view: View, resize: ResizeConfig) -> tuple[int, int]:
    """(height, width) that `view_image` gives of a picture of this size: known without decoding it."""
    return resized_size(*crop_size(height, width, view), resize)


def view_image(image: Pixels | Image.Image, view: View, resize: ResizeConfig) -> Pixels:
    """Crop, flip and resize (Pillow's antialiased bilinear filter): [H, W, 3] or an RGB picture -> uint8 [h, w, 3].

    The crop is not rounded to whole pixels, so that models of different input sizes see exactly the same region.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    left, top, right, bottom = view.crop_xyxy
    width, height = picture.size
    out_height, out_width = viewed_size(height, width, view, resize)
    # Without a box for the whole picture: Pillow then takes its shortcut for pictures that keep their size.
    box = None if view.is_whole else (left * width, top * height, right * width, bottom * height)
    resized = picture.resize((out_width, out_height), Image.Resampling.BILINEAR, box=box)
    if view.flip:  # by Pillow: a ninth of the time of NumPy's copy
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels: Pixels = np.asarray(resized)
    return pixels


def view_picture(image: Pixels, view: View) -> Pixels:
    """What a view shows, at the picture's own resolution, for people: uint8 [h, w, 3] of `crop_size`."""
    sides = crop_size(image.shape[0], image.shape[1], view)
    return view_image(image, view, ResizeConfig(mode="shortest_edge", size=min(sides), longest=max(sides)))


def view_boxes(
    boxes_xyxy: NDArray[np.float32], width: int, height: int, view: View, min_visible: float
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Absolute boxes [N, 4] of a width x height image -> boxes_cxcywh [N', 4] relative to the view, and the indices
    [N'] kept: those of which at least `min_visible` of the area, and more than nothing, is inside the crop."""
    boxes = boxes_xyxy.reshape(-1, 4).astype(np.float64) / np.array([width, height, width, height], np.float64)
    left, top, right, bottom = view.crop_xyxy
    low = np.maximum(boxes[:, :2], [left, top])
    high = np.minimum(boxes[:, 2:], [right, bottom])
    visible = np.clip(high - low, 0, None).prod(axis=1)
    whole = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    # The slack is for rounding: an untouched box has visible == whole only up to the last bits.
    kept = np.flatnonzero((visible > 0) & (visible >= whole * min_visible * (1 - 1e-9)))
    size = np.array([right - left, bottom - top])
    low, high = (low[kept] - [left, top]) / size, (high[kept] - [left, top]) / size
    if view.flip:
        low[:, 0], high[:, 0] = 1 - high[:, 0], 1 - low[:, 0]
    return np.concatenate([(low + high) / 2, high - low], axis=1).astype(np.float32), kept


def decoded(encoded: bytes, where: str, scale: int = 1) -> Decoded:
    """Encoded bytes -> an upright RGB picture, by the rule of `qskd.datasets.pictures.decoding`, and what is to be said of it.
    scale: see `decode`. Raises QskdError naming `where` when the bytes are broken, or a picture of a kind that is not read."""
    with _named(where):
        return decode(encoded, scale)


def decode_image(encoded: bytes, where: str) -> Image.Image:
    """`decoded`, the picture alone."""
    return decoded(encoded, where).rgb


def check_image(encoded: bytes, where: str) -> Seen:
    """What is true of the picture. Reads the data to its end; QskdError when it is broken, or `decode_image` refuses it."""
    with _named(where):
        picture = opened(encoded)
        if picture.format not in ("JPEG", "MPO"):
            found = decode(encoded)
            return Seen(*found.rgb.size, found.orientation, found.deep, found.note)
        width, height = picture.size
        # Still reads all data, but skips most of the inverse transform.
        picture.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        loaded(picture)
        orientation = orientation_of(picture)
    return Seen(*((height, width) if orientation >= 5 else (width, height)), orientation, False, "")


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except PictureError as error:
        raise QskdError(where, error.found, error.expected, error.remedy or _REMEDY) from None


def derivations(
    config: ViewConfig, views: NDArray[np.integer[Any]], image_ids: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """What remains to be done to the rows of these views, which are mirrored already, and to which of them anything was done."""
    if config.derived_taken == "none":
        return {}
    places = list(zip(image_ids.tolist(), views.tolist(), strict=True))
    crops = np.array([derived_crop(config, *place) for place in places], np.float32).reshape(-1, 4)
    whole = np.array(View.IDENTITY.crop_xyxy, np.float32)
    mirrored = np.array([is_mirrored(config, *place) for place in places], bool)
    found = {"teacher_derived": mirrored | (crops != whole).any(1)}
    return found | ({"teacher_crops_xyxy": crops} if config.derived_taken == "flip_and_crop" else {})
