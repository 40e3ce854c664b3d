"""Local files that outlast a power cut: their bytes are on the disk before a name points to them, and the name too.

Without this a file system may keep the new name and lose the bytes: half a file, or an empty one, in place of a whole one.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

# Some network file systems know no fsync of folders; there the server decides.
_NOT_KNOWN = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)


def sync_file(path: str | Path) -> None:
    """Wait until the file's bytes are on the disk. OSError where they can't be (the disk is full)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: str | Path) -> None:
    """Wait until the names in a folder are on the disk, where its file system can say so."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in _NOT_KNOWN:
            raise


def sync_tree(path: str | Path) -> None:
    """The same for all files and folders below, and the folder's own name."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync_file(Path(folder, name))
        sync_folder(folder)
    sync_folder(Path(path).parent)


def replace(spool: str | Path, target: str | Path) -> None:
    """os.replace that a power cut leaves either undone or done with all bytes."""
    sync_file(spool)
    os.replace(spool, target)
    sync_folder(Path(target).parent)


def make_folder(path: str | Path) -> None:
    """The folder and those above it; their names are on the disk then."""
    missing = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    Path(path).mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)
