"""A loader's batch through a detector: detections in pixels of the original images. One home for every program that predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from qskd.datasets.batch import images_of, least_of
from qskd.datasets.views import View, crop_size, view_image
from qskd.detectors import Detector, Preprocessing, to_pixels
from qskd.evaluation.average_precision import detections_from
from qskd.evaluation.detections import Detections
from qskd.evaluation.pairs import Pairs
from qskd.precision import autocast


def predict_batch(
    detector: Detector,
    arrays: Mapping[str, np.ndarray],
    preprocessing: Preprocessing,
    category_ids: Sequence[int],
    slots: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    top_k: int = 100,
) -> Detections:
    """arrays: the loader's: pixels ("images" uint8 [n, H, W, 3] and "sizes" int [n, 2], or what it leaves to the device),
    "original_sizes" int [n, 2], "image_ids" [n]; n may be 0.

    slots: the logit slot of each class in `category_ids`; None when they are the same. The detector must be in evaluation
    mode.
    """
    return predict_pairs(detector, arrays, preprocessing, category_ids, [Pairs(top_k, False)], slots, device)[0]


def predict_pairs(
    detector: Detector,
    arrays: Mapping[str, np.ndarray],
    preprocessing: Preprocessing,
    category_ids: Sequence[int],
    choices: Sequence[Pairs],
    slots: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    precision: str = "float32",
) -> list[Detections]:
    """The same for each choice of (query, class) pairs, of one pass of the detector. precision: as `compute.precision` has it."""
    if not len(arrays["image_ids"]):
        return [Detections.empty() for _ in choices]
    images, sizes = images_of(arrays, device)
    pixels, mask = to_pixels(images, sizes, preprocessing.mean, preprocessing.std)
    with torch.inference_mode(), autocast(precision, torch.device(device)):
        output = detector(pixels, mask, with_attention=False, least=least_of(arrays))
        logits = output.logits[-1] if slots is None else output.logits[-1][..., list(slots)]
        original_sizes = torch.from_numpy(arrays["original_sizes"].copy())
        ids = arrays["image_ids"].tolist()
        said = logits.cpu(), output.boxes_cxcywh[-1].cpu(), ids, original_sizes, category_ids
        return [detections_from(*said, choice.most, choice.one_a_query) for choice in choices]


def predict_image(
    detector: Detector,
    image: np.ndarray,
    preprocessing: Preprocessing,
    slots: Sequence[int],
    threshold: float = 0.0,
    view: View = View.IDENTITY,
) -> Detections:
    """One uint8 [H, W, 3] image; `category_ids` of the result are positions in `slots`. Best first. Boxes are in pixels of
    what `view` shows (`qskd.datasets.views.view_picture`). As many as the detector has queries, 100 at least, reach the threshold;
    without one they are the 100 that AP is measured on."""
    pixels = view_image(image, view, preprocessing.resize)
    arrays = {
        "images": pixels[None],
        "sizes": np.array([pixels.shape[:2]]),
        "original_sizes": np.array([crop_size(image.shape[0], image.shape[1], view)]),
        "image_ids": np.zeros(1, np.int64),
    }
    most = most_pairs(detector.num_queries, threshold)
    device = next(detector.parameters()).device
    found = predict_batch(detector, arrays, preprocessing, range(len(slots)), slots, device, most)
    return best_first(found, threshold)


def most_pairs(queries: int, threshold: float) -> int:
    """How many of an image's pairs may reach a threshold; without one, the 100 that AP is measured on."""
    return max(100, queries) if threshold else 100


def best_first(found: Detections, threshold: float) -> Detections:
    """Those whose score reaches `threshold`, in falling order of score."""
    kept = np.flatnonzero(found.scores >= threshold)
    kept = kept[np.argsort(-found.scores[kept], kind="stable")]
    return Detections(**{name: value[kept] for name, value in vars(found).items()})
