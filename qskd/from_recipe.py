"""From a configuration to the things it names: teacher, ground truth. Used by drivers and workers alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qskd.checks import check_directions, check_teacher, directions_asked
from qskd.config import Config
from qskd.datasets.loader import BatchLoader
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shards import ShardReader, read_annotations
from qskd.datasets.unlabeled.joined import source_manifest
from qskd.detectors import Detector, build_student, fitting_sizes, inherit, load_detector
from qskd.distillation.method import teacher_needs
from qskd.errors import QskdError
from qskd.evaluation.detections import GroundTruth
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.cached import CachedTeacher, Teacher
from qskd.teacher.decoder import load_decoder
from qskd.teacher.identity import cache_sources, teacher_preprocessing, teachers_preprocessing
from qskd.teacher.making import CacheMaker
from qskd.teacher.manifest import CacheManifest
from qskd.teacher.memory.basis import cached_basis, sampled
from qskd.teacher.memory.directions import compute_directions, compute_sensitivities, load_directions
from qskd.teacher.memory.moments import Directions
from qskd.teacher.online import OnlineTeacher
from qskd.teacher.several.checks import check_several_teachers
from qskd.teacher.several.members import members_of
from qskd.teacher.several.together import TeachersTogether
from qskd.teacher.told.checks import not_to_be_asked
from qskd.teacher.told.results import is_results, read_results
from qskd.teacher.told.teacher import ToldTeacher

if TYPE_CHECKING:
    import torch

log = logging.getLogger("qskd")


def teacher_for_training(config: Config, labels: Sequence[str], device: torch.device | None) -> Teacher | None:
    """The teacher the recipe names; as its cache remembers it, where there is one; None for plain training.

    device: on which one that runs in every step is asked about some images, where the method wants to know how its memory varies;
    None: it isn't."""
    if config.distillation.method == "none" or not config.teacher.cache.path:
        if config.distillation.method != "none" and is_results(config.teacher.path):
            raise not_to_be_asked(config.teacher.path)
        teacher = make_teacher(config, labels)
        if teacher is not None and device is not None and directions_asked(config) == "variance":
            teacher.directions = _directions_seen(config, teacher, device)
        return teacher
    first = cache_sources(config)[0]  # all are of the same teacher and sizes
    path = first.teacher.cache.path
    reader, needs = TeacherCacheReader(path), teacher_needs(config.distillation)
    manifest = reader.manifest
    kind = needs.directions if needs is not None else ""
    check_directions(first, manifest)
    directions = load_directions(path, manifest, kind) if kind else None
    decoder = load_decoder(config, labels, manifest) if needs is not None and needs.decoder else None
    return CachedTeacher(
        *(manifest.sizes, directions or (), decoder, config.data.views.min_visible, reader.attended),
        bases=cached_basis(path, manifest),
    )


def _directions_seen(config: Config, teacher: OnlineTeacher, device: torch.device) -> tuple[Directions, ...]:
    """Of the first views of images that lie evenly over the first folder, as a cache would have them: the same on every worker, and
    after a resume."""
    if not teacher.facts.channels:
        return ()
    uri = config.data.train or config.data.unlabeled[0]
    loader = BatchLoader(uri, "", config.data.views, teacher_preprocessing(config).resize)
    rows = sampled(ShardReader(uri), config.teacher.cache.batch_size)
    return CacheMaker(config, teacher, device).directions_of(loader.load("train", each) for each in rows)


def find_directions(config: Config, manifest: CacheManifest) -> tuple[Directions, ...]:
    """The directions that the recipe's method asks for, computed from its cache."""
    path = config.teacher.cache.path
    if directions_asked(config) == "decoder":
        labels = source_manifest(config.data).labels
        return compute_sensitivities(path, load_decoder(config, labels, manifest))
    return compute_directions(path)


def make_teacher(config: Config, labels: Sequence[str]) -> OnlineTeacher | None:
    """The teacher the recipe names, several as one; or None for plain training."""
    if config.distillation.method == "none":
        return None
    check_teacher(config)
    check_several_teachers(config)
    members = members_of(config, labels)
    if is_results(path := config.teacher.path):
        categories = load_manifest(config.data.train).categories
        return ToldTeacher(read_results(path), categories, members[0].slots, config.data.views)
    teachers = [
        OnlineTeacher(load_detector(each.path, words=each.words), each.slots, seen_as, each.levels)
        for each, seen_as in zip(members, teachers_preprocessing(config), strict=True)
    ]
    return TeachersTogether(teachers) if len(teachers) > 1 else teachers[0]


def teacher_to_ask(config: Config, labels: Sequence[str]) -> OnlineTeacher | None:
    """`make_teacher`'s, if it can be shown a picture; None of a file of detections."""
    return None if is_results(config.teacher.path) else make_teacher(config, labels)


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
    first = members_of(config, labels)[0]
    teacher = teacher or load_detector(first.path, words=first.words)
    done = inherit(student, teacher, first.slots)
    if not done.copied:
        fields = [f"student.{name}: {size}, the teacher's" for name, size in fitting_sizes(student, teacher).items()]
        raise QskdError(
            "student.inherit",
            f"no part of {config.teacher.path} fits:\n{done.describe(3)}",
            "at least one of the same shape",
            f"set {'; '.join([*fields, 'or student.inherit: false' if fields else 'student.inherit: false'])}",
        )
    if not (done.backbone or config.student.backbone.init or config.student.init or config.detection.dense_weight):
        log.warning(
            "student.inherit: the backbone of %s does not fit, and the student's starts from random weights, which a "
            "detection loss alone hardly trains: set student.backbone.init, student.backbone.type as the teacher's, or "
            "detection.dense_weight=1",
            config.teacher.path,
        )
    if done.backbone:
        seen_as = teacher_preprocessing(config)
        student.mean, student.std = seen_as.mean, seen_as.std
    said = f"student.inherit: {len(done.copied)} parts of {config.teacher.path}\n{done.describe()}"
    log.info(said)
    return student, said


def ground_truth(uri: str) -> GroundTruth:
    """All annotations of a shard folder, without its images."""
    categories = [(category.id, category.name) for category in load_manifest(uri).categories]
    return GroundTruth(**read_annotations(uri), categories=categories)
