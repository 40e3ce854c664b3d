"""How MLflow loads a student: this file travels with the model, the decoder's text in place of its import, and needs nothing of
qskd."""

from __future__ import annotations

import base64
import binascii
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qskd.datasets.pictures.decoding import decode


class Student:
    """transformers' detector and its processor, as MLflow's users call a model."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.model = AutoModelForObjectDetection.from_pretrained(folder).eval()
        if getattr(self.model.config, "qskd_quantization", None):
            warnings.warn("a quantised student: its weights are, its activations run in float here", stacklevel=2)

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
            scores, labels, boxes = self._found(picture(image), threshold)
            said.append({"scores": scores, "labels": labels, "boxes": boxes})
        return said

    def _found(self, image: Any, threshold: float) -> tuple[list[float], list[str], list[list[float]]]:
        import torch

        with torch.inference_mode():
            output = self.model(**self.processor(images=image, return_tensors="pt"))
        size = [(image.height, image.width)]
        (found,) = self.processor.post_process_object_detection(output, threshold=threshold, target_sizes=size)
        order = found["scores"].argsort(descending=True, stable=True)
        scores, labels, boxes = (found[name][order].tolist() for name in ("scores", "labels", "boxes"))
        return scores, [self.model.config.id2label[label] for label in labels], boxes


def picture(image: Any) -> Any:
    """Pillow's RGB picture; of a file, upright and read as qskd reads it."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert("RGB")
    if isinstance(image, str):
        try:
            known = len(image) < 4096 and os.path.isfile(image)  # False for what no file can be called, too
            image = (
                Path(image).read_bytes()
                if known
                else base64.b64decode(image.partition("base64,")[2] or image, validate=True)
            )
        except (binascii.Error, ValueError):
            raise ValueError(f"neither a file here nor base64 of a picture: {image[:80]!r}") from None
    if isinstance(image, bytes):
        return decode(image).rgb
    return image.convert("RGB")


def _load_pyfunc(path: str) -> Student:
    """What MLflow calls. path: the model's folder."""
    return Student(path)
