"""What a finished run leaves in MLflow besides numbers: the student's folder, sample pictures, the loss and AP curves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.models import teacher_preprocessing
from pipelines.tracking import Tracker
from qskd.classes import map_classes
from qskd.config import Config
from qskd.detectors import load_detector, read_preprocessing
from qskd.inference import predict_image
from qskd.manifest import Manifest
from qskd.plots import curve_plot, draw_boxes, picture_grid
from qskd.shards import ShardReader
from qskd.views import decode_image

SAMPLES = 4
THRESHOLD = 0.3


def sample_pictures(config: Config, val: Manifest, student_folder: Path) -> np.ndarray:
    """A grid: the first validation images that have objects, with ground truth, teacher (if any) and student."""
    reader = ShardReader(config.data.val)
    samples = [s for s in reader.read(0, range(min(32, val.shards[0].rows))) if len(s.category_ids)][:SAMPLES]
    models: dict[str, Any] = {}
    if config.distillation.method != "none":
        models["teacher"] = (
            load_detector(config.teacher.path),
            teacher_preprocessing(config),
            config.teacher.class_map,
        )
    models["student"] = (load_detector(student_folder), read_preprocessing(student_folder), {})
    rows = []
    for sample in samples:
        image = np.asarray(decode_image(sample.encoded, reader.where(0)))
        truth = [val.category_index[int(category)] for category in sample.category_ids]
        row = [draw_boxes(image, sample.boxes_xyxy, truth, names=val.labels)]
        for detector, preprocessing, class_map in models.values():
            slots = map_classes(val.labels, detector.labels, class_map)
            found = predict_image(detector, image, preprocessing, slots, THRESHOLD)
            row.append(draw_boxes(image, found.boxes_xyxy, found.category_ids, found.scores, val.labels))
        rows.append(row)
    return picture_grid(rows, ["ground truth", *models])


def write_report(
    config: Config, val: Manifest, history: list[dict[str, Any]], student_folder: Path, tracker: Tracker
) -> None:
    """Log pictures, curves and the student's folder."""
    with tempfile.TemporaryDirectory(prefix="qskd-report-") as scratch:
        pictures = Path(scratch) / "samples.png"
        Image.fromarray(sample_pictures(config, val, student_folder)).save(pictures)
        tracker.picture("pictures/samples.png", pictures)
        evaluated = [entry for entry in history if entry["evaluation"]]
        steps = [entry["step"] for entry in evaluated]
        series = {name: (steps, [entry["evaluation"][name] for entry in evaluated]) for name in ("AP", "AP50", "AP75")}
        curve_plot(series, "training step", "average precision", Path(scratch) / "ap.png")
        tracker.picture("pictures/ap.png", Path(scratch) / "ap.png")
    tracker.folder(student_folder, "student")
