"""Plain JPEGs decoded by simplejpeg (libjpeg-turbo without Pillow around it), straight into the memory that leaves the process:
the same pixels in three quarters of the time. Where Pillow resizes them afterwards nothing is won: it would copy them first.

Plain: 8-bit YCbCr that decodes without a warning. For all others, and where simplejpeg is missing, Pillow decodes
(`qskd.datasets.pictures.decoding`). Both libraries bring a libjpeg-turbo of their own; that they agree, bit for bit, is tried once
in each process, and simplejpeg is left alone where they do not.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qskd.datasets.pictures.decoding import PictureError, opened, orientation_of

_SIGNATURE = b"\xff\xd8"  # of a JPEG: others are opened once, by `decode`


def decoded_into(encoded: bytes, size: tuple[int, int], out: NDArray[np.uint8]) -> bool:
    """Whether `out`, uint8 [height * width * 3], now has the pixels of an upright picture of `size` (height, width). If not, it may
    hold anything, and `decode` is to be asked, which also says what is wrong."""
    if not encoded.startswith(_SIGNATURE) or state() != "ok":
        return False
    try:
        picture = opened(encoded)
    except PictureError:
        return False
    if picture.size != size[::-1] or orientation_of(picture) != 1 or not _is_plain(encoded, picture):
        return False
    import simplejpeg

    try:
        simplejpeg.decode_jpeg(encoded, "RGB", buffer=out, strict=True)
    except ValueError:  # broken, or repaired in a way that Pillow has rules for
        return False
    return True


@functools.cache
def state() -> str:
    """ "ok", or why Pillow decodes JPEGs."""
    try:
        import simplejpeg
    except ImportError as error:
        return f"simplejpeg is not there ({error})"
    random = np.random.default_rng(0)
    # Smooth, so that samplings of colour differ from each other where two libraries would.
    pixels = (128 + np.cumsum(np.cumsum(random.integers(-9, 10, (37, 53, 3)), 0), 1)).clip(0, 255).astype(np.uint8)
    for options in (
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"subsampling": 2, "progressive": True},
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90, **options)
        ours = simplejpeg.decode_jpeg(buffer.getvalue(), "RGB")
        if (ours != np.asarray(Image.open(buffer))).any():
            return f"simplejpeg {simplejpeg.__version__} gives other pixels than Pillow {Image.__version__}"
    return "ok"


def _is_plain(encoded: bytes, picture: Image.Image) -> bool:
    if picture.format != "JPEG" or picture.mode != "RGB":
        return False
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return False
    return (width, height) == picture.size and colorspace == "YCbCr"
