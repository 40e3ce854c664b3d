"""What a trial says to its sweep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.run.folder import Folder
from pipelines.run.history import Rows, add_trial_report, best_ap, last_step, read_history
from pipelines.training.checkpoint_list import last_report
from pipelines.training.plan import Plan
from pipelines.tuning.trial.checkpoints import _checkpoint

Send = Callable[[dict[str, Any]], None]


def epochs_of(entry: dict[str, Any], plan: Plan) -> float:
    """Epochs trained at an entry of the history; the last may end within one."""
    return float(entry["step"] / plan.stream.schedule.steps_per_epoch)


def evaluated(entry: dict[str, Any], plan: Plan, rows: Rows, seconds: float) -> dict[str, Any]:
    """The report of an evaluation. rows: the loss terms since the one before."""
    return {
        "epochs": epochs_of(entry, plan),
        "step": entry["step"],
        "last": entry["step"] >= plan.stream.schedule.total_steps or entry.get("ended", False),
        "metrics": entry["evaluation"],
        "rows": rows,
        "seconds": seconds,
    }


# --- several workers -----------------------------------------------------------------------------------------------------
def note_report(folder: Folder, report: dict[str, Any], rows: Rows, checkpoint: Any) -> list[dict[str, Any]]:
    """A report into the trial's folder, after its student if that is the best so far. The history, the new entry last."""
    step, evaluation = report["step"], report.get("evaluation", {})
    if evaluation and evaluation["AP"] > best_ap(read_history(folder), step):
        with checkpoint.as_directory() as local:
            folder.upload(Path(local) / "student", "student")
    return add_trial_report(folder, step, report["epoch"] + 1, evaluation, rows, report.get("ended", False))


def catch_up(folder: Folder) -> None:
    """Note a report that Ray took and the trial did not: the controller died in between. Its losses are left out: Ray keeps
    rank 0's, not those of all workers."""
    last = last_report(folder)
    if last is not None and last[0]["step"] > last_step(read_history(folder)):
        note_report(folder, last[0], [], _checkpoint(folder, last[1]))
