"""A run's own record of its reports, in its folder: what progress lines, reports and restarts read."""

from __future__ import annotations

import json
from typing import Any

from pipelines.run.folder import Folder

NAME = "history.json"
Rows = list[tuple[int, dict[str, float]]]  # (step, means of the loss terms)


def read_history(folder: Folder) -> list[dict[str, Any]]:
    """One entry a report: step, epoch, evaluation (metrics, possibly empty), training (the last means); of a trial also
    "rows", see `add_trial_report`."""
    remedy = f"rm {folder.where(NAME)}: what it has of the curves so far is lost, and the training goes on"
    history: list[dict[str, Any]] = folder.read_record(NAME, list, remedy) if folder.exists(NAME) else []
    return history


def add_report(folder: Folder, step: int, epoch: int, evaluation: dict[str, float], rows: Rows) -> None:
    """Entries of the same step or later ones are replaced: a run that went on from a checkpoint makes them again."""
    before = [entry for entry in read_history(folder) if entry["step"] < step]
    folder.write_record(NAME, json.dumps([*before, _entry(step, epoch, evaluation, rows)]))


def add_trial_report(
    folder: Folder, step: int, epoch: int, evaluation: dict[str, float], rows: Rows, ended: bool = False
) -> list[dict[str, Any]]:
    """The same, and keep the rows of losses until the next evaluation is reported: they travel to a sweep's driver with
    evaluations only, and a crash must not lose them. ended: the training's patience is over. Gives back the history, the new
    entry last."""
    before = [entry for entry in read_history(folder) if entry["step"] < step]
    evaluations = [entry["step"] for entry in before if entry["evaluation"]]
    # The last evaluation may not have been heard of; the one before has been, or the trial would not have gone on.
    heard = evaluations[-2] if len(evaluations) > 1 else 0
    for entry in before:
        if entry["step"] <= heard:
            entry.pop("rows", None)
    history = [*before, _entry(step, epoch, evaluation, rows) | {"rows": rows} | ({"ended": True} if ended else {})]
    folder.write_record(NAME, json.dumps(history))
    return history


def rows_until(history: list[dict[str, Any]], step: int) -> Rows:
    """The rows that travel with the evaluation at `step`: all since the evaluation before it."""
    earlier = max((entry["step"] for entry in history if entry["evaluation"] and entry["step"] < step), default=0)
    entries = [entry for entry in history if earlier < entry["step"] <= step]
    return [(at, row) for entry in entries for at, row in entry.get("rows", ())]


def last_step(history: list[dict[str, Any]]) -> int:
    return max((entry["step"] for entry in history), default=0)


def best_ap(history: list[dict[str, Any]], before_step: int) -> float:
    """The highest AP of the evaluations before a step; -1 where there is none."""
    return max((entry["evaluation"].get("AP", -1.0) for entry in history if entry["step"] < before_step), default=-1.0)


def _entry(step: int, epoch: int, evaluation: dict[str, float], rows: Rows) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": step, "epoch": epoch, "evaluation": evaluation}
    return entry | ({"training": rows[-1][1]} if rows else {})
