"""The output folder of a run, OUTPUT/NAME, on any file system of pyarrow or fsspec."""

from __future__ import annotations

import logging
import os
import traceback
from pathlib import Path
from typing import Any

from pyarrow import fs

from qskd.config import Config
from qskd.errors import QskdError
from qskd.storage.files import publish_bytes, publish_copies, read_bytes
from qskd.storage.models import RUN_MARK
from qskd.storage.models import SWEEP as SWEEP
from qskd.storage.places import open_folder
from qskd.storage.stores import is_local, join, patiently
from qskd.untrusted import parse_large_json, parse_yaml

log = logging.getLogger("qskd")
MARK = RUN_MARK  # written first: that qskd made the folder (`pipelines.run.ownership`)
COPIES = "copies"  # of records, see `Folder`
TRIAL = "trial.json"  # what is known of a trial of a sweep
RECIPE = "recipe.yaml"  # beside it, at the sweep's end: the trial as a training of its own
DETAILS = (
    "evaluation/evaluation.json"  # what the last evaluation of a training says besides AP; beside it table and pictures
)
FAILURE = "failure.json"  # why workers gave up; a later run of the same command deletes it and tries again


def storage_path(config: Config) -> str:
    """The output, a local one whole."""
    return config.output if "://" in config.output else os.path.realpath(open_folder(config.output)[1])


class Folder:
    """Small files by name. A write is whole or not there; a store that fails is tried again. Picklable.

    What a run can't go on without is a record: JSON or YAML that is written twice, first to copies/, and read from there
    where the file itself turns out damaged.
    """

    def __init__(self, config: Config) -> None:
        self.storage_path = storage_path(config)
        self.path = join(self.storage_path, config.name)
        self.filesystem, self.root = open_folder(self.path)

    @classmethod
    def at(cls, path: str) -> Folder:
        """Of a run that is known by its folder alone."""
        folder = cls.__new__(cls)
        folder.storage_path, folder.path = path.rstrip("/").rpartition("/")[0], path
        folder.filesystem, folder.root = open_folder(path)
        return folder

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

    def write_record(self, name: str, text: str) -> None:
        self.write(f"{COPIES}/{name}", text)
        self.write(name, text)

    def read_record(self, name: str, kind: type = dict, remedy: str = "") -> Any:
        """What a record holds. A damaged one is replaced by its copy, with a warning; QskdError that names both where neither
        is whole. kind: of the whole. remedy: what else helps than a backup."""
        copy = f"{COPIES}/{name}"
        text, kept = self._text(name), None
        if name.endswith(".yaml"):  # half a YAML file is often YAML
            kept = self._text(copy)
        if not kept or text is None or text == kept or not kept.startswith(text):
            whole, value = _parsed(name, text, kind)
            if whole:
                return value
        kept = self._text(copy) if kept is None else kept
        whole, value = _parsed(name, kept, kind)
        if whole:
            log.warning("%s IS DAMAGED: its copy %s takes its place", self.where(name), self.where(copy))
            return value
        raise QskdError(
            self.where(name),
            f"is damaged ({'not text' if text is None else f'{len(text)} characters'}), and so is, or missing, its copy "
            f"{self.where(copy)}",
            "a whole file",
            f"bring either back from a backup{f', or {remedy}' if remedy else ''}; nothing was changed or deleted",
        )

    def _text(self, name: str) -> str | None:
        try:
            return self.read(name)
        except (FileNotFoundError, UnicodeDecodeError):
            return None

    def delete(self, name: str) -> None:
        """A file; what is not there needs no deleting. A whole run: `pipelines.run.ownership.delete_run`."""

        def delete() -> None:
            if self.exists(name):
                self.filesystem.delete_file(f"{self.root}/{name}")

        patiently(self.where(name), self.filesystem, delete)

    def upload(self, local: str | Path, name: str) -> None:
        """A folder's files, with those in folders below, each whole or what was there before. QskdError where a link stands in
        the way: what it leads to is not this run's."""
        inside = (path.relative_to(local).as_posix() for path in Path(local).rglob("*"))
        links = [path for path in (name, *(f"{name}/{each}" for each in inside)) if self.is_link(path)]
        if links:
            raise QskdError(
                self.where(links[0]), "a link", "a run's own files", "remove the link; nothing was replaced"
            )
        publish_copies(Path(local), self.filesystem, f"{self.root}/{name}", self.where(name))

    def is_link(self, name: str) -> bool:
        return is_local(self.filesystem) and os.path.islink(f"{self.root}/{name}")

    def for_ray(self) -> dict[str, Any]:
        """Ray Train's and Tune's `storage_path`, and for a URI the file system too: Ray itself knows only pyarrow's."""
        if is_local(self.filesystem):
            return {"storage_path": self.root}
        return {"storage_path": self.root, "storage_filesystem": _sparing(self.filesystem)}


def _sparing(filesystem: fs.FileSystem) -> fs.FileSystem:
    """S3 set to write an object for a folder only where nothing is in it yet. Ray asks for folders that have files of ours in them,
    and pyarrow would write objects for all above them too, which a role that may write below one folder alone is denied.

    No URI can say so: the file system is made again of what its pickle holds, which is all that Ray's workers get of it.
    """
    if filesystem.type_name != "s3":
        return filesystem
    again, (options,) = filesystem.__reduce__()
    return again(options | {"check_directory_existence_before_creation": True})


def _parsed(name: str, text: str | None, kind: type) -> tuple[bool, Any]:
    """Whether the text is whole, and what it says."""
    try:
        value = (parse_yaml if name.endswith(".yaml") else parse_large_json)(text or "", name)
    except QskdError:
        return False, None
    return isinstance(value, kind), value


def record_failure(folder: Folder, error: Exception) -> None:
    """Write an error that retrying cannot fix to failure.json, for the driver."""
    if not isinstance(error, QskdError):
        remedy = "if this looks like a fault of qskd, please report it with what `qskd doctor` prints"
        error = QskdError("a worker", "".join(traceback.format_exception(error)), remedy=remedy)
    folder.write(FAILURE, error.to_json())


def raise_failure(folder: Folder) -> None:
    """Raise what a worker recorded, if one did."""
    if folder.exists(FAILURE):
        try:
            error = QskdError.from_json(folder.read(FAILURE))
        except (ValueError, TypeError):
            remedy = "give the same command again, which deletes this file; the workers' logs may say more (`ray logs`)"
            error = QskdError(folder.where(FAILURE), "workers gave up, and why can't be read from it", remedy=remedy)
        raise error
