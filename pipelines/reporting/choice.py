"""A training's result: the student of its best evaluation or of its last step, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyarrow import fs

from pipelines.inspection.evaluate import evaluate
from pipelines.reporting.board import stage
from pipelines.reporting.details import read_details
from pipelines.run.best import Best, read_best
from pipelines.run.folder import DETAILS, Folder
from qskd.config import Config
from qskd.datasets.manifest import Manifest
from qskd.datasets.splits import class_map_for
from qskd.deploy.chosen import Chosen
from qskd.evaluation.details import Evaluation
from qskd.storage.models import BEST, STUDENT
from qskd.storage.stores import patiently


def choose(
    config: Config, last: Best, best: Best | None, history: Sequence[Mapping[str, Any]], total_steps: int
) -> Chosen:
    """Which student becomes the run's: of equally good ones that of the last checkpoint, and `best_step` is the first's. last: of
    the last checkpoint. best: the one that is kept. history: of all reports, those of before there was a best/ among them."""
    better = best if best is not None and best.ap is not None and (last.ap is None or best.ap > last.ap) else None
    taken = better if better is not None and config.training.result == "best" else last
    seen = [*(Best(entry["step"], entry["evaluation"]) for entry in history), *([best] if best else []), last]
    tops = [(each.ap, -each.step) for each in seen if each.ap is not None]
    top, at = max(tops, default=(None, 0))
    return Chosen(
        which="last" if taken is last else "best",
        step=taken.step,
        last_step=last.step,
        total_steps=total_steps,
        metrics=taken.metrics,
        last_ap=last.ap,
        best_ap=top,
        best_step=-at,
        kept=best is not None and best.ap == top,
        stopped_early=config.training.patience > 0 and last.step < total_steps,
    )


def take_student(
    config: Config, folder: Folder, checkpoint: str | Path, last: Best, history: Any, total_steps: int, to: Path
) -> Chosen:
    """Copy the student that the recipe asks for into the empty folder `to`. checkpoint: the last one's local folder."""
    chosen = choose(config, last, read_best(folder), history, total_steps)
    if chosen.which == "last":
        fs.copy_files(f"{checkpoint}/{STUDENT}", str(to))
        return chosen
    source, store = f"{folder.root}/{BEST}", folder.filesystem
    patiently(folder.where(BEST), store, lambda: fs.copy_files(source, str(to), source_filesystem=store))
    return chosen


def details_of(
    chosen: Chosen, config: Config, folder: Folder, train: Manifest, val: Manifest, last: str
) -> Evaluation | None:
    """All that an evaluation of the run's student says. Training evaluates its planned last step alone in this detail. If the run's
    student is of another step, or patience stopped the run, it is evaluated again, and the run's folder keeps the details. None if
    the folder has none: a run of an older version.

    last: the last step's student, as a folder or URI that all nodes can read, which no scratch folder is.
    """
    if chosen.which == "last" and not chosen.stopped_early:
        return read_details(folder)
    stage("evaluating the student")
    compute = config.compute
    found = evaluate(
        folder.where(BEST) if chosen.which == "best" else last,
        config.data.val,
        config.student.resize,
        class_map_for({}, train, val),
        # As the training evaluated it: its AP is the run's, and its batches fit into the memory there.
        batch_size=max(1, (compute.evaluation_batch_size or config.training.batch_size) // compute.workers),
        workers=compute.workers,
        threads=compute.threads_per_worker or 1,
        device=compute.device,
        precision=compute.evaluation_precision,
    )
    folder.write(DETAILS, found.to_json())
    return found
