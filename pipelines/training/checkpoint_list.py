"""Ray Train's list of checkpoints, by which a run goes on: kept whole, and never ahead of what the run has written down.

Ray overwrites the list in place. A controller killed, or a disk full, in the middle of that leaves half of it, and every later
start would fail. So a copy is kept. And between the list and the run's own history (`progress`) a controller can die.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from pyarrow import fs

from pipelines.run.files import delete_checkpoint
from pipelines.run.folder import Folder
from pipelines.training.checkpoints import damage, nothing_whole
from qskd.errors import QskdError
from qskd.storage.durable import sync_file, sync_tree
from qskd.storage.stores import is_local, patiently
from qskd.untrusted import parse_large_json

log = logging.getLogger("qskd")
TRAIN = "train"  # what Ray calls the run
LIST = f"{TRAIN}/checkpoint_manager_snapshot.json"
COPY = "checkpoints.json"


def keep_list(folder: Folder) -> None:
    """Copy the list, once the checkpoint that it ends with is surely on the disk. For callbacks of the controller, which Ray
    calls when it has written both; the workers train on meanwhile."""
    if folder.exists(LIST):
        text = folder.read(LIST)
        if found := _parsed(text):
            if (latest := found.get("latest_checkpoint_result")) and is_local(folder.filesystem):
                sync_tree(f"{folder.root}/{TRAIN}/{latest['checkpoint_dir_name']}")
                sync_file(f"{folder.root}/{LIST}")
            folder.write(COPY, text)


def mend_list(folder: Folder) -> None:
    """Before Ray reads it: half a list becomes its copy, or none (Ray deletes a checkpoint only when a list without it is
    whole), and checkpoints that are damaged are taken off it, so that Ray goes on from the last whole one. QskdError where
    none is whole."""
    if not folder.exists(LIST):
        return
    if not _parsed(folder.read(LIST)):
        _mend_half(folder)
    if found := _parsed(folder.read(LIST)) if folder.exists(LIST) else {}:
        _drop_damaged(folder, found)


def _mend_half(folder: Folder) -> None:
    copy = folder.read(COPY) if folder.exists(COPY) else ""
    if _parsed(copy):
        log.warning("%s was not written to its end: its copy of one report before takes its place", folder.where(LIST))
        folder.write(LIST, copy)
    else:
        log.warning("%s was not written to its end: the training begins anew", folder.where(LIST))
        folder.delete(LIST)


def _drop_damaged(folder: Folder, found: dict[str, Any]) -> None:
    names = [result["checkpoint_dir_name"] for result in found.get("checkpoint_results", [])]
    wrong = {name: problems for name in names if (problems := damage(folder, f"{TRAIN}/{name}"))}
    if not wrong:
        return
    if len(wrong) == len(names):
        raise nothing_whole(folder, [problem for problems in wrong.values() for problem in problems])
    last = max(at for at, name in enumerate(names) if name not in wrong)
    for name, problems in wrong.items():
        log.warning(
            "A CHECKPOINT IS DAMAGED: %s. The training goes on from %s, makes this one again, and deletes what is left of %s",
            "; ".join(problems),
            folder.where(f"{TRAIN}/{names[last]}"),
            folder.where(f"{TRAIN}/{name}"),
        )
    # Of Ray's fields those that name checkpoints: lists in step with each other, and by name.
    kept = [at for at, name in enumerate(names) if name not in wrong]
    found["checkpoint_report_indices"] = [found["checkpoint_report_indices"][at] for at in kept]
    found["checkpoint_results"] = [found["checkpoint_results"][at] for at in kept]
    found["latest_checkpoint_result"] = found["checkpoint_results"][-1]
    pending = list(zip(found["pending_training_results"], found["pending_validation_specs"], strict=True))
    pending = [(result, spec) for result, spec in pending if result["checkpoint_dir_name"] not in wrong]
    found["pending_training_results"] = [result for result, _ in pending]
    found["pending_validation_specs"] = [spec for _, spec in pending]
    folder.write(LIST, json.dumps(found))


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
        found = parse_large_json(text, "")
    except QskdError:
        return {}
    return found if isinstance(found, dict) else {}
