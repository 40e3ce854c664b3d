"""What the last evaluation of a training says besides AP: in the run's folder, in MLflow, and as pictures in the student's card."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image

from pipelines.inspection.kept import keep
from pipelines.run.folder import DETAILS, Folder
from pipelines.tracking.curves import tell
from pipelines.tracking.tracker import Tracker, metric_names
from qskd.deploy.card_evaluation import picture_name
from qskd.errors import QskdError
from qskd.evaluation.details import Evaluation
from qskd.pictures.evaluated import pictures_of
from qskd.storage.scratch import scratch_folder

log = logging.getLogger("qskd")
MOST_CLASSES = (
    100  # whose AP is a metric of MLflow's each; its pages grow slow with more. All are in evaluation/per_class.csv
)


def read_details(folder: Folder) -> Evaluation | None:
    """As the worker left it; None for a run of before there was such a file, or, with a warning, where it is damaged."""
    if not folder.exists(DETAILS):
        return None
    try:
        return Evaluation.from_json(folder.read(DETAILS), folder.where(DETAILS))
    except (QskdError, UnicodeDecodeError) as error:
        log.warning("the card and MLflow go without classes, curves and confusions: %s", error)
        return None


def write_details(evaluation: Evaluation, folder: Folder, tracker: Tracker, student: Path, step: int) -> None:
    """Table and pictures into the run's evaluation/ and MLflow's, pictures into the student's folder, whose card shows them, and
    the numbers that can be compared between runs into MLflow. What fails is said in a warning: the training is done."""
    try:
        with scratch_folder("evaluation") as scratch:
            keep(evaluation, scratch)
            folder.upload(scratch, "evaluation")
            tracker.folder(scratch, "evaluation")
        for name, picture in pictures_of(evaluation).items():
            Image.fromarray(picture).save(student / picture_name(name))
        tell(tracker, folder, "evaluation", [(step, numbers(evaluation))])
    except Exception as error:
        log.warning("not all of the evaluation was kept: %s: %s", type(error).__name__, error)


def numbers(evaluation: Evaluation) -> dict[str, float]:
    """Of the final student, for MLflow."""
    found: dict[str, float] = {}
    if evaluation.best is not None:
        best = evaluation.best
        found |= {"final/best_F1": best.f1, "final/best_threshold": best.score}
        found |= {"final/precision": best.precision, "final/recall": best.recall}
    if evaluation.plain is not None and evaluation.plain.metrics["AP"] >= 0:
        found["final/AP_transformers_post_processing"] = evaluation.plain.metrics["AP"]
    if len(evaluation.classes) <= MOST_CLASSES:
        of_class = {one.name: one.ap for one in evaluation.classes if one.ap is not None}
        found |= {f"final/AP_of/{name}": ap for name, ap in metric_names(of_class).items()}
    return found
