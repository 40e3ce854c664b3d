"""The output folder of a run, OUTPUT/NAME, on any file system of pyarrow or fsspec."""

from __future__ import annotations

import fcntl
import json
import logging
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pyarrow import fs

from qskd.config import Config
from qskd.errors import QskdError, writing
from qskd.files import open_folder, publish_bytes, read_bytes
from qskd.recipe import flatten, to_tree
from qskd.stores import is_local, join, patiently

log = logging.getLogger("qskd")
# What may differ between a run and its continuation: where, how fast and what is said of it, not what is done.
FREE_TO_CHANGE = ("compute.", "tracking.", "card.", "output")
MARK = ".qskd-run.json"  # written first: that qskd made the folder (`pipelines.ownership`)
DATA = "data.json"  # fingerprints of the shards that a run was begun on
SWEEP = "sweep.json"  # what a sweep was asked for
TRIAL = "trial.json"  # what is known of a trial of a sweep
RECIPE = "recipe.yaml"  # beside it, at the sweep's end: the trial as a training of its own
FAILURE = "failure.json"  # why workers gave up; a later run of the same command deletes it and tries again


def storage_path(config: Config) -> str:
    """The output, a local one whole."""
    return config.output if "://" in config.output else str(Path(config.output).expanduser().resolve())


class Folder:
    """Small files by name; a write is whole or not there, and a store that fails is tried again (`qskd.stores`). Picklable."""

    def __init__(self, config: Config) -> None:
        self.storage_path = storage_path(config)
        self.path = join(self.storage_path, config.name)
        self.filesystem, self.root = open_folder(self.path)

    def where(self, name: str) -> str:
        """A file's full name, for readers and for messages."""
        return join(self.path, name)

    def exists(self, name: str = "") -> bool:
        path = f"{self.root}/{name}".rstrip("/")
        info = patiently(self.where(name), self.filesystem, lambda: self.filesystem.get_file_info(path))
        return bool(info.type != fs.FileType.NotFound)

    def read(self, name: str) -> str:
        return read_bytes(self.filesystem, f"{self.root}/{name}", self.where(name)).decode()

    def write(self, name: str, text: str) -> None:
        publish_bytes(text.encode(), self.filesystem, f"{self.root}/{name}")

    def delete(self, name: str) -> None:
        """A file; what is not there needs no deleting. A whole run: `pipelines.ownership.delete_run`."""

        def delete() -> None:
            if self.exists(name):
                self.filesystem.delete_file(f"{self.root}/{name}")

        patiently(self.where(name), self.filesystem, delete)

    def upload(self, local: str | Path, name: str) -> None:
        def upload() -> None:
            self.filesystem.create_dir(f"{self.root}/{name}", recursive=True)
            fs.copy_files(str(local), f"{self.root}/{name}", destination_filesystem=self.filesystem)

        patiently(self.where(name), self.filesystem, upload)

    def for_ray(self) -> dict[str, Any]:
        """Ray Train's and Tune's `storage_path`, and for a URI the file system too: Ray itself knows only pyarrow's."""
        if is_local(self.filesystem):
            return {"storage_path": self.root}
        return {"storage_path": self.root, "storage_filesystem": self.filesystem}


def check_no_trial(folder: Folder) -> None:
    """QskdError where a trial of a sweep is: another program there would train on in it, or replace its student. The
    configuration that a trial's MLflow run has names that folder."""
    if not folder.exists(TRIAL):
        return
    remedy = "choose another folder: --set name=... --set output=..."
    if folder.exists(RECIPE):
        remedy = f"its recipe as a run of its own is {folder.where(RECIPE)}; or {remedy}"
    raise QskdError(folder.path, "holds a trial of a sweep", "a folder of its own", remedy)


@contextmanager
def alone_on(folder: Folder) -> Iterator[None]:
    """One driver at a time: two would delete each other's checkpoints and mix their records. QskdError when another, on a
    machine that shares this file system, is at work; object stores have no locks, and the system lets a dead driver's go."""
    if not is_local(folder.filesystem):
        yield
        return
    path = Path(folder.root)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.with_name(f".{path.name}.lock").open("a")  # beside it: --restart deletes the folder
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait for it, end it, or choose another name: --set name=..."
            raise QskdError(folder.path, "another program works on it now", "one at a time", remedy) from None
        except OSError:
            log.warning("%s: its file system has no locks; see that no other program works on it", folder.path)
        yield


def check_same_run(folder: Folder, config: Config) -> None:
    """Refuse to continue a run with another configuration, naming the fields that differ."""
    if not folder.exists("config.yaml"):
        return
    before, now = flatten(yaml.safe_load(folder.read("config.yaml"))), flatten(to_tree(config))
    # A field that the qskd which began the run did not have yet did what its default does now.
    before = {key: value for key, value in flatten(to_tree(Config())).items() if key in now} | before
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise QskdError(
            folder.path,
            f"holds a run with another configuration: {'; '.join(changed)}",
            "the same configuration, to go on with it",
            "choose another name (--set name=...), or add --restart, which deletes that run: its records, checkpoints and student",
        )


def check_same_data(folder: Folder, data: Mapping[str, str]) -> None:
    """Refuse to continue a run on other data than it was begun on. data: fingerprint by field, of `Manifest`."""
    if not folder.exists(DATA):
        folder.write(DATA, json.dumps(dict(data), indent=1))
        return
    before = json.loads(folder.read(DATA))
    changed = [name for name, fingerprint in data.items() if before.get(name) != fingerprint]
    if changed:
        raise QskdError(
            folder.path,
            f"was begun on other data: {' and '.join(changed)} changed since (the shards were made anew)",
            "the same images and annotations, to go on with it",
            "choose another name (--set name=...), or add --restart, which deletes that run: its records, checkpoints and student",
        )


def record_failure(folder: Folder, error: Exception) -> None:
    """Leave word of an error that trying again can't mend, for the driver."""
    if not isinstance(error, QskdError):
        remedy = "if this looks like a fault of qskd, please report it with what `qskd doctor` prints"
        error = QskdError("a worker", "".join(traceback.format_exception(error)), remedy=remedy)
    folder.write(FAILURE, error.to_json())


def raise_failure(folder: Folder) -> None:
    """Raise what a worker recorded, if one did."""
    if folder.exists(FAILURE):
        raise QskdError.from_json(folder.read(FAILURE))
