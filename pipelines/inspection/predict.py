"""Draw a detector's boxes on images (`qskd predict`). Needs no Ray.

python -m pipelines.predict runs/quickstart/qskd/student photo.jpg --out boxes.png
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qskd.datasets.views import decoded
from qskd.detectors import load_detector, read_preprocessing
from qskd.errors import QskdError, writing
from qskd.evaluation.detections import Detections
from qskd.evaluation.inference import predict_image
from qskd.pictures.plots import draw_boxes
from qskd.storage.files import fetched
from qskd.storage.ownership import check_picture, save_picture

log = logging.getLogger("qskd")


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 [H, W, 3], upright, decoded as in training; warns where little of the file's range is used."""
    try:
        picture = decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise QskdError(str(path), f"can't be read: {error.strerror}", "an image file") from None
    if picture.note:
        log.warning("%s: %s", path, picture.note)
    return np.asarray(picture.rgb)


def targets(images: Sequence[Path], out: Path | None) -> list[tuple[Path, Path]]:
    """The picture to write for each image: beside it, or `out` for one image. QskdError where that would replace an image,
    or a file that qskd did not draw."""
    if out is not None and len(images) > 1:
        raise QskdError("--out", f"{len(images)} images for one output file", "one image", "leave --out away")
    pairs = [(path, out or path.with_name(f"{path.stem}.boxes.png")) for path in images]
    check_all_differ(pairs)
    for _, target in pairs:
        check_picture(target, images)
    return pairs


def check_all_differ(pairs: Sequence[tuple[str | Path, Path]]) -> None:
    """QskdError when two images would be drawn into one file."""
    first: dict[Path, str | Path] = {}
    for image, target in pairs:
        if target in first and str(first[target]) != str(image):
            found = f"{first[target]} and {image} would both be drawn there"
            raise QskdError(str(target), found, "a picture each", "give them one after the other, with --out")
        first[target] = image


def write_picture(pixels: np.ndarray, target: Path, inputs: Sequence[str | Path]) -> None:
    """RGB uint8 [H, W, 3] into a file of its own, whose folder is made; QskdError where that can't be."""
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            save_picture(Image.fromarray(pixels), target, inputs)
    except (ValueError, KeyError) as error:  # an ending that names no image format
        raise QskdError(str(target), f"can't be written: {error}", "a picture's file", "--out FILE.png") from None


def predict(
    model: str, images: Sequence[Path], out: Path | None = None, threshold: float = 0.5
) -> list[tuple[Path, Detections]]:
    """Write a picture with boxes for each image; the picture's path and what was found, for each."""
    pairs = targets(images, out)
    with fetched(model) as folder:
        detector, preprocessing = load_detector(folder).eval(), read_preprocessing(folder)
    written = []
    for path, target in pairs:
        image = read_image(path)
        found = predict_image(detector, image, preprocessing, range(len(detector.labels)), threshold)
        picture = draw_boxes(image, found.boxes_xyxy, found.category_ids, found.scores, detector.labels)
        write_picture(picture, target, images)
        written.append((target, found))
    return written
