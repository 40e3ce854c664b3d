"""From an image to boxes with an exported detector: numpy, onnxruntime (or OpenVINO) and Pillow; no torch, transformers or qskd.

`qskd export` writes it, with the decoder (`qskd.datasets.pictures.decoding`) in it, as detect.py into every folder:

    python detect.py photo.jpg --threshold 0.5
    python detect.py photo.jpg --model model.int8.onnx       # or openvino_model.xml, which OpenVINO then runs

`decode`, `pixels_of` and `boxes_of` are what a program of yours needs before and after the graph; they use numpy and Pillow only.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qskd.datasets.pictures.decoding import PictureError, decode

SOFTMAX = ("detr", "table-transformer")  # one softmax a query, its last slot "no object"
BEST_PAIRS = {
    "conditional_detr": 100,
    "deformable_detr": 100,
    "dab-detr": 100,
    "lw_detr": 100,
    "rf_detr": 100,
}  # the others: as many as queries


def pixels_of(images: np.ndarray, mean: list[float], std: list[float]) -> np.ndarray:
    """RGB uint8 [B, S, S, 3], already of the model's size -> pixel_values [B, 3, S, S] float32.

    mean, std: of values in 0..1, a number a channel; `image_mean` and `image_std` of preprocessor_config.json.
    """
    scaled = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    shift, scale = (np.asarray(values, np.float32).reshape(3, 1, 1) for values in (mean, std))
    return np.ascontiguousarray((scaled - shift) / scale)


def probabilities_of(logits: np.ndarray, model_type: str) -> np.ndarray:
    """Logits [B, Q, K] -> the probability of each class, float32.

    The K + 1 logits of DETR and Table Transformer share a softmax whose last slot is "no object", which is left out; the others
    have sigmoids.
    """
    logits = logits.astype(np.float32)
    if model_type in SOFTMAX:
        raised = np.exp(logits - logits.max(-1, keepdims=True))
        return (raised / raised.sum(-1, keepdims=True))[..., :-1]
    small = np.exp(-np.abs(logits))  # of a number <= 0: no overflow
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small))


def boxes_of(
    logits: np.ndarray, pred_boxes: np.ndarray, sizes: np.ndarray, model_type: str, threshold: float = 0.5
) -> list[dict[str, np.ndarray]]:
    """What the graph returns -> for each image "scores" [D], "labels" [D] and "boxes_xyxy" [D, 4], best first.

    logits: [B, Q, K]. pred_boxes: [B, Q, 4], centre x, centre y, width, height in 0..1 of the image. sizes: [B, 2], height
    and width of each original image in pixels, which the boxes are scaled to. model_type: of config.json; the
    families of one softmax give the best class of each query, the others their best (query, class) pairs, as
    `post_process_object_detection` does.
    """
    probabilities = probabilities_of(logits, model_type)
    centre, half = pred_boxes[..., :2], pred_boxes[..., 2:] / 2
    corners = np.concatenate([centre - half, centre + half], -1)
    found = []
    for scores, boxes, (height, width) in zip(probabilities, corners, np.asarray(sizes), strict=True):
        queries, classes = scores.shape
        places = np.arange(queries * classes)
        if model_type in SOFTMAX:
            places = np.arange(queries) * classes + scores.argmax(-1)
        order = np.argsort(-scores.reshape(-1)[places], kind="stable")[: BEST_PAIRS.get(model_type, queries)]
        best = places[order]
        best = best[scores.reshape(-1)[best] > threshold]
        scale = np.array([width, height, width, height], np.float32)
        entry = {
            "scores": scores.reshape(-1)[best],
            "labels": best % classes,
            "boxes_xyxy": boxes[best // classes] * scale,
        }
        found.append(entry)
    return found


@functools.cache
def openvino_core() -> Any:
    """One for the process, which it outlives: each gives its thread a stack for signals, and of two whose lives overlap the one
    leaves the thread the other's stack, which is gone by then. The next signal, Ctrl-C too, would end the process as a crash."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would call out when it is imported
    import openvino

    return openvino.Core()


def session_of(file: Path) -> tuple[Callable[[np.ndarray], Any], Any]:
    """What runs a graph on the CPU, pixel_values -> logits and pred_boxes; and its batch, a number where that is fixed."""
    if file.suffix == ".xml":
        compiled = openvino_core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        sides = compiled.input("pixel_values").partial_shape
        batch = sides[0].get_length() if sides[0].is_static else None
        return lambda pixels: [compiled({"pixel_values": pixels})[name] for name in ("logits", "pred_boxes")], batch
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(["logits", "pred_boxes"], {"pixel_values": pixels}), session.get_inputs()[
        0
    ].shape[0]


def graph_in(folder: Path, model: str) -> Path:
    """The file of that name in the folder, else at that path. ValueError where there is none."""
    for file in (folder / model, Path(model)):
        if file.is_file():
            return file
    raise ValueError(f"{model}: no such file, neither in {folder} nor here")


def detect(folder: Path, image_file: Path, threshold: float, model: str = "model.onnx") -> list[dict[str, Any]]:
    """The objects in one image file: "label", "score" and "box_xyxy" in pixels of the upright image, best first; "category_id", the
    dataset's, where config.json keeps it. model: the graph's file, its name in the folder or a path.

    PictureError for a file that is no picture, or of a kind that is not read; ValueError for a graph that is not there or can't be
    read.
    """
    seen = decode(image_file.read_bytes())
    if seen.note:
        print(f"{image_file}: {seen.note}", file=sys.stderr)
    picture = seen.rgb
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    graph = graph_in(folder, model)
    try:
        run, batch = session_of(graph)
    except Exception as error:
        raise ValueError(f"{graph}: can't be read as a graph: {str(error).splitlines()[0][:200]}") from error
    size = processor["size"]
    resized = picture.resize((size["width"], size["height"]), Image.Resampling.BILINEAR)
    pixels = pixels_of(np.asarray(resized)[None], processor["image_mean"], processor["image_std"])
    pixels = np.repeat(pixels, batch if isinstance(batch, int) else 1, axis=0)  # a graph of a fixed batch wants it full
    logits, pred_boxes = run(pixels)
    found = boxes_of(
        logits[:1], pred_boxes[:1], np.array([[picture.height, picture.width]]), config["model_type"], threshold
    )[0]
    ids = config.get("dataset_category_ids")
    return [
        {
            "label": config["id2label"].get(str(label), "N/A"),
            **({"category_id": ids[label]} if ids else {}),
            "score": float(score),
            "box_xyxy": box.tolist(),
        }
        for score, label, box in zip(found["scores"], found["labels"], found["boxes_xyxy"], strict=True)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Objects in an image, as JSON lines.")
    parser.add_argument("image", type=Path)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--model", default="model.onnx", help="The graph's file: its name in this folder, or a path.")
    given = parser.parse_args()
    try:
        found_there = detect(Path(__file__).parent, given.image, given.threshold, given.model)
    except (OSError, PictureError) as error:  # a PictureError is a ValueError too
        sys.exit(f"error: {given.image}: {getattr(error, 'strerror', None) or error}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    for entry in found_there:
        print(json.dumps(entry))
