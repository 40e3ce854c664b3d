"""The student of a run's best evaluation so far: best/, a plain Hugging Face folder, and the record of which it is.

The record goes before the folder's files change and comes back when all are there: what it names is whole. A program that is
killed in between leaves none, and the run's next start takes the student of its last checkpoint, which is the one that was
being copied, for the best.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pyarrow import fs

from pipelines.run.folder import Folder
from qskd.evaluation.shown import measured
from qskd.storage.models import BEST, CONFIG, STUDENT
from qskd.storage.scratch import scratch_folder
from qskd.storage.stores import patiently

RECORD = "best.json"


@dataclass(frozen=True)
class Best:
    """step: training steps that the student had. metrics: of its evaluation, -1 where nothing could be measured."""

    step: int
    metrics: dict[str, float]

    @property
    def ap(self) -> float | None:
        return measured(self.metrics).get("AP")


def read_best(folder: Folder) -> Best | None:
    """None where no student is kept whole: before the first evaluation, or when someone took its files away."""
    if not folder.exists(RECORD) or not folder.exists(f"{BEST}/{CONFIG}"):
        return None
    remedy = f"rm {folder.where(RECORD)}: the best student so far is then forgotten, and the training goes on"
    found = folder.read_record(RECORD, remedy=remedy)
    return Best(int(found["step"]), dict(found["metrics"]))


def keep_best(folder: Folder, report: Mapping[str, Any], filesystem: fs.FileSystem, checkpoint: str) -> None:
    """Copy a checkpoint's student to best/, if its evaluation is the best so far; as often as one likes with the same report.

    report: "step", and "evaluation" (metrics), which may be missing. checkpoint: its folder on `filesystem`.
    """
    metrics = report.get("evaluation")
    if not metrics or not _is_better(Best(report["step"], metrics), read_best(folder)):
        return
    source = f"{checkpoint}/{STUDENT}"
    with scratch_folder("best") as scratch:
        patiently(source, filesystem, lambda: fs.copy_files(source, str(scratch), source_filesystem=filesystem))
        folder.delete(RECORD)
        folder.upload(scratch, BEST)
    folder.write_record(RECORD, json.dumps(asdict(Best(report["step"], dict(metrics)))))


def _is_better(now: Best, before: Best | None) -> bool:
    """Of equal ones the earlier stays; where nothing could be measured, the latest is kept."""
    if before is None:
        return True
    if before.ap is None:
        return now.ap is not None or now.step >= before.step
    return now.ap is not None and now.ap > before.ap
