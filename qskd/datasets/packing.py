"""Samples -> shard files in a folder of this machine, one after the other, in this process or by helpers on every core.

The files are the same byte for byte. Helpers look at pictures `PART` at a time; what they find comes together here in the dataset's
order, which says which images make a shard; and a helper writes it, reading its pictures again, from the system's cache as a rule.
So no picture passes between processes, and a broken one moves the later shards' limits as it does without helpers.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from qskd.datasets.findings.survey import Survey
from qskd.datasets.pictures.facts import Exif, PictureCounter
from qskd.datasets.pictures.helpers import Helpers
from qskd.datasets.pictures.reader import Examined, Part, PictureReader, Stamp
from qskd.datasets.samples import SCHEMA, Sample, to_table
from qskd.storage.files import sha256_of

PART = 64  # images: a fifth of a second's work
FEWEST = 512  # images a helper is started for: starting takes as long as 150


@dataclass(frozen=True)
class Packed:
    """A file that is whole, with its rows and bytes. It may be moved away."""

    path: Path
    rows: int
    bytes: int
    sha256: str


class PartedSource(Protocol):
    """A source whose pictures helpers can look at (`qskd.datasets.pictures.listed_dataset`)."""

    @property
    def picture_reader(self) -> PictureReader: ...
    @property
    def others_say(self) -> Exif: ...
    def parts(self, images: int) -> Iterator[Part]: ...
    def took(self, part: Part, examined: Examined) -> None: ...


def cores() -> int:
    """Those that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # a container's share
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return allowed


def _writer(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, SCHEMA, compression="NONE", use_dictionary=False, write_page_checksum=True)


def _whole(path: Path, rows: int) -> Packed:
    return Packed(path, rows, path.stat().st_size, sha256_of(path.open("rb")))


def pack_here(
    samples: Iterator[Sample], folder: Path, rows_per_shard: int, rows_per_group: int, grown: Callable[[], None]
) -> Iterator[Packed]:
    """grown: called when some rows more are written."""
    path = folder / "shard"
    while first := next(samples, None):
        rows, shard_samples = 0, chain([first], islice(samples, rows_per_shard - 1))
        with _writer(path) as writer:
            while group := list(islice(shard_samples, rows_per_group)):
                writer.write_table(to_table(group))
                rows += len(group)
                grown()
        yield _whole(path, rows)


@dataclass(frozen=True)
class _Rows:
    """Images that were looked at: their samples but for the pictures, and where these are."""

    table: pa.Table
    located: Sequence[Any]
    stamps: Sequence[Stamp]

    def cut(self, start: int, stop: int | None = None) -> _Rows:
        own = slice(start, stop)
        located = self.located[own]
        return _Rows(self.table.slice(start, len(located)), located, self.stamps[own])

    @staticmethod
    def joined(parts: Sequence[_Rows]) -> _Rows:
        located, stamps = [at for one in parts for at in one.located], [stamp for one in parts for stamp in one.stamps]
        return _Rows(pa.concat_tables([one.table for one in parts]).combine_chunks(), located, stamps)


def examine(reader: PictureReader, part: Part) -> Examined:
    """In a helper: look at a part's pictures."""
    return reader.examine(part)


def write(reader: PictureReader, path: Path, rows: _Rows, rows_per_group: int) -> Packed:
    """In a helper: write a shard."""
    column = SCHEMA.get_field_index("encoded")
    with _writer(path) as writer:
        for start in range(0, rows.table.num_rows, rows_per_group):
            group = rows.cut(start, start + rows_per_group)
            encoded = reader.encoded(group.table.column("file_name").to_pylist(), group.located, group.stamps)
            writer.write_table(group.table.set_column(column, SCHEMA.field(column), encoded))
    return _whole(path, rows.table.num_rows)


def pack_by(
    helpers: Helpers,
    dataset: PartedSource,
    folder: Path,
    rows_per_shard: int,
    rows_per_group: int,
    seen: tuple[Survey, PictureCounter],
    grown: Callable[[], None],
) -> Iterator[Packed]:
    """seen: gets what is in the samples. grown: called when some images more are looked at."""
    parts, others_say = dataset.parts(PART), None
    ahead, writing = deque[tuple[Part, Future[Examined]]](), deque[Future[Packed]]()
    left, count, number = list[_Rows](), 0, 0

    def write_first(rows: int) -> None:
        nonlocal left, count, number
        joined = _Rows.joined(left)
        path = folder / f"shard-{number}"
        writing.append(helpers.ask(write, path, joined.cut(0, rows), rows_per_group))
        left, count, number = [joined.cut(rows)], count - rows, number + 1

    while True:
        while len(ahead) < 3 * helpers.count and (part := next(parts, None)):
            part = replace(part, others_say=others_say)
            ahead.append((part, helpers.ask(examine, part)))
        if not ahead:
            break
        part, future = ahead.popleft()
        examined = future.result()
        if examined.undecided:
            others_say = dataset.others_say
            part = replace(part, others_say=others_say)
            ahead.appendleft((part, helpers.ask(examine, part)))
            continue
        dataset.took(part, examined)
        seen[0].absorb(examined.survey)
        seen[1].counts += examined.counter.counts
        grown()
        if examined.table is not None:
            left.append(_Rows(examined.table, examined.located, examined.stamps))
            count += len(examined.stamps)
        while count >= rows_per_shard:
            write_first(rows_per_shard)
        while writing and (writing[0].done() or len(writing) > helpers.count):
            yield writing.popleft().result()
    if count:
        write_first(count)
    for last in writing:
        yield last.result()


def start_helpers(dataset: object, images: int, processes: int) -> Helpers | None:
    """As many as are worth starting, at most `processes`; None where that is none."""
    count = min(processes, images // FEWEST)
    reader: PictureReader | None = getattr(dataset, "picture_reader", None)
    if count < 2 or not sys.executable or reader is None:
        return None
    try:
        return Helpers(count, reader)
    except OSError:  # the system starts no more processes
        return None
