"""What can't be learnt of a teacher that says boxes and classes alone, found before anything starts."""

from __future__ import annotations

from qskd.config import BOXES_ALONE, Config
from qskd.detectors import read_config
from qskd.distillation.method import PREDICTIONS_ALONE, teacher_needs, unsaid
from qskd.errors import QskdError
from qskd.teacher.manifest import CacheManifest
from qskd.teacher.several.members import of_field
from qskd.teacher.told.results import is_results


def check_told(config: Config, cache: CacheManifest | None = None) -> None:
    """QskdError where the recipe asks a teacher for what it does not say. cache: where it is there, the teacher's checkpoint need
    not be. Reads no weights."""
    path = config.teacher.path
    if is_results(path):
        _check_results(config)
    elif cache is not None:
        if cache.sizes.channels:
            return
    else:
        with of_field("teacher.path", path):
            kind = read_config(path).model_type
        if kind not in BOXES_ALONE:
            return
    if asked := unsaid(teacher_needs(config.distillation)):
        raise QskdError(
            "teacher.path",
            f"{path}, which says boxes and classes alone, and distillation.method={config.distillation.method}, which reads "
            f"its {' and '.join(asked)}",
            "a method that reads predictions alone, or a teacher that is a DETR",
            PREDICTIONS_ALONE,
        )
    if config.teacher.levels is not None:
        raise QskdError(
            "teacher.levels", f"{list(config.teacher.levels)}, of {path}, which has no maps", "null", "take it out"
        )
    kept = config.teacher.cache
    for name, found, all_of_it in (("memory_share", kept.memory_share, 1.0), ("cells", kept.cells, "all")):
        if found != all_of_it:
            field = f"teacher.cache.{name}"
            raise QskdError(field, f"{found}, of {path}, which has no memory", str(all_of_it), "take it out")
    if columns := kept.columns:
        raise QskdError("teacher.cache.columns", ", ".join(columns), f"none, of {path}", "take them out")


def not_to_be_asked(path: str) -> QskdError:
    """Of a file of detections, in a training without a cache of it."""
    return QskdError(
        "teacher.path",
        f"{path}, a file of detections, which can't be asked in a training step",
        "a cache of it",
        "set teacher.cache.path, run `qskd cache RECIPE`, and use a method that reads what a cache holds",
    )


def _check_results(config: Config) -> None:
    path, needs = config.teacher.path, teacher_needs(config.distillation)
    said = f"{path}, a file of detections"
    if needs is not None and needs.online:
        raise not_to_be_asked(path)
    if config.data.unlabeled:
        raise QskdError(
            "data.unlabeled",
            f"images that {path} knows nothing of: its image ids are those of data.train",
            "none, with a file of detections as the teacher",
            "take them out; or make shards of the labels that the file has (`qskd prepare`)",
        )
    if config.student.inherit:
        raise QskdError("student.inherit", f"true, and {said}", "a teacher with layers", "--set student.inherit=false")
