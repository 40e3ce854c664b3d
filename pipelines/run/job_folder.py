"""A job's working folder is a copy, which Ray deletes when the job ends: what a recipe would leave or look for there."""

from __future__ import annotations

import logging
import os

from pipelines.cluster.environment import in_a_job
from pipelines.tracking.store import relative_store
from qskd.config import Config
from qskd.errors import QskdError

log = logging.getLogger("qskd")
ELSEWHERE = "a URI, or an absolute path on storage that all nodes share"


def check_job_folder(config: Config, verb: str) -> None:
    """In a job: QskdError where the results of `verb` (cache, distill, train) would be lost with the working folder, and a
    warning for every other path in it. Elsewhere nothing: a working folder is then the user's own."""
    if not in_a_job():
        return
    paths = {"output": config.output, "teacher.cache.path": config.teacher.cache.path}
    paths |= {"data.train": config.data.train, "data.val": config.data.val}
    unlabeled = {f"data.unlabeled[{number}]": path for number, path in enumerate(config.data.unlabeled)}
    unlabeled |= {f"data.selection[{number}]": path for number, path in enumerate(config.data.selection)}
    paths |= unlabeled
    result = "teacher.cache.path" if verb == "cache" else "output"
    if _is_in_folder(paths[result]):
        raise QskdError(
            result,
            f"{paths[result]!r}, a relative path: in this job's working folder, a copy that Ray deletes when the job ends",
            ELSEWHERE,
            f"--set {result}=s3://bucket/{'cache' if verb == 'cache' else 'runs'}, best in the recipe (docs/cluster.md, Jobs)",
        )
    read = {"cache": ("data.train",), "train": ("data.train", "data.val")}
    for field in (*read.get(verb, ("data.train", "data.val", "teacher.cache.path")), *unlabeled):
        if _is_in_folder(paths[field]):
            log.warning(
                "%s: %r is in this job's working folder, a copy that Ray deletes when the job ends; the next job's is "
                "elsewhere, and will not go on with what this one began. Better: %s",
                field,
                paths[field],
                ELSEWHERE,
            )
    if verb != "cache" and (store := relative_store(config)):
        log.warning(
            "tracking.uri: MLflow's runs would be in %s, in this job's working folder, a copy that Ray deletes when the job "
            "ends. Better: --set tracking.uri=http://HOST:5000, or MLFLOW_TRACKING_URI in runtime_env.yaml",
            store,
        )


def _is_in_folder(path: str) -> bool:
    return bool(path) and "://" not in path and not os.path.isabs(os.path.expanduser(path))
