"""The checkpoints of a trial in its own process: their names, which is whole, which are kept."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from pipelines.run.files import delete_checkpoint
from pipelines.run.folder import Folder
from pipelines.training.checkpoints import damage, nothing_whole
from qskd.storage.stores import patiently

log = logging.getLogger("qskd")
POINTER = "checkpoint.json"


def _name(step: int) -> str:
    return f"checkpoints/{step:09d}"


def _checkpoint(folder: Folder, name: str) -> Any:
    import ray.train

    return ray.train.Checkpoint(f"{folder.root}/{name}", filesystem=folder.filesystem)


def steps_of(folder: Folder) -> list[int]:
    """Of a trial's checkpoints, in order."""
    from pyarrow import fs

    def look() -> list[int]:
        found = folder.filesystem.get_file_info(fs.FileSelector(f"{folder.root}/checkpoints", allow_not_found=True))
        return sorted(int(info.base_name) for info in found if info.base_name.isdigit())

    return patiently(folder.where("checkpoints"), folder.filesystem, look)


def last_whole(folder: Folder, step: int, first: int) -> int:
    """The step of the last whole checkpoint of a trial, from `step` back to `first`; QskdError where there is none."""
    wrong: list[str] = []
    for at in [step, *reversed([each for each in steps_of(folder) if first <= each < step])]:
        problems = damage(folder, _name(at))
        if not problems:
            if wrong:
                log.warning(
                    "A CHECKPOINT IS DAMAGED: %s. The trial goes on from %s", "; ".join(wrong), folder.where(_name(at))
                )
            return at
        wrong += problems
    raise nothing_whole(folder, wrong)


def _keep(folder: Folder, steps: set[int]) -> None:
    """Delete all other checkpoints, and nothing else that lies there."""
    from pyarrow import fs

    names = {Path(_name(step)).name for step in steps}

    def delete() -> None:
        for info in folder.filesystem.get_file_info(fs.FileSelector(f"{folder.root}/checkpoints")):
            mine = info.type == fs.FileType.Directory and re.fullmatch(r"\d{9}", info.base_name)
            if mine and info.base_name not in names:
                delete_checkpoint(folder, f"checkpoints/{info.base_name}")

    patiently(folder.where("checkpoints"), folder.filesystem, delete)
