"""From a configuration to the things it names: teacher, ground truth. Used by drivers and workers alike."""

from __future__ import annotations

from collections.abc import Sequence

from qskd.classes import map_classes
from qskd.config import Config
from qskd.detectors import Preprocessing, load_detector, read_preprocessing
from qskd.errors import QskdError
from qskd.evaluation import GroundTruth
from qskd.manifest import load_manifest
from qskd.shards import read_annotations
from qskd.teacher import OnlineTeacher


def teacher_preprocessing(config: Config) -> Preprocessing:
    """How the teacher wants its pixels: as its checkpoint says, unless the recipe says otherwise."""
    own = read_preprocessing(config.teacher.path)
    return own if config.teacher.resize is None else Preprocessing(config.teacher.resize, own.mean, own.std)


def make_teacher(config: Config, labels: Sequence[str]) -> OnlineTeacher | None:
    """The teacher the recipe names, or None for plain training."""
    if config.distillation.method == "none":
        return None
    if not config.teacher.path:
        raise QskdError(
            "teacher.path", "empty", "a Hub name or folder of a detector", "--set teacher.path=..., or use `qskd train`"
        )
    detector = load_detector(config.teacher.path)
    slots = map_classes(labels, detector.labels, config.teacher.class_map)
    return OnlineTeacher(detector, slots, teacher_preprocessing(config))


def ground_truth(uri: str) -> GroundTruth:
    """All annotations of a shard folder, without its images."""
    categories = [(category.id, category.name) for category in load_manifest(uri).categories]
    return GroundTruth(**read_annotations(uri), categories=categories)
