"""The folder that a benchmark works in and deletes at its end: one that was not there before, or its own of last time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qskd.errors import QskdError
from qskd.storage.ownership import listed

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MARK = ".qskd-benchmark"


def claim(folder: Path) -> None:
    """Make the folder and mark it. QskdError where it holds anything and no mark."""
    if folder.exists() and not (folder / MARK).is_file():
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
        if there:
            found = f"holds {listed(there)}, which this benchmark would delete"
            raise QskdError(str(folder), found, "a new or an empty folder", "--work ANOTHER; nothing was deleted")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def discard(folder: Path, patterns: Sequence[str]) -> None:
    """Delete what matches the patterns, the benchmark's own names, then the folder if nothing else is in it."""
    if not (folder / MARK).is_file():
        return
    for path in {path for pattern in patterns for path in folder.glob(pattern)}:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(
            missing_ok=True
        )
    left = sorted(path.name for path in folder.iterdir() if path.name != MARK)
    if left:
        print(f"{folder}: kept, for it holds {listed(left)}")
        return
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()


def check_record(path: Path | None, kind: type[DataclassInstance]) -> None:
    """`check_out` for what `--record` names: the fields of this class."""
    check_out(path, "--record", lambda found: set(found) == {field.name for field in fields(kind)})


def check_out(path: Path | None, option: str, is_ours: Callable[[dict[str, Any]], bool]) -> None:
    """QskdError, before anything is measured, where a JSON file could not be written, or is there and is none of ours."""
    if path is None:
        return
    if not os.path.lexists(path):
        if not path.parent.is_dir():
            raise QskdError(str(path), "its folder is not there", "a file in one that is", f"mkdir -p {path.parent}")
        return
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not is_ours(found):
        raise QskdError(str(path), "is there, and is no record of this benchmark", "a new file", f"{option} ANOTHER")
