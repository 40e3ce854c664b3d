"""Strangers' files, and how it is seen that nothing touches them (`test_deletes*.py`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.demo.quickstart import TEACHER
from qskd.config import Config
from qskd.config.recipe import load
from qskd.datasets.shapes import ShapesConfig
from qskd.errors import QskdError

ROOT = Path(__file__).parent.parent
SHAPES = ShapesConfig(images=3)
NOTES = b"a year's work\n"


def tree(root: Path) -> dict[str, bytes]:
    """Every file below, and what is in it."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def strangers(folder: Path) -> dict[str, bytes]:
    """A folder of someone's: texts, and a repository."""
    for name in ("letter.txt", "notes/plan.md", ".git/HEAD", "config.json", "config.yaml", "manifest.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(NOTES)
    return tree(folder)


def config(root: Path, *overrides: str) -> Config:
    fixed = [f"data.train={root}/train", f"data.val={root}/val", f"teacher.path={TEACHER}", f"output={root}/runs"]
    return load(None, [*fixed, "name=run", f"tracking.uri=sqlite:///{root}/mlflow.db", *overrides])


def refused(run: Callable[[], Any], words: str, untouched: Path) -> QskdError:
    """The error; nothing below `untouched` is changed by it, nothing added."""
    before = tree(untouched)
    with pytest.raises(QskdError, match=words) as told:
        run()
    assert tree(untouched) == before
    return told.value
