"""All that a run tells MLflow as curves, kept in its own folder first: rows/NAME.json, one small file a report. MLflow is compared
with it at the end and at each resume, and gets what it missed while it did not answer, with the steps and times of then.

One file a report, and not one that grows: object stores can't append, and a file that is written once can't lose what was in it.
"""

from __future__ import annotations

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pyarrow import fs

from pipelines.run.folder import Folder
from pipelines.run.history import Rows
from pipelines.run.logs import say
from pipelines.run.stopping import this_command
from pipelines.run.tracked import RUN
from pipelines.tracking.again import tell_again
from pipelines.tracking.tracker import KeptRow, Tracker
from qskd.config import Config
from qskd.errors import QskdError
from qskd.storage.stores import patience_s, patiently
from qskd.untrusted import parse_large_json

log = logging.getLogger("qskd")
ROWS = "rows"
PATIENCE_S, WAIT_S = 30.0, 2.0  # at a run's end, for a store that does not answer
READERS = 16  # files at a time: object stores are slow to answer each


def keep_rows(folder: Folder, name: str, rows: Rows, replace: bool = True) -> None:
    """Write down rows of (step, {metric: value}) that MLflow is about to be told. replace: what is there already under the name,
    as a report made again after a restart is; otherwise that stays."""
    path = f"{ROWS}/{name}.json"
    if replace or not folder.exists(path):
        folder.write(path, json.dumps({"time_ms": int(time.time() * 1000), "rows": rows}))


def tell(
    tracker: Tracker, folder: Folder, name: str, rows: Rows, new: Rows | None = None, replace: bool = True
) -> None:
    """Keep the rows, then log them; new: those of them that MLflow does not have, all by default."""
    keep_rows(folder, name, rows, replace)
    if tracker.metrics(rows if new is None else new) is False:
        kept = _read(folder, f"{name}.json")
        folder.write(f"{ROWS}/{name}.json", json.dumps({**kept, "unsent": True}))


def tell_result(tracker: Tracker, folder: Folder, step: int, values: dict[str, float]) -> None:
    """What was measured of the finished student, at the last step."""
    if values:
        tell(tracker, folder, "result", [(step, values)])


def forget_after(folder: Folder, step: int) -> None:
    """Delete the rows of reports after a step: a training that went back to an older checkpoint makes them again, perhaps at
    other steps."""
    for name in _names(folder):
        number = name.removesuffix(".json")
        if number.isdigit() and int(number) > step:
            folder.delete(f"{ROWS}/{name}")


def kept_rows(folder: Folder) -> tuple[list[KeptRow], int]:
    """All that was kept, and how many rows of it MLflow is known not to have taken. A damaged file is named in a warning and
    left out."""
    with ThreadPoolExecutor(READERS) as readers:
        files = list(readers.map(lambda name: _read(folder, name), _names(folder)))
    rows: list[KeptRow] = [
        (file["time_ms"], int(step), dict(values)) for file in files for step, values in file["rows"]
    ]
    return rows, sum(len(file["rows"]) for file in files if file.get("unsent"))


def _names(folder: Folder) -> list[str]:
    selector = fs.FileSelector(f"{folder.root}/{ROWS}", allow_not_found=True)
    found = patiently(folder.where(ROWS), folder.filesystem, lambda: folder.filesystem.get_file_info(selector))
    return sorted(info.base_name for info in found if info.base_name.endswith(".json") and info.base_name[0] != ".")


def _read(folder: Folder, name: str) -> dict[str, Any]:
    try:
        file = parse_large_json(folder.read(f"{ROWS}/{name}"), name)
        if [len(row) for row in file["rows"]].count(2) == len(file["rows"]) and isinstance(file["time_ms"], int):
            return dict(file)
    except (QskdError, ValueError, KeyError, TypeError, FileNotFoundError):
        pass
    log.warning("%s is damaged: if MLflow has missed its rows, they are lost", folder.where(f"{ROWS}/{name}"))
    return {"time_ms": 0, "rows": []}


def fill_in(tracker: Tracker, folder: Folder, name: str, patience: float = 0.0) -> bool:
    """Give MLflow what it has missed of a run's rows, and say how many those were. False, and a warning, when it does not answer
    for so many seconds; without any, also where it kept silent a moment ago. name: of the run, for what is said."""
    rows, unsent = kept_rows(folder)
    if not rows:
        return True
    deadline = time.monotonic() + min(patience, patience_s())
    while True:
        try:
            filled = tracker.fill_in(rows, now=patience > 0)
        except Exception as error:
            if time.monotonic() < deadline:
                time.sleep(WAIT_S)
                continue
            log.warning(
                "%s: MLFLOW AT %s DOES NOT HAVE THE WHOLE CURVES: %s rows could not be logged. They are kept in %s. When "
                "MLflow answers, this command fills them in: %s\n  it says: %s",
                *(name, tracker.uri, f"{unsent} of {len(rows)}" if unsent else f"some of {len(rows)}"),
                *(folder.where(ROWS), this_command(to_go_on=True), error),
            )
            return False
        if filled:
            told = f"{name}: MLflow had missed {filled} of {len(rows)} rows; they are filled in"
            say(told, run=name, rows_filled_in=filled)
        return True


def end_run(
    tracker: Tracker,
    folder: Folder,
    config: Config,
    patience: float = PATIENCE_S,
    whole: bool = False,
    told: bool = False,
) -> bool:
    """Fill in the curves (whole: that was done just now), tell the rest again (told: nothing was missed of it), and say in MLflow
    that the run is finished, also where it takes no files; whether all was done, which the run's folder then keeps: a finished
    run that is complete is not asked for again."""
    whole = whole or fill_in(tracker, folder, config.name, patience)
    told = whole and (told or tell_again(tracker, folder, config))
    done = whole and tracker.finish() and told
    if done:
        folder.write_record(RUN, json.dumps({"uri": tracker.uri, "run_id": tracker.run_id, "complete": True}))
    return done


def is_complete(folder: Folder) -> bool:
    """Whether `end_run` was done. So is a run of before there were such records: nothing can be compared."""
    if not folder.exists(RUN) or not folder.exists(ROWS):
        return True
    return bool(folder.read_record(RUN).get("complete"))
