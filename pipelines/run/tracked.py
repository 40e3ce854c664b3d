"""The MLflow run of a run's folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from pipelines.run.folder import Folder
from pipelines.tracking.tracker import Tracker
from qskd.config import Config
from qskd.errors import QskdError

log = logging.getLogger("qskd")
RUN = "mlflow.json"  # in a run's folder: which MLflow run is its


def open_for(folder: Folder, config: Config, verb: str, tags: Mapping[str, str] | None = None) -> Tracker:
    """The MLflow run that a run's folder names, or a new one, which the folder then names. One that can't be written down
    there (the disk is full) is deleted: the next try would not know of it."""
    try:
        run_id = str(folder.read_record(RUN)["run_id"]) if folder.exists(RUN) else ""
    except (QskdError, KeyError) as error:
        run_id = ""
        log.warning(
            "%s\n  A NEW MLFLOW RUN IS BEGUN, for the one that this file named is not known. Its curves stay where they are.",
            error if isinstance(error, QskdError) else f"{folder.where(RUN)}: no run_id in it",
        )
    tracker = Tracker.open(config, verb, run_id, tags=tags)
    try:
        folder.write_record(RUN, json.dumps({"uri": tracker.uri, "run_id": tracker.run_id}))
    except BaseException:
        if tracker.run_id != run_id:
            tracker.delete()
        raise
    return tracker
