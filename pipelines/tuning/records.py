"""What a sweep knows, on disk: one small JSON file a trial, written whole, so that a driver killed at any moment loses
nothing. OUTPUT/NAME/trials/0007/trial.json is a TrialRow; the trial's checkpoints and student lie beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePath
from typing import Any

from pyarrow import fs

from pipelines.run.folder import SWEEP, TRIAL, Folder
from pipelines.run.guards import check_no_trial
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.errors import QskdError

REFUSED = "refused.json"
ENDED = ("finished", "stopped", "failed")
# What may differ between a sweep and its continuation: how much of it, not of what. (A population keeps its size.)
FREE_TO_CHANGE = ("trials",)


@dataclass(frozen=True)
class Refusal:
    """A proposal that was never trained. before: the number of the trial it was proposed for. excess: by what part of
    the limit it is above it, over 0."""

    before: int
    parameters: dict[str, Any]
    excess: float
    reason: str


def row_from(tree: Mapping[str, Any]) -> TrialRow:
    known = {field.name for field in fields(TrialRow)}
    tree = {name: value for name, value in tree.items() if name in known}
    return TrialRow(**{**tree, "curve": tuple((float(epochs), float(ap)) for epochs, ap in tree.get("curve", ()))})


def _same(name: str, before: Any, now: Any) -> bool:
    """Whether a sweep was asked for the same. A space's file may have moved: each job of a cluster has a copy of its own."""
    if name == "spaces" and isinstance(before, list):
        return [PurePath(each).name for each in before] == [PurePath(each).name for each in now]
    return bool(before == now)


def trial_config(sweep: Config, number: int) -> Config:
    """The sweep's recipe as the one of this trial, whose folder it then names."""
    return sweep.model_copy(update={"output": Folder(sweep).where("trials"), "name": f"{number:04d}"})


def check_no_training(folder: Folder) -> None:
    """QskdError where a training is, or a trial of another sweep."""
    check_no_trial(folder)
    if not folder.exists(SWEEP) and (folder.exists("train") or folder.exists("result.json")):
        raise QskdError(folder.path, "holds a training", "a sweep, or nothing", "choose another name: --set name=...")


class Records:
    """The rows and refusals of one sweep, read once and kept in step with the disk. Only the driver writes them.

    held: the numbers of rows that the disk does not have as they are here.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, Folder(config)
        self.held: set[int] = set()
        self.rows: dict[int, TrialRow] = {row.number: row for row in self._read_rows()}
        listed = self.folder.read_record(REFUSED, list) if self.folder.exists(REFUSED) else []
        self.refused = [Refusal(**each) for each in listed]

    def _read_rows(self) -> Iterator[TrialRow]:
        if not self.folder.exists("trials"):
            return
        found = self.folder.filesystem.get_file_info(fs.FileSelector(f"{self.folder.root}/trials"))
        for info in sorted(found, key=lambda each: str(each.base_name)):
            if not info.base_name.isdigit():  # someone else's: a run that was given this folder as its output
                continue
            trial = self.trial_folder(int(info.base_name))
            if trial.exists(TRIAL):  # not there when the driver was killed between the folder and its first file
                yield row_from(trial.read_record(TRIAL))

    def trial_folder(self, number: int) -> Folder:
        return Folder(trial_config(self.config, number))

    def put(self, row: TrialRow) -> TrialRow:
        """Keep a row, on disk before anything else learns of it."""
        self.trial_folder(row.number).write_record(TRIAL, json.dumps(asdict(row), indent=1))
        self.rows[row.number] = row
        self.held.discard(row.number)
        return row

    def hold(self, row: TrialRow) -> TrialRow:
        """Keep a row here alone, until it is `put`. On disk the trial is still at work: another driver would go on with it."""
        self.rows[row.number] = row
        self.held.add(row.number)
        return row

    def change(self, number: int, **changes: Any) -> TrialRow:
        return self.put(replace(self.rows[number], **changes))

    def refuse(self, refusal: Refusal) -> None:
        self.refused.append(refusal)
        self.folder.write_record(REFUSED, json.dumps([asdict(each) for each in self.refused], indent=1))

    def next_number(self) -> int:
        """Of a new trial: after all others. That of one whose folder somebody deleted is not used again: MLflow still has it."""
        return max(self.rows, default=-1) + 1

    def in_order(self) -> list[TrialRow]:
        return [self.rows[number] for number in sorted(self.rows)]

    def settle(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Write down what the sweep was asked for, or compare with what it was. Returns what else was written down then.
        QskdError where the two differ, or where the folder holds a training."""
        folder = self.folder
        if not folder.exists(SWEEP):
            check_no_training(folder)
            folder.write_record(SWEEP, json.dumps({"asked": dict(asked)}, indent=1))
            return {}
        written = folder.read_record(SWEEP)
        before = written["asked"]
        changed = [
            f"{name} was {before.get(name)!r}, is {value!r}"
            for name, value in json.loads(json.dumps(dict(asked))).items()
            if not _same(name, before.get(name), value)
            and (name not in FREE_TO_CHANGE or asked.get("algorithm") == "pbt")
        ]
        if changed:
            raise QskdError(
                folder.path,
                f"holds a sweep that was asked for otherwise: {'; '.join(changed)}",
                "the same, to go on with it (--trials may grow)",
                "choose another name (--set name=...), or add --restart, which deletes that sweep: its records, trials and report",
            )
        return {name: value for name, value in written.items() if name != "asked"}

    def note(self, **facts: Any) -> None:
        """Add to what the sweep has written down about itself."""
        written = self.folder.read_record(SWEEP)
        self.folder.write_record(SWEEP, json.dumps({**written, **facts}, indent=1))
