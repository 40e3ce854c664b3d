"""From a configuration to the things it names: teacher, ground truth. Used by drivers and workers alike."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch

from qskd.cache_identity import teacher_preprocessing
from qskd.classes import map_classes
from qskd.config import Config
from qskd.detectors import Detector, build_student, fitting_sizes, inherit, load_detector
from qskd.errors import QskdError
from qskd.evaluation import GroundTruth
from qskd.manifest import load_manifest
from qskd.shards import read_annotations
from qskd.teacher import CachedTeacher, OnlineTeacher, Teacher
from qskd.teacher_cache import TeacherCacheReader

log = logging.getLogger("qskd")


def teacher_for_training(config: Config, labels: Sequence[str]) -> Teacher | None:
    """The teacher the recipe names; as its cache remembers it, where there is one; None for plain training."""
    path = config.teacher.cache.path
    if config.distillation.method == "none" or not path:
        return make_teacher(config, labels)
    return CachedTeacher(TeacherCacheReader(path).manifest.sizes)


def check_teacher(config: Config) -> None:
    """QskdError when no teacher is named."""
    if not config.teacher.path:
        remedy = "--set teacher.path=..., or train without one: `qskd train`"
        raise QskdError("teacher.path", "empty", "a Hub name or folder of a detector", remedy)


def make_teacher(config: Config, labels: Sequence[str]) -> OnlineTeacher | None:
    """The teacher the recipe names, or None for plain training."""
    if config.distillation.method == "none":
        return None
    check_teacher(config)
    detector = load_detector(config.teacher.path)
    slots = map_classes(labels, detector.labels, config.teacher.class_map)
    return OnlineTeacher(detector, slots, teacher_preprocessing(config))


def make_student(config: Config, labels: Sequence[str], teacher: Detector | None = None) -> Detector:
    """The student as it stands before the first step: built or loaded, and what it inherits from the teacher, which is
    loaded for that unless it is given."""
    return start_student(config, labels, teacher)[0]


def start_student(config: Config, labels: Sequence[str], teacher: Detector | None = None) -> tuple[Detector, str]:
    """`make_student`'s, and what it inherits and what not, part by part; empty without `student.inherit`."""
    student = build_student(config.student, labels, config.seed)
    if not config.student.inherit:
        return student, ""
    if not config.teacher.path:
        raise QskdError("student.inherit", "teacher.path is empty", "a teacher", "--set teacher.path=...")
    teacher = teacher or load_detector(config.teacher.path)
    done = inherit(student, teacher, map_classes(labels, teacher.labels, config.teacher.class_map))
    if not done.copied:
        fields = [f"student.{name}: {size}, the teacher's" for name, size in fitting_sizes(student, teacher).items()]
        raise QskdError(
            "student.inherit",
            f"no part of {config.teacher.path} fits:\n{done.describe(3)}",
            "at least one of the same shape",
            f"set {'; '.join([*fields, 'or student.inherit: false' if fields else 'student.inherit: false'])}",
        )
    if done.backbone:
        seen_as = teacher_preprocessing(config)
        student.mean, student.std = seen_as.mean, seen_as.std
    said = f"student.inherit: {len(done.copied)} parts of {config.teacher.path}\n{done.describe()}"
    log.info(said)
    return student, said


def gpus_are_ours() -> bool:
    """Whether this process may use the machine's GPUs: a worker of Ray that holds none may not, though Ray hides none from it."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return True
    return bool(ray.get_gpu_ids())


def device_of(name: str) -> torch.device:
    """Of auto, cpu and cuda: a GPU where there is one that this process may use, unless the CPU is asked for."""
    wanted = name != "cpu" and torch.cuda.is_available() and gpus_are_ours()
    return torch.device("cuda" if wanted else "cpu")


def device_here(config: Config) -> torch.device:
    """For a process that holds one model: a GPU where this machine has one, unless the recipe asks for the CPU. A cluster's
    head may have none though its workers do: what it tries out, it tries on its CPU."""
    return device_of(config.compute.device)


def ground_truth(uri: str) -> GroundTruth:
    """All annotations of a shard folder, without its images."""
    categories = [(category.id, category.name) for category in load_manifest(uri).categories]
    return GroundTruth(**read_annotations(uri), categories=categories)
