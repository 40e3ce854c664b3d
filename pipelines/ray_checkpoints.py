"""Ray Train's list of checkpoints, by which a run goes on: kept whole, and never ahead of what the run has written down.

Ray overwrites the list in place. A controller killed, or a disk full, in the middle of that leaves half of it, and every later
start would fail. So a copy is kept. And between the list and the run's own history (`pipelines.progress`) a controller can die.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from pyarrow import fs

from pipelines.checkpoint_files import delete_checkpoint
from pipelines.storage import Folder
from qskd.stores import patiently

log = logging.getLogger("qskd")
TRAIN = "train"  # what Ray calls the run
LIST = f"{TRAIN}/checkpoint_manager_snapshot.json"
COPY = "checkpoints.json"


def keep_list(folder: Folder) -> None:
    """Copy the list. For callbacks of the controller, which Ray calls when it has written it."""
    if folder.exists(LIST):
        text = folder.read(LIST)
        if _parsed(text):
            folder.write(COPY, text)


def mend_list(folder: Folder) -> None:
    """Before Ray reads it: half a list becomes its copy, or none. Ray deletes a checkpoint only when a list without it is whole."""
    if not folder.exists(LIST) or _parsed(folder.read(LIST)):
        return
    copy = folder.read(COPY) if folder.exists(COPY) else ""
    if _parsed(copy):
        log.warning("%s was not written to its end: its copy of one report before takes its place", folder.where(LIST))
        folder.write(LIST, copy)
    else:
        log.warning("%s was not written to its end: the training begins anew", folder.where(LIST))
        folder.delete(LIST)


def delete_unlisted(folder: Folder) -> None:
    """Delete the checkpoints that Ray's list does not name: of processes that died, or were still writing when the run had been
    begun again elsewhere. For when no worker of this run is at work."""
    if not folder.exists(LIST) or not (found := _parsed(folder.read(LIST))):
        return
    results = [*found["checkpoint_results"], *found["pending_training_results"], found["latest_checkpoint_result"]]
    listed = {result["checkpoint_dir_name"] for result in results if result}

    def delete() -> None:
        for info in folder.filesystem.get_file_info(fs.FileSelector(f"{folder.root}/{TRAIN}")):
            mine = info.type == fs.FileType.Directory and info.base_name.startswith("checkpoint_")
            if mine and info.base_name not in listed:
                delete_checkpoint(folder, f"{TRAIN}/{info.base_name}")

    patiently(folder.where(TRAIN), folder.filesystem, delete)


def last_report(folder: Folder) -> tuple[dict[str, Any], str] | None:
    """What rank 0 said with the checkpoint that the run will go on from, and that checkpoint's name in the run's folder."""
    found = _parsed(folder.read(LIST)) if folder.exists(LIST) else {}
    latest = found.get("latest_checkpoint_result")
    return (latest["metrics"], f"{TRAIN}/{latest['checkpoint_dir_name']}") if latest else None


def _parsed(text: str) -> dict[str, Any]:
    """{} for what is no whole JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
