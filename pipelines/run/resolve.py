"""From a recipe as written to what a verb runs with: absolute paths, implied fields."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NewType

from pipelines.cluster.environment import in_a_job
from pipelines.run.job_folder import check_job_folder
from pipelines.run.places import check_places
from pipelines.tracking.store import tracking_uri
from qskd.config import Config, MethodSettings
from qskd.config.distillation import NoMethod
from qskd.detectors import read_preprocessing, uri_refused
from qskd.detectors.backbone import sized_by_init
from qskd.distillation.find import located
from qskd.errors import QskdError
from qskd.storage.models import local_model
from qskd.teacher.by_number import why_not_derived

ResolvedConfig = NewType("ResolvedConfig", Config)  # what `resolve` gave: nothing in it is left to be found out


def resolve(config: Config, verb: str) -> ResolvedConfig:
    """What the verb (cache, distill or train) runs with. `train` has no teacher. Paths become absolute, since workers run
    elsewhere; those that a job would lose are told first. A method of the user's becomes the path of its file. Unless the recipe
    says others, a student that starts from a detector sees images of that one's size, a backbone has its checkpoint's sizes, and
    views are not derived from cached ones for a method that can't learn from such."""
    check_job_folder(config, verb)
    if verb != "cache":
        tracking_uri(config)  # refuses one with a password before anything is written

    def absolute(path: str) -> str:
        return path if not path or "://" in path else str(Path(path).expanduser().resolve())

    def model(field: str, path: str) -> str:
        if "://" in path:
            raise uri_refused(path, field)
        path = local_model(os.path.expanduser(path))  # of a run's folder the student's, which is what is recorded
        # A job's working folder is a copy, in the same place for every worker but in another for the next job: a path in
        # it is left relative, or a run could not be continued.
        return absolute(path) if os.path.exists(path) and not (in_a_job() and not os.path.isabs(path)) else path

    places: dict[str, Any] = {"train": absolute(config.data.train), "val": absolute(config.data.val)}
    places["unlabeled"] = tuple(map(absolute, config.data.unlabeled))
    places["selection"] = tuple(map(absolute, config.data.selection))
    update: dict[str, Any] = {"data": config.data.model_copy(update=places)}
    cache = config.teacher.cache.model_copy(update={"path": absolute(config.teacher.cache.path)})
    teacher: dict[str, Any] = {"cache": cache, "path": model("teacher.path", config.teacher.path)}
    teacher["also"] = {
        name: each.model_copy(update={"path": model(f"teacher.also.{name}.path", each.path)})
        for name, each in config.teacher.also.items()
    }
    update["teacher"] = config.teacher.model_copy(update=teacher)
    backbone = config.student.backbone
    start = backbone.model_copy(update={"init": model("student.backbone.init", backbone.init)})
    with suppress(QskdError):  # of a checkpoint that can't be reached, or used: building the student says so
        start = sized_by_init(start)
    student: dict[str, Any] = {"init": model("student.init", config.student.init), "backbone": start}
    if student["init"] and "resize" not in config.student.model_fields_set:
        student["resize"] = read_preprocessing(student["init"]).resize
    update["student"] = config.student.model_copy(update=student)
    update["distillation"] = NoMethod() if verb == "train" else _methods_found(config.distillation)
    views = config.data.views
    if cache.path and views.derived is None and verb != "train" and why_not_derived(update["distillation"]):
        places["views"] = views.model_copy(update={"derived": "none"})
        update["data"] = config.data.model_copy(update=places)
    config = config.model_copy(update=update)
    check_places(config, verb)
    return ResolvedConfig(config)


def _methods_found(settings: MethodSettings) -> MethodSettings:
    """Where the user's methods are: workers know neither --methods nor this process's folder. A job's working folder is a copy
    that they have too."""
    also = {name: _methods_found(part) for name, part in settings.also.items()}
    method = located(settings.method)
    here = Path.cwd().resolve()
    if in_a_job() and method.endswith(".py") and Path(method).is_relative_to(here):
        method = str(Path(method).relative_to(here))
    return settings.model_copy(update={"method": method, "also": also})
