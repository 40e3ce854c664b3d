"""Encoded bytes -> an upright RGB picture of 8 bits a channel. The one rule, for shards, training and every program.

`qskd export` puts this file's text into detect.py, so it uses numpy and Pillow only, and nothing of qskd.

- A picture is turned as its EXIF orientation says (in JPEG, PNG, WebP and TIFF), as people and transformers see it.
- More than 8 bits a channel: the fewest of 8, 10, 12, 14 or 16 bits that hold the picture's largest value are taken for its
  range (cameras put 12 bits into files of 16). One value decides: nothing is clipped. Where nearly all of the picture lies in a
  quarter of that range, `note` says so. Larger or negative values are refused.
- Floating point: 0 is black and 1 is white. Values beyond are refused: nothing says what is white.
- A TIFF whose 0 is white (WhiteIsZero) is inverted, of any depth.
- Grey, palette, CMYK and so on become RGB; transparency is dropped. Of several frames the first is taken.
"""

from __future__ import annotations

import io
import sys
import warnings
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

# Pillow would also open formats that start other programs (EPS runs Ghostscript); a dataset has no use for those.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
ORIENTATION = 0x0112
PHOTOMETRIC = 0x0106  # TIFF's; 0: WhiteIsZero
FEW = 0.001  # of a picture's values: hot pixels, which say nothing of the others
BITS = (8, 10, 12, 14, 16)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow knows 16-bit TIFFs whose 0 is white in one of the two orders of bytes only.
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))
# Pillow warns of pictures from half the size that it refuses, which are read here, and of broken EXIF, which means nothing.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Corrupt EXIF data")


class PictureError(ValueError):
    """What was found in the bytes, what was expected, what to do ("" where the caller knows best)."""

    def __init__(self, found: str, expected: str, remedy: str = "") -> None:
        super().__init__(f"{found}; expected: {expected}" + (f"; what to do: {remedy}" if remedy else ""))
        self.found, self.expected, self.remedy = found, expected, remedy


class Decoded(NamedTuple):
    """rgb: upright, 8 bits a channel. orientation: what EXIF said, 1 to 8; 1 is upright. deep: more than 8 bits a channel in
    the file. note: what a person should know of its range, or the empty string. size: (width, height) of the upright picture,
    however small it was decoded. extent_xyxy: where that picture lies in `rgb`, in its pixels; an edge may cut through one."""

    rgb: Image.Image
    orientation: int
    deep: bool
    note: str
    size: tuple[int, int]
    extent_xyxy: tuple[float, float, float, float]


def opened(encoded: bytes) -> Image.Image:
    """The picture with its pixels still encoded. PictureError when this is no picture, or one of too many pixels."""
    try:
        return Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise PictureError(
            f"{_size_said(encoded)}, more than is decoded: {error}",
            f"at most {limit:,} pixels, such as {int(limit**0.5):,} x {int(limit**0.5):,}",
            "make the picture smaller (and its boxes with it), or cut it into tiles: a detector sees some 1,000 pixels a side",
        ) from None
    except Exception as error:  # Pillow's plugins raise almost anything on broken headers
        head = encoded[:8].hex(" ") or "no bytes at all"
        found = f"not a readable image ({type(error).__name__}; {len(encoded)} bytes, beginning {head})"
        raise PictureError(found, f"a whole {', '.join(IMAGE_FORMATS)} file") from None


def _size_said(encoded: bytes) -> str:
    """What the header of a picture says that `Image.open` refuses for its size."""
    for kind in IMAGE_FORMATS:
        try:
            width, height = Image.OPEN[kind][0](io.BytesIO(encoded), "").size
        except Exception:  # another format's
            continue
        return f"{width:,} x {height:,} pixels"
    return "a picture"


def loaded(picture: Image.Image) -> None:
    """Decode the pixels. PictureError when the picture is broken."""
    expected = f"a whole {picture.format} of {picture.width} x {picture.height} pixels"
    try:
        picture.load()
    except Exception as error:
        raise PictureError(f"the picture is broken: {error}", expected) from None


def orientation_of(picture: Image.Image) -> int:
    """1 to 8, as EXIF says; 1 where it says nothing, or nonsense: broken EXIF is no broken picture."""
    try:
        said = picture.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
    return said if isinstance(said, int) and said in _TURNS else 1


def says_orientation(encoded: bytes) -> bool:
    """Whether a PNG may say how it is to be turned: in EXIF, before or behind its pixels, in ImageMagick's way, or in XMP."""
    return any(mark in encoded for mark in (b"eXIf", b"exif", b"adobe.xmp"))


def is_deep(picture: Image.Image) -> bool:
    """Whether a picture whose pixels are still encoded has more than 8 bits a channel."""
    return picture.mode[0] in "IF" or any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ()))


def decode(encoded: bytes, scale: int = 1) -> Decoded:
    """Raises PictureError when the bytes are broken, no picture, or one whose range is not known.

    scale: 2, 4 or 8: a JPEG is decoded at that part of its size, which is faster; anything else as it is.
    """
    picture = opened(encoded)
    width, height = picture.size
    if scale > 1 and picture.format in ("JPEG", "MPO"):
        picture.draft(None, (max(1, width // scale), max(1, height // scale)))
    deep = is_deep(picture)
    before = orientation_of(picture) if picture.format == "TIFF" else 1  # Pillow turns these when it loads them
    loaded(picture)
    left = orientation_of(picture)
    rgb, note = _deep_as_rgb(picture, encoded) if deep else (_as_rgb(picture), "")
    upright = rgb.transpose(_TURNS[left]) if left != 1 else rgb
    if picture.size == (width, height) or before != 1:
        return Decoded(upright, max(before, left), deep, note, upright.size, (0, 0, *upright.size))
    size = (height, width) if left >= 5 else (width, height)
    return Decoded(upright, left, deep, note, size, _extent(upright.size, size, left))


def _extent(small: tuple[int, int], size: tuple[int, int], orientation: int) -> tuple[float, float, float, float]:
    """JPEG's reduced sizes are rounded up: the last row and column show less than the others, wherever they were turned to."""
    scale = next(scale for scale in (2, 4, 8) if small == (-(-size[0] // scale), -(-size[1] // scale)))
    wide, high = size[0] / scale, size[1] / scale
    left = small[0] - wide if orientation in (2, 3, 6, 7) else 0.0
    top = small[1] - high if orientation in (3, 4, 7, 8) else 0.0
    return left, top, left + wide, top + high


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    picture.info.pop("transparency", None)  # dropped, without Pillow's warning that it is
    try:
        return picture.convert("RGB")
    except ValueError:
        expected = "grey, RGB, CMYK or a palette, with or without transparency"
        raise PictureError(f"pixels of mode {picture.mode}", expected, "convert the picture to RGB") from None


def _deep_as_rgb(picture: Image.Image, encoded: bytes) -> tuple[Image.Image, str]:
    if picture.mode == "F":
        grey, note = _float_as_grey(np.asarray(picture))
    elif picture.mode == "CMYK":  # which has no plain range
        return _as_rgb(picture), ""
    elif picture.mode[0] == "I":
        grey, note = _integers_as_bytes(np.asarray(picture).astype(np.int32))
    else:
        # Pillow keeps the high byte of each channel.
        grey, note = _integers_as_bytes(_both_bytes(np.asarray(picture).astype(np.int32)[..., :3], encoded))
    # Pillow inverts those of 8 bits and fewer itself.
    inverted = getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == 0
    return Image.fromarray(255 - grey if inverted else grey).convert("RGB"), note


def _integers_as_bytes(values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], str]:
    least, most = int(values.min()), int(values.max())
    if least < 0 or most >= 2 ** BITS[-1]:
        found = f"values from {least} to {most}"
        raise PictureError(found, f"0 to {2 ** BITS[-1] - 1}", "convert the picture to 8 or 16 bits a channel")
    bits = next(bits for bits in BITS if most < 2**bits)
    note = f"16 bits a channel, of which only 0 to {most} are used: read as {bits} bits" if bits < BITS[-1] else ""
    if few := _few_beyond(values, 2**bits // 4):
        note += "; of these, " if note else f"read as {bits} bits for its largest value, {most}: "
        note += f"{few} above {2**bits // 4 - 1}, so nearly all of the picture lies in a quarter of the range"
    return (values * 255 // (2**bits - 1)).astype(np.uint8), note


def _few_beyond(values: np.ndarray[Any, Any], limit: float) -> str:
    """How many of the values reach the limit, where these are hot pixels at most; else the empty string."""
    count = int(np.count_nonzero(values >= limit))
    few = max(int(values.size * FEW), 3 if values.ndim == 3 else 1)  # one pixel, in a small picture
    hot = 0 < count <= min(few, values.size // 2)
    return f"{count} of {values.size} values {'is' if count == 1 else 'are'}" if hot else ""


def _both_bytes(high: np.ndarray[Any, np.dtype[np.int32]], encoded: bytes) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The values of 16-bit channels, [H, W, 3], or [H, W] of grey with transparency, whose high bytes Pillow has read."""
    picture: Any = opened(encoded)
    native = {"little": "L", "big": "B"}[sys.byteorder]

    def swapped(mode: str) -> str:
        if mode == "LA;16B":  # of PNG: read as the four bytes that they are
            return "RGBA"
        kind, _, order = mode.partition(";16")
        return f"{kind};16{'B' if order.replace('N', native) == 'L' else 'L'}" if order else mode

    grey = any(tile[3] == "LA;16B" for tile in picture.tile)
    try:
        # The same data, read in the other order of bytes.
        picture.tile = [
            (codec, extents, offset, swapped(mode) if isinstance(mode, str) else (swapped(mode[0]), *mode[1:]))
            for codec, extents, offset, mode in picture.tile
        ]
        picture.load()
    except Exception:
        found = "16 bits a channel, of which Pillow reads the high ones only"
        raise PictureError(found, "grey or RGB", "convert the picture to 8 bits a channel") from None
    low = np.asarray(picture).astype(np.int32)
    return low[..., 0] * 256 + low[..., 1] if grey else high * 256 + low[..., :3]


def _float_as_grey(values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], str]:
    least, most = float(values.min()), float(values.max())
    if not (least >= 0 and most <= 1):  # False for NaN
        found = f"floating-point pixels from {least:.4g} to {most:.4g}"
        remedy = "scale them to 0..1, or convert the picture to 8 or 16 bits a channel"
        raise PictureError(found, "0 (black) to 1 (white)", remedy)
    few = _few_beyond(values, 0.25)
    note = f"{few} above 0.25, so nearly all of the picture lies in a quarter of the range" if few else ""
    if most < 0.25:
        note = f"only 0 to {most:.2g} is used"
    return np.rint(values * 255).astype(np.uint8), f"floating point, of which {note}" if note else ""
