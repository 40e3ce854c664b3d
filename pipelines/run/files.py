"""What is in a run's folder, and in its checkpoints: of these only what qskd wrote is deleted."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator

from pyarrow import fs

from pipelines.run.folder import Folder
from qskd.storage.files import UNFINISHED
from qskd.storage.ownership import STUDENT_FILE, listed
from qskd.storage.stores import is_local, patiently

log = logging.getLogger("qskd")
STUDENT = f"student/(?:{STUDENT_FILE.pattern})"
# What a process that was killed left of a file, or of those of a folder (`publish_copies`).
HALF_WRITTEN = rf"{re.escape(UNFINISHED)}[^/]*(?:/\d+)?"
CHECKPOINT_FILE = re.compile(rf"state\.safetensors|state\.json|\.metadata\.json|{STUDENT}|{HALF_WRITTEN}")


def files_in(folder: Folder, below: str = "") -> list[str]:
    """Every file below the folder, or below one in it, by its path from there. Links are not followed, and end in "@": they
    are never ours."""
    root = f"{folder.root}/{below}".rstrip("/")
    if is_local(folder.filesystem):
        return sorted(_walk(root))
    selector = fs.FileSelector(root, allow_not_found=True, recursive=True)
    infos = patiently(folder.where(below), folder.filesystem, lambda: folder.filesystem.get_file_info(selector))
    return sorted(info.path[len(root) :].lstrip("/") for info in infos if info.type != fs.FileType.Directory)


def _walk(root: str) -> Iterator[str]:
    for place, folders, files in os.walk(root):
        for name in [*files, *folders]:
            path = os.path.join(place, name)
            if os.path.islink(path):
                yield os.path.relpath(path, root) + "@"
            elif name in files:
                yield os.path.relpath(path, root)


def delete_checkpoint(folder: Folder, name: str) -> None:
    """Delete a checkpoint: its folder, or, where other files are in it too, its own files alone, with a warning."""
    inside = files_in(folder, name)
    others = [path for path in inside if not CHECKPOINT_FILE.fullmatch(path)]
    if not others:
        folder.filesystem.delete_dir(f"{folder.root}/{name}")
        return
    for path in inside:
        if path not in others:
            folder.delete(f"{name}/{path}")
    log.warning(
        "%s: a checkpoint that is no longer needed; kept, as it is no part of it: %s",
        folder.where(name),
        listed(others),
    )
