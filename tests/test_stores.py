"""Patience with stores, on one that refuses each request once: a folder on this disk behind fsspec."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from pipelines.caching import plan as cache_plan
from pipelines.run.folder import Folder
from pipelines.run.ownership import claim, delete_run
from pipelines.training.checkpoint_list import LIST, TRAIN, delete_unlisted
from pipelines.tuning.trial.checkpoints import _keep
from qskd.config import Config
from qskd.errors import QskdError
from qskd.storage.stores import PATIENCE, join, may_pass, patience_s
from qskd.teacher.manifest import CacheManifest, CacheSizes

fsspec_local = pytest.importorskip("fsspec.implementations.local", reason="fsspec is not installed")


class Unreliable(fsspec_local.LocalFileSystem):  # type: ignore[name-defined,misc]
    """Every path is deleted at the second try."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[str] = []

    def _refuse_once(self, path: str) -> None:
        if path not in self.refused:
            self.refused.append(path)
            raise OSError("the store is busy")

    def rm_file(self, path: str) -> None:
        self._refuse_once(path)
        super().rm_file(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._refuse_once(path)
        super().rm(path, recursive, maxdepth)


def delete_file(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.delete("manifest.json")


def keep_two_checkpoints(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    _keep(folder, {3, 6})


def delete_what_ray_does_not_list(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    delete_unlisted(folder)


def clean_a_cache(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_plan, "open_folder", lambda path: (folder.filesystem, folder.root))
    cache_plan.clean(folder.path, everything=True)


CHECKPOINTS = [f"checkpoints/{step:09d}" for step in (0, 3, 6, 9)]
TRAINED = [f"{TRAIN}/checkpoint_1", f"{TRAIN}/checkpoint_2"]
CACHE = ["manifest.json", "shard-0.view-000.parquet"]


@pytest.mark.parametrize(
    ("delete", "gone"),
    [
        (delete_file, ["manifest.json"]),
        (keep_two_checkpoints, [CHECKPOINTS[0], CHECKPOINTS[3]]),
        (delete_what_ray_does_not_list, TRAINED[:1]),
        (clean_a_cache, CACHE),
    ],
)
def test_what_a_busy_store_would_not_delete_is_deleted_at_the_next_try(
    delete: Callable[[Folder, pytest.MonkeyPatch], None],
    gone: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Folder(Config(name="run", output=str(tmp_path)))
    root = tmp_path / "run"
    for name in CHECKPOINTS + TRAINED:
        (root / name).mkdir(parents=True)
        (root / name / "state.json").write_text("{}")
    manifest = CacheManifest({}, CacheSizes(1, 3, 2, (4,)), 4, ("shard-0",), {0: ((1, 1),)})
    (root / CACHE[0]).write_text(manifest.to_json())
    for name in [*CACHE[1:], "notes.txt"]:
        (root / name).write_text("x")
    results: dict[str, Any] = {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_2"}]}
    (root / LIST).write_text(json.dumps(results | {"pending_training_results": [], "latest_checkpoint_result": None}))
    unreliable = Unreliable()
    folder.filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(unreliable))
    there = [*CHECKPOINTS, *TRAINED, *CACHE, "notes.txt"]
    delete(folder, monkeypatch)
    assert len(unreliable.refused) == len(gone)
    left = [name for name in there if (root / name).exists()]
    assert left == [name for name in there if name not in gone]


def test_a_busy_store_s_run_is_deleted_at_the_next_try_of_each_file(tmp_path: Path) -> None:
    folder = Folder(Config(name="run", output=str(tmp_path)))
    claim(folder, "train", "run")
    for name in ("config.yaml", LIST, f"{TRAIN}/checkpoint_1/state.json"):
        folder.write(name, "x")
    unreliable = Unreliable()
    folder.filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(unreliable))
    delete_run(folder)
    assert len(unreliable.refused) == 4 + 1  # each file, and the folder
    assert not (tmp_path / "run").exists()


def test_names_are_joined_before_a_query() -> None:
    assert join("s3://b/x?region=y", "run", "file") == "s3://b/x/run/file?region=y"
    assert join("/a/what?", "file") == "/a/what?/file"
    assert join("s3://b/", "file") == "s3://b/file"
    assert join("/", "file") == "//file"


def test_patience_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("soon", "-1", "nan", "inf"):
        monkeypatch.setenv(PATIENCE, wrong)
        with pytest.raises(QskdError, match=PATIENCE):
            patience_s()
    assert may_pass(OSError("AWS Error NETWORK_CONNECTION during HeadObject operation"))
    assert not may_pass(FileNotFoundError("x"))
