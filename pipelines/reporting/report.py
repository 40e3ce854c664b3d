"""What a finished run leaves in MLflow besides numbers: the student's folder, pictures of a few validation images (what
`qskd explain` shows), and the curves of AP and loss."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.cluster.devices import device_here
from pipelines.inspection.explain import AFTER, about, as_dataset_detector, initial_student
from pipelines.inspection.subjects import subject_of_sample
from pipelines.reporting.board import stage
from pipelines.tracking.model import log_student
from pipelines.tracking.tracker import Tracker
from qskd.config import Config
from qskd.datasets.manifest import Manifest
from qskd.datasets.samples import Sample
from qskd.datasets.shards import ShardReader
from qskd.datasets.splits import labels_of_categories
from qskd.datasets.unlabeled.joined import training_manifest
from qskd.datasets.views import View
from qskd.detectors import load_detector, read_preprocessing
from qskd.evaluation.detections import Detections
from qskd.evaluation.shown import is_measured
from qskd.from_recipe import teacher_to_ask
from qskd.pictures.explain import Explanation, explain
from qskd.pictures.explained import explanation_picture
from qskd.pictures.plots import curve_plot, draw_boxes, picture_grid
from qskd.storage.scratch import scratch_folder

log = logging.getLogger("qskd")
SAMPLES = 4
PATIENCE_S = 15.0  # after this no further picture is begun: a large teacher on a driver without a GPU is slow
_AUXILIARY = re.compile(r"_\d+$|^dense_")  # terms left out of the plot; all are in MLflow's own


def explanations(config: Config, val: Manifest, student_folder: Path) -> tuple[dict[int, Explanation], str]:
    """The first validation images that have objects, by id, and the line on whose pictures they are. Loads the teacher,
    which a training from the cache has not done."""
    train = training_manifest(config.data)
    started, labels, device = time.perf_counter(), train.labels, device_here(config)
    teacher = teacher_to_ask(config, labels)
    if teacher is not None:
        teacher.to(device)
    student = load_detector(student_folder), read_preprocessing(student_folder)
    detectors = initial_student(config, labels, device, teacher)
    detectors[AFTER] = as_dataset_detector(*student, labels, device, str(student_folder))
    reader, shown, index = ShardReader(config.data.val), dict[int, Explanation](), labels_of_categories(train, val)
    for sample in first_with_objects(reader):
        if shown and time.perf_counter() - started > PATIENCE_S:
            log.warning(
                "%s: pictures of %d images instead of %d: they take long here", config.name, len(shown), SAMPLES
            )
            break
        name = f"{sample.file_name} (image {sample.image_id} of data.val)"
        subject = subject_of_sample(sample, name, index, View.IDENTITY)
        shown[sample.image_id] = explain(subject, config, labels, teacher, detectors)
    return shown, about(config, teacher)


def first_with_objects(reader: ShardReader) -> list[Sample]:
    """Backgrounds may come first, thousands of them: no picture is read to find that out."""
    found: list[Sample] = []
    for shard, stored in enumerate(reader.manifest.shards):
        listed = reader.read(shard, range(stored.rows), ["category_ids"])
        rows = [row for row, sample in enumerate(listed) if len(sample.category_ids)]
        found += reader.read(shard, rows[: SAMPLES - len(found)])
        if len(found) == SAMPLES:
            break
    return found


def samples_grid(shown: list[Explanation]) -> np.ndarray:
    """A row an image: ground truth, teacher (if any), student."""

    def drawn(one: Explanation, found: Detections, scores: bool = True) -> np.ndarray:
        return draw_boxes(one.image, found.boxes_xyxy, found.category_ids, found.scores if scores else None, one.labels)

    rows = [
        [
            drawn(one, one.objects, scores=False),
            *([drawn(one, one.teacher)] if one.teacher is not None else []),
            drawn(one, one.students[AFTER]),
        ]
        for one in shown
    ]
    return picture_grid(rows, ["ground truth", *(["teacher"] if shown[0].teacher is not None else []), "student"])


def log_pictures(config: Config, val: Manifest, student_folder: Path, tracker: Tracker, scratch: Path) -> None:
    """pictures/samples.png, and pictures/explained/IMAGE_ID.png for each sample."""
    shown, whose = explanations(config, val, student_folder)
    if not shown:
        return
    Image.fromarray(samples_grid(list(shown.values()))).save(scratch / "samples.png")
    tracker.picture("pictures/samples.png", scratch / "samples.png")
    folder = scratch / "explained"
    folder.mkdir()
    for image_id, one in shown.items():
        Image.fromarray(explanation_picture(one, whose)).save(folder / f"{image_id}.png")
    tracker.folder(folder, "pictures/explained")


def log_curves(history: list[dict[str, Any]], tracker: Tracker, scratch: Path) -> None:
    """pictures/ap.png and pictures/loss.png: each term over its first value, for they differ in size by the hundred."""
    evaluated = [entry for entry in history if entry["evaluation"]]
    steps = [entry["step"] for entry in evaluated]
    series = {}
    for metric in ("AP", "AP50", "AP75"):
        scores = [entry["evaluation"][metric] for entry in evaluated]
        if any(map(is_measured, scores)):
            series[metric] = (steps, [score if is_measured(score) else np.nan for score in scores])
    if series:
        curve_plot(series, "training step", "average precision", scratch / "ap.png")
        tracker.picture("pictures/ap.png", scratch / "ap.png")
    names = [name for entry in history for name in entry.get("training", {}) if name.startswith("loss/")]
    plain = [name for name in dict.fromkeys(names) if not _AUXILIARY.search(name.removeprefix("loss/"))]
    losses = {}
    for name in sorted(plain, key=lambda name: name != "loss/total"):
        points = tracker.series(name) or [
            (e["step"], e["training"][name]) for e in history if name in e.get("training", {})
        ]
        first = next((value for _, value in points if np.isfinite(value) and value > 0), 1.0)
        title = f"{name.removeprefix('loss/')} (from {first:.3g})"
        losses[title] = ([step for step, _ in points], [value / first for _, value in points])
    if losses:
        curve_plot(losses, "training step", "loss term, over its first value", scratch / "loss.png")
        tracker.picture("pictures/loss.png", scratch / "loss.png")


def write_report(
    config: Config, val: Manifest, history: list[dict[str, Any]], student_folder: Path, tracker: Tracker
) -> None:
    """Log the student's folder, curves and pictures. What fails of the last two is said in a warning: the training is
    done, and its result matters more."""
    stage("telling MLflow")
    log_student(tracker, student_folder)
    stage("drawing curves and pictures")
    with scratch_folder("report") as folder:
        parts: dict[str, Callable[[], None]] = {
            "curves": lambda: log_curves(history, tracker, folder),
            "pictures": lambda: log_pictures(config, val, student_folder, tracker, folder),
        }
        for what, part in parts.items():
            try:
                part()
            except Exception as error:
                log.warning("%s: no %s in MLflow: %s: %s", config.name, what, type(error).__name__, error)
