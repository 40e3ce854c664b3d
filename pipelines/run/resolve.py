"""From a recipe as written to what a verb runs with: absolute paths, implied fields."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipelines.cluster.environment import in_a_job
from pipelines.run.job_folder import check_job_folder
from pipelines.run.places import check_places
from pipelines.tracking.store import tracking_uri
from qskd.config import Config
from qskd.detectors import read_preprocessing, uri_refused


def prepare_config(config: Config, kind: str) -> Config:
    """Resolve what the verb implies (`kind`: cache, distill or train): `train` has no teacher; paths become absolute, since
    workers run elsewhere, those that a job would lose are told first. A student that starts from a detector sees images of
    that one's size, unless the recipe says another."""
    check_job_folder(config, kind)
    if kind != "cache":
        tracking_uri(config)  # refuses one with a password before anything is written

    def absolute(path: str) -> str:
        return path if not path or "://" in path else str(Path(path).expanduser().resolve())

    def model(field: str, path: str) -> str:
        if "://" in path:
            raise uri_refused(path, field)
        path = os.path.expanduser(path)
        # A job's working folder is a copy, in the same place for every worker but in another for the next job: a path in
        # it is left relative, or a run could not be continued.
        return absolute(path) if os.path.isdir(path) and not (in_a_job() and not os.path.isabs(path)) else path

    data = config.data.model_copy(update={"train": absolute(config.data.train), "val": absolute(config.data.val)})
    update: dict[str, Any] = {"data": data}
    cache = config.teacher.cache.model_copy(update={"path": absolute(config.teacher.cache.path)})
    teacher = {"cache": cache, "path": model("teacher.path", config.teacher.path)}
    update["teacher"] = config.teacher.model_copy(update=teacher)
    backbone = config.student.backbone
    start = backbone.model_copy(update={"init": model("student.backbone.init", backbone.init)})
    student: dict[str, Any] = {"init": model("student.init", config.student.init), "backbone": start}
    if student["init"] and "resize" not in config.student.model_fields_set:
        student["resize"] = read_preprocessing(student["init"]).resize
    update["student"] = config.student.model_copy(update=student)
    if kind == "train":
        update["distillation"] = config.distillation.model_copy(update={"method": "none"})
    config = config.model_copy(update=update)
    check_places(config, kind)
    return config
