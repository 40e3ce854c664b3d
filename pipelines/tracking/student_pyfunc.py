"""How MLflow loads a student: this file travels with the model, and imports nothing of qskd."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any


class Student:
    """transformers' object-detection pipeline, as MLflow's users call a model."""

    def __init__(self, folder: str) -> None:
        from transformers import pipeline

        self.pipeline = pipeline("object-detection", model=folder)

    def predict(self, images: Any, params: dict[str, Any] | None = None) -> Any:
        """images: a table with one column, a list, or one: files' paths, base64 of PNG or JPEG, bytes, Pillow's pictures, or RGB
        uint8 arrays [H, W, 3]. No address is fetched.

        Returns a mapping an image, what lists best first: "scores", "labels" (names), "boxes" ([xmin, ymin, xmax, ymax] in
        pixels). params: "threshold", the lowest score; 0.5.
        """
        if hasattr(images, "columns"):
            images = images[images.columns[0]].tolist()
        elif not isinstance(images, list | tuple):
            images = images.tolist() if hasattr(images, "tolist") and getattr(images, "ndim", 3) == 1 else [images]
        threshold = float((params or {}).get("threshold", 0.5))
        said = []
        for image in images:
            found = sorted(self.pipeline(picture(image), threshold=threshold), key=lambda each: -each["score"])
            boxes = [[float(each["box"][side]) for side in ("xmin", "ymin", "xmax", "ymax")] for each in found]
            scores, labels = [each["score"] for each in found], [each["label"] for each in found]
            said.append({"scores": scores, "labels": labels, "boxes": boxes})
        return said


def picture(image: Any) -> Any:
    """Pillow's RGB picture."""
    import numpy as np
    from PIL import Image

    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert("RGB")
    if isinstance(image, str):
        try:
            known = len(image) < 4096 and Path(image).is_file()
            image = (
                Path(image).read_bytes()
                if known
                else base64.b64decode(image.partition("base64,")[2] or image, validate=True)
            )
        except (binascii.Error, ValueError):
            raise ValueError(f"neither a file here nor base64 of a picture: {image[:80]!r}") from None
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    return image.convert("RGB")


def _load_pyfunc(path: str) -> Student:
    """What MLflow calls. path: the model's folder."""
    return Student(path)
