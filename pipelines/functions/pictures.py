"""Pictures as `qskd.predict` takes them: files, Pillow's, arrays. All come out as the decoder makes them of a file."""

from __future__ import annotations

import io
import logging
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pipelines.command import local_path
from pipelines.inspection.predict import read_image
from qskd.datasets.pictures.decoding import is_deep, orientation_of
from qskd.datasets.views import decoded
from qskd.errors import QskdError

log = logging.getLogger("qskd")
WHERE = "qskd.predict: images"


def pixels_of(image: Any) -> np.ndarray:
    """RGB uint8 [H, W, 3], upright. QskdError for what is no picture, or an array of another kind."""
    if isinstance(image, Image.Image):
        return _of_pillow(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            found = f"an array of {image.dtype}, {list(image.shape)}"
            raise QskdError(WHERE, found, "RGB of uint8, [height, width, 3]; several in a list")
        return image
    if isinstance(image, str | os.PathLike):
        return read_image(local_path(image))
    raise QskdError(WHERE, f"a {type(image).__name__}", "a file's path, a picture of Pillow's, or an array")


def _of_pillow(image: Image.Image) -> np.ndarray:
    """Turned as its EXIF says, and of more than 8 bits a channel scaled, as its file would be: Pillow itself does neither."""
    upright = ImageOps.exif_transpose(image) if orientation_of(image) != 1 else image
    if not is_deep(upright):
        return np.asarray(upright.convert("RGB"))
    file = io.BytesIO()
    upright.save(file, "TIFF")
    picture = decoded(file.getvalue(), WHERE)
    if picture.note:
        log.warning("%s: %s", WHERE, picture.note)
    return np.asarray(picture.rgb)
