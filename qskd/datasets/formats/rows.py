"""Rows of Hugging Face datasets on a disk: Parquet, the Arrow files of `save_to_disk`, metadata.jsonl. No network, no code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qskd.datasets.formats.reading import read_text
from qskd.errors import QskdError
from qskd.printable import shown_value
from qskd.untrusted import parse_json

METADATA = ("metadata.jsonl", "metadata.parquet")
_SPLIT_WORDS = ("train", "validation", "valid", "val", "dev", "test")
_TAKEN = 16  # rows at once: their pictures are in memory
_LARGEST_JSON = 2**24  # bytes, of dataset_info.json and the like
_READERS = (pa.ArrowException, OSError, ValueError, TypeError, KeyError)


def find_splits(source: Path) -> dict[str, list[Path]]:
    """Split -> its files of rows; one without a name where the source is a single split. Empty when there are none."""
    if source.is_file():
        return {"": [source]} if source.suffix.lower() in (".parquet", ".arrow", ".jsonl") else {}
    if (dictionary := source / "dataset_dict.json").is_file():
        names = _json(dictionary).get("splits")
        if not isinstance(names, list) or not all(map(_is_plain, names)):
            raise QskdError(str(dictionary), f"`splits` is {shown_value(names)}", "names of folders")
        return {name: _saved(source / name) for name in names}
    if (source / "state.json").is_file():
        return {"": _saved(source)}
    for place in (source, source / "data"):
        if files := _metadata(place):
            return {"": files}
        if found := {each.name: files for each in _folders(place) if (files := _metadata(each))}:
            return found
    return _parquet_splits(source)


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and not name.startswith(".") and not set(name) & set("/\\\0")


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []


def _metadata(place: Path) -> list[Path]:
    return [place / name for name in METADATA if (place / name).is_file()][:1]


def _json(path: Path) -> dict[str, Any]:
    expected = "JSON that `save_to_disk` wrote"
    value = parse_json(read_text(path, expected, _LARGEST_JSON), str(path), expected)
    if not isinstance(value, dict):
        raise QskdError(str(path), f"a {type(value).__name__} at the top", expected)
    return value


def _saved(folder: Path) -> list[Path]:
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        remedy = "load it, call `flatten_indices()` and save it again"
        raise QskdError(str(folder), "rows in an order of their own (`_indices_data_files`)", "plain rows", remedy)
    files = state.get("_data_files")
    names = (
        [each.get("filename") if isinstance(each, dict) else None for each in files]
        if isinstance(files, list)
        else [None]
    )
    if not all(map(_is_plain, names)):
        raise QskdError(str(folder / "state.json"), f"`_data_files` is {shown_value(files)}", "names of .arrow files")
    return [folder / str(name) for name in names]


def _parquet_splits(source: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(source.rglob("*.parquet")):
        found.setdefault(_split_name(path.relative_to(source)), []).append(path)
    for name, paths in found.items():
        if len(folders := sorted({str(path.parent) for path in paths})) > 1:
            several = f"Parquet files of `{name}` in {len(folders)} folders, {folders[0]} and {folders[1]}"
            raise QskdError(str(source), several, "one dataset", f"give one of them, for example {folders[0]}")
    return found


def _split_name(path: Path) -> str:
    """By how files of Hub datasets are named: train-00000-of-00002.parquet, train/0000.parquet, my_train.parquet."""
    if sharded := re.fullmatch(r"(.+?)-\d+-of-\d+(-[0-9a-f]+)?", path.stem):
        return sharded[1]
    for part in (path.stem, *reversed(path.parent.parts)):
        words = re.split(r"[^a-zA-Z]+", part.lower())
        for word in _SPLIT_WORDS:
            if word in words:
                return word
    return "train"


_ROW = ": row "


def row_after(where: str) -> str:
    """Where the next row of the same file is."""
    path, _, number = where.rpartition(_ROW)
    return f"{path}{_ROW}{int(number) + 1}"


class Rows:
    """The rows of one split's files, which have the same columns. Read in order, a few at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self.folder = files[0].parent
        self.features: dict[str, Any] = {}
        self._lines: list[dict[str, Any]] = []  # of a metadata.jsonl
        if files[0].suffix.lower() == ".jsonl":
            self._lines = [*self._json_lines()]
            self.columns = list(dict.fromkeys(key for line in self._lines for key in line))
        else:
            self.columns, noted = self._schema(files[0])
            self.features = self._features(noted)

    def check_one_split(self) -> None:
        """QskdError where the pictures that a metadata.jsonl names lie in the folders of several splits."""
        names = [line.get("file_name") for line in self._lines]
        folders = {PurePosixPath(name).parts[:1] for name in names if isinstance(name, str)}
        if len(folders) > 1 and all(folder and folder[0].lower() in _SPLIT_WORDS for folder in folders):
            found = f"pictures of the splits {', '.join(sorted(folder[0] for folder in folders))} in one file"
            remedy = "put a metadata.jsonl of its own into each of these folders, with file names relative to it"
            raise QskdError(str(self._files[0]), found, "those of one split", remedy)

    def read(self, columns: Sequence[str], first: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, values of these columns) of each row, in order. where: file and row or line. first: the `where` of a row of a
        table, to begin there."""
        if self._files[0].suffix.lower() == ".jsonl":
            for number, line in enumerate(self._lines, 1):
                yield f"{self._files[0]}: line {number}", line
            return
        begin_in, _, begin_at = first.rpartition(_ROW)
        files = [str(path) for path in self._files]
        for path in self._files[files.index(begin_in) if first else 0 :]:
            number = int(begin_at) if first and str(path) == begin_in else 0
            for batch in self._told(path, columns, number):
                for row in batch:
                    yield f"{path}{_ROW}{number}", row
                    number += 1

    def _told(self, path: Path, columns: Sequence[str], first: int) -> Iterator[list[dict[str, Any]]]:
        batches = self._batches(path, list(columns), first)
        while True:
            try:
                batch = next(batches, None)
                rows = batch.to_pylist() if batch is not None else None
            except _READERS as error:
                raise _unreadable(path, error) from None
            if rows is None:
                return
            yield rows

    @staticmethod
    def _batches(path: Path, columns: list[str], first: int) -> Iterator[pa.RecordBatch]:
        """A file's rows from number `first` on. Mapped, for each helper of `prepare` begins again and again further on: what it
        passes is not read, and what it reads of a file in one piece is the system's cache, and not each one's memory."""
        if path.suffix.lower() == ".parquet":
            with pq.ParquetFile(path, memory_map=True) as file:
                if missing := set(columns) - set(file.schema_arrow.names):  # which Arrow would leave out without a word
                    raise ValueError(f"no column {', '.join(sorted(missing))}, which other files of the split have")
                groups = list(range(file.num_row_groups))
                while groups and first >= (rows := file.metadata.row_group(groups[0]).num_rows):
                    first -= rows
                    groups.pop(0)
                for batch in file.iter_batches(_TAKEN, groups, columns) if groups else ():
                    if first < len(batch):
                        yield batch.slice(first)
                    first = max(0, first - len(batch))
        else:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                for batch in stream:
                    if first >= len(batch):
                        first -= len(batch)
                        continue
                    batch.validate(full=True)  # offsets of an edited file would lead anywhere in memory
                    chosen = batch.select(columns)
                    yield from (chosen.slice(start, _TAKEN) for start in range(first, len(chosen), _TAKEN))
                    first = 0

    @staticmethod
    def _schema(path: Path) -> tuple[list[str], bytes]:
        """The columns' names, and what `datasets` notes of them."""
        try:
            if path.suffix.lower() == ".parquet":
                schema = pq.read_schema(path)
            else:
                with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
                    schema = stream.schema
            return [str(name) for name in schema.names], (schema.metadata or {}).get(b"huggingface", b"")
        except _READERS as error:
            raise _unreadable(path, error) from None

    def _features(self, noted: bytes) -> dict[str, Any]:
        """What `datasets` knows of the columns: names of classes, which column is an image."""
        value = parse_json(noted, f"{self._files[0]}: its `huggingface` metadata") if noted else None
        if value is None and (self.folder / "dataset_info.json").is_file():
            value = {"info": _json(self.folder / "dataset_info.json")}
        info = value.get("info") if isinstance(value, dict) else None
        features = info.get("features") if isinstance(info, dict) else None
        return features if isinstance(features, dict) else {}

    def _json_lines(self) -> Iterator[dict[str, Any]]:
        path = self._files[0]
        for number, line in enumerate(read_text(path, "metadata.jsonl", 2**30).split("\n"), 1):
            if line.strip():
                where = f"{path}: line {number}"
                value = parse_json(line, where, "one JSON object a line")
                if not isinstance(value, dict):
                    raise QskdError(where, f"a {type(value).__name__}", "one JSON object a line")
                yield value


def _unreadable(path: Path, error: Exception) -> QskdError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return QskdError(
        str(path), f"can't be read: {reason}", "a whole Parquet or Arrow file", "download or save it again"
    )
