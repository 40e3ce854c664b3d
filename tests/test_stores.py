"""Patience with stores, on one that refuses each request once: a folder on this disk behind fsspec."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.fs as pafs
import pytest

from pipelines.caching import plan as cache_plan
from pipelines.run.files import delete_checkpoint, files_in
from pipelines.run.folder import MARK, Folder
from pipelines.run.ownership import claim, delete_run, foreign
from pipelines.training.checkpoint_list import LIST, TRAIN, delete_unlisted
from pipelines.tuning.trial.checkpoints import _keep
from qskd.config import Config
from qskd.errors import QskdError
from qskd.storage import stores
from qskd.storage.files import UNFINISHED
from qskd.storage.places import check_uri, open_at_once, open_folder
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
    assert not may_pass(OSError("Unable to load libjvm"))


def test_a_path_means_what_it_means_in_the_working_folder_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook that changes its folder, `shards/val` was that of before."""
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        assert open_folder("shards")[1] == f"{tmp_path}/{place}/shards"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_folder("~/shards")[1] == f"{tmp_path}/shards"
    assert open_folder("file:///a/b") is open_folder("file:///a/b")


@pytest.mark.parametrize("use", [open_folder, open_at_once, check_uri, lambda uri: join(uri, "run")])
def test_a_uri_whose_path_a_number_sign_would_end_is_refused_with_what_to_write(use: Callable[[str], Any]) -> None:
    for uri in ("s3://b/runs#2/one?region=y", "s3://b/x#1", "file:///runs#2/one", "memory://runs#2"):
        with pytest.raises(QskdError, match="#") as raised:
            use(uri)
        assert raised.value.remedy.endswith(uri.replace("#", "%23"))
    with pytest.raises(QskdError) as raised:
        use("s3://b/x#token=hunter2")
    assert "hunter2" not in str(raised.value)
    assert join("/runs#2", "run") == "/runs#2/run"


@pytest.mark.parametrize("name", ["a b", "Fotos-für-é", "a[1]", "50%", "100%2", "{x}|y"])
def test_a_path_that_is_no_uri_s_is_told_with_the_uri_that_means_it(name: str) -> None:
    with pytest.raises(QskdError, match="can't be opened") as raised:
        open_folder(f"s3://bucket/{name}/a%20b?region=us-east-1&scheme=http")
    said = raised.value.remedy.removeprefix("write it as ")
    assert open_folder(said)[1] == f"bucket/{name}/a b"
    with pytest.raises(QskdError) as raised:
        open_folder("s3://bucket/x?nonsense=1")
    assert raised.value.remedy == "correct it"


def test_a_store_that_fails_while_it_is_opened_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """pyarrow asks S3 for a bucket's region then."""
    failures: list[str] = []
    real = pafs.FileSystem

    class Asked(pafs.FileSystem):
        @staticmethod
        def from_uri(uri: str) -> Any:
            if failures:
                raise OSError(failures.pop())
            return real.from_uri(uri)

    passing = "When resolving region for bucket 'b': AWS Error NETWORK_CONNECTION during HeadBucket operation"
    monkeypatch.setattr(pafs, "FileSystem", Asked)
    failures += [passing] * 2
    assert open_folder(f"file://{tmp_path}/a")[1] == f"{tmp_path}/a"
    assert "answered at try 3" in caplog.text
    monkeypatch.setenv(PATIENCE, "0")
    failures += [passing]
    with pytest.raises(QskdError, match="the store failed 1 time") as raised:
        open_folder(f"file://{tmp_path}/b")
    assert PATIENCE in raised.value.remedy
    monkeypatch.delenv(PATIENCE)
    for open_it, message in ((open_folder, "Bucket 'b' not found"), (open_at_once, passing)):
        failures[:] = [passing, message]
        with pytest.raises(QskdError, match="can't be reached"):
            open_it(f"file://{tmp_path}/c")
        assert failures == [passing]


# --- a folder's files -------------------------------------------------------------------------------------------------
def student(place: Path, filling: bytes, size: int) -> Path:
    """A checkpoint's files: some in a folder below."""
    (place / "student").mkdir(parents=True, exist_ok=True)
    for name in ("state.json", "student/config.json"):
        (place / name).write_bytes(filling)
    (place / "student/model.safetensors").write_bytes(filling * size)
    return place


def contents(place: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in Path(place).rglob("*") if path.is_file()}


def test_a_disk_that_takes_not_all_of_a_folders_files_keeps_those_that_were_there(tmp_path: Path) -> None:
    folder = Folder(Config(name="run", output=str(tmp_path)))
    folder.upload(student(tmp_path / "new", b"a", 1000), "checkpoints/000000001")
    before = contents(folder.root)
    assert len(before) == 3
    student(tmp_path / "new", b"b", 200_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(QskdError, match="File too large") as caught:
            folder.upload(tmp_path / "new", "checkpoints/000000001")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.where == folder.where("checkpoints/000000001")
    assert contents(folder.root) == before
    folder.upload(tmp_path / "new", "checkpoints/000000001")
    assert contents(Path(folder.root, "checkpoints/000000001")) == contents(tmp_path / "new")


_KILLED = """
import os, shutil, sys
from pathlib import Path
import pyarrow.fs as pafs
from qskd.storage import files

def killed(read, written, *rest):
    written.write(b"half")
    written.flush()
    os.kill(os.getpid(), 9)

shutil.copyfileobj = killed
files.publish_copies(Path(sys.argv[1]), pafs.LocalFileSystem(), sys.argv[2], sys.argv[2])
"""


@pytest.mark.parametrize("name", ["student", "trials/0000/student", "trials/0000/checkpoints/000000001"])
def test_what_a_killed_copy_left_is_the_runs_own_and_goes_with_the_next(name: str, tmp_path: Path) -> None:
    folder = Folder(Config(name="run", output=str(tmp_path)))
    source = student(tmp_path / "new", b"a", 9)
    claim(folder, "train", "run")
    for _ in range(2):
        subprocess.run([sys.executable, "-c", _KILLED, source, f"{folder.root}/{name}"], check=False, timeout=60)
        (half,) = [left for left in files_in(folder) if left != MARK]
        assert half.startswith(f"{name}/{UNFINISHED}")
        assert foreign([half]) == []
    if "checkpoints" in name:
        delete_checkpoint(folder, name)
        assert not folder.exists(name)
    folder.upload(source, name)
    assert contents(Path(folder.root, name)) == contents(source)
    # What a user has put there stays.
    (Path(folder.root) / name / f"{UNFINISHED}chapter2").mkdir(mode=0o700)
    (Path(folder.root) / name / f"{UNFINISHED}chapter2" / "draft.md").write_bytes(b"mine")
    folder.upload(source, name)
    assert contents(Path(folder.root, name)) == contents(source) | {f"{UNFINISHED}chapter2/draft.md": b"mine"}


def test_a_folders_files_go_one_by_one_to_a_store_each_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Busy(fsspec_local.LocalFileSystem):  # type: ignore[name-defined,misc]
        cachable = False
        refused: ClassVar[list[str]] = []

        def open(self, path: str, mode: str = "rb", **rest: Any) -> Any:
            if mode == "wb" and path not in self.refused:
                self.refused.append(path)
                raise OSError("the store is busy")
            return super().open(path, mode, **rest)

    monkeypatch.setattr(stores, "FIRST_WAIT_S", 0.01)
    folder = Folder(Config(name="run", output=str(tmp_path)))
    folder.filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(Busy()))
    source = student(tmp_path / "new", b"a", 9)
    folder.upload(source, "train/checkpoint_1")
    assert contents(Path(folder.root, "train/checkpoint_1")) == contents(source)
    assert len(Busy.refused) == 3
