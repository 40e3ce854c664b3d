"""Row groups that readers share: each is read from its store once, whoever asks, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_loader import Pictures

from pipelines.feed.stream import StreamConfig
from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.loader import BatchLoader
from qskd.datasets.manifest import load_manifest
from qskd.datasets.order.schedule import Schedule, split, training_batches
from qskd.datasets.shards import write_shards
from qskd.storage.parquet import ParquetFiles
from qskd.storage.scratch import SharedFolder
from qskd.storage.spool import RowGroupSpool

IMAGES, GROUP, WINDOW = 240, 8, 48


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> StreamConfig:
    uri = str(tmp_path_factory.mktemp("shards"))
    write_shards(Pictures(IMAGES), uri, rows_per_shard=24, rows_per_group=GROUP)
    manifest = load_manifest(uri)
    schedule = Schedule(manifest.shard_rows, (), 0, epochs=1, batch_size=4, window_images=WINDOW)
    row_bytes = sum(shard.bytes for shard in manifest.shards) / IMAGES
    return StreamConfig(uri, "", schedule, ViewConfig(), ResizeConfig(size=32), None, int(2 * WINDOW * row_bytes))


@pytest.mark.parametrize(("workers", "readers"), [(1, 1), (1, 2), (2, 2), (2, 8), (1, 16)])
def test_bytes_read_are_bytes_stored_whatever_the_readers(
    stream: StreamConfig, workers: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = ParquetFiles.read_table

    def counting(self: ParquetFiles, number: int, columns: Any, groups: Any = None) -> pa.Table:
        table = original(self, number, columns, groups)
        read.append(table.num_rows)
        return table

    monkeypatch.setattr(ParquetFiles, "read_table", counting)
    shared = replace(stream, share_rows=workers * readers > 1)
    loaders = [[shared.loader() for _ in range(readers)] for _ in range(workers)]
    plain = replace(stream, keep_bytes=2**30).loader()
    seen = 0
    for number, batch in enumerate(training_batches(stream.schedule, 0)):
        for rank, own in enumerate(loaders):
            rows = split(batch.rows, workers, rank)
            found = own[number // 3 % readers].load("train", rows)  # each reader has every so manieth range of steps
            before = len(read)
            for name, array in plain.load("train", rows).items():
                np.testing.assert_array_equal(found[name], array, err_msg=name)
            del read[before:]
            seen += len(rows)
    assert seen == IMAGES
    assert sum(read) / IMAGES <= 1.1
    asked, unheld = (sum(getattr(each, name) for own in loaders for each in own) for name in
                     ("rows_requested", "rows_not_in_memory"))  # fmt: skip
    assert asked == IMAGES
    assert 0 < unheld < IMAGES


def _ask(name: str, count: Any, barrier: Any) -> None:
    spool = RowGroupSpool(name, 2**30)

    def read() -> pa.Table:
        with count.get_lock():
            count.value += 1
        return pa.table({"image_id": [1, 2, 3]})

    barrier.wait()
    for group in range(20):
        assert spool.table("a shard", group, ["image_id"], read)[0].column("image_id").to_pylist() == [1, 2, 3]
    barrier.wait()
    spool.close()


def test_processes_that_ask_at_once_read_a_group_once_and_leave_nothing(temporary: Path) -> None:
    context: Any = multiprocessing.get_context("fork")
    count, barrier = context.Value("i", 0), context.Barrier(3)
    processes = [context.Process(target=partial(_ask, "data", count, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert count.value == 20
    assert list(temporary.iterdir()) == []


def test_the_oldest_groups_go_when_there_are_too_many_bytes(temporary: Path) -> None:
    spool = RowGroupSpool("data", 200_000)
    for group in range(64):
        if group == 60:
            time.sleep(0.05)  # a file's time of writing is not exact
        spool.table("a shard", group, ["x"], lambda: pa.table({"x": np.zeros(2500)}))  # 20 kB
    (folder,) = temporary.iterdir()
    assert 100_000 < sum(path.stat().st_size for path in folder.glob("*.arrow")) < 250_000
    read: list[int] = []
    again = RowGroupSpool("data", 200_000)
    again.table("a shard", 63, ["x"], lambda: read.append(63) or pa.table({"x": [0.0]}))  # type: ignore[func-returns-value]
    again.table("a shard", 0, ["x"], lambda: read.append(0) or pa.table({"x": [0.0]}))  # type: ignore[func-returns-value]
    assert read == [0]
    spool.close()
    assert folder.is_dir()
    again.close()
    assert not folder.exists()


def test_a_full_disk_costs_only_reading_again(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = RowGroupSpool("data", 2**30)

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pa, "OSFile", full)
    table, read_now = spool.table("a shard", 0, ["x"], lambda: pa.table({"x": [1.0]}))
    assert read_now
    assert table.column("x").to_pylist() == [1.0]


def test_the_last_reader_deletes_what_they_shared_and_nothing_of_others(temporary: Path) -> None:
    name = SharedFolder("data").path.name
    link = temporary / name
    for path in temporary.iterdir():
        path.rmdir()
    notes = temporary.parent / "notes"
    notes.mkdir()
    (notes / "letter.txt").write_text("mine")
    link.symlink_to(notes)  # another's link: a folder of this process alone is used
    spool = RowGroupSpool("data", 2**30)
    spool.table("a shard", 0, ["x"], lambda: pa.table({"x": [1.0]}))
    spool.close()
    assert [path.name for path in notes.iterdir()] == ["letter.txt"]
    assert [path.name for path in temporary.iterdir()] == [name]
    link.unlink()
    link.mkdir(mode=0o755)  # not as we make it
    (link / "letter.txt").write_text("mine")
    RowGroupSpool("data", 2**30).close()
    assert (link / "letter.txt").read_text() == "mine"
    os.chmod(link, 0o700)  # as we make it, with a file that is none of ours
    RowGroupSpool("data", 2**30).close()
    assert (link / "letter.txt").read_text() == "mine"


def test_readers_of_other_columns_and_of_another_version_of_a_file_are_not_mixed() -> None:
    spool = RowGroupSpool("data", 2**30)
    one = spool.table("shard 8 bytes", 0, ["x"], lambda: pa.table({"x": [1]}))[0]
    other = spool.table("shard 8 bytes", 0, ["x", "y"], lambda: pa.table({"x": [1], "y": [2]}))[0]
    changed = spool.table("shard 9 bytes", 0, ["x"], lambda: pa.table({"x": [3]}))[0]
    assert [each.num_columns for each in (one, other, changed)] == [1, 2, 1]
    assert changed.column("x").to_pylist() == [3]
    spool.close()


def test_a_loader_without_others_keeps_its_rows_itself(stream: StreamConfig, temporary: Path) -> None:
    assert isinstance(stream.loader(), BatchLoader)
    assert list(temporary.iterdir()) == []


def test_a_folder_that_was_cleared_away_costs_reading_again_and_no_run(temporary: Path) -> None:
    """As some machines do with what is old in the folder for temporary files."""
    table, reader = pa.table({"x": [1.0]}), RowGroupSpool("data", 1_000_000)
    assert reader.table("a shard", 0, ["x"], lambda: table)[1]
    shutil.rmtree(reader._folder.path)
    for group in range(1, 40):  # it would be tidied meanwhile
        found, read_now = reader.table("a shard", group, ["x"], lambda: table)
        assert (found.equals(table), read_now) == (True, True)
    reader.close()
    assert list(temporary.iterdir()) == []


def _deleted_but_mapped(folder: Path) -> int:
    """Bytes of deleted files that this process still maps: their room on the disk isn't free."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line and line.endswith("(deleted)"):
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            total += end - begin
    return total


def test_what_a_reader_holds_is_bounded_in_bytes_in_memory_and_of_deleted_files(temporary: Path) -> None:
    limit, group_bytes = 2_000_000, 200_000
    first, second = RowGroupSpool("data", limit), RowGroupSpool("data", limit)

    def read() -> pa.Table:
        return pa.table({"x": pa.array([1.0] * (group_bytes // 8))})  # in Arrow's memory, as what is read of Parquet

    before = pa.total_allocated_bytes()
    for group in range(100):
        assert first.table("a shard", group, ["x"], read)[1]
        assert not second.table("a shard", group, ["x"], read)[1]
    assert pa.total_allocated_bytes() - before <= group_bytes  # what the first read is mapped, as it is by the second
    assert _deleted_but_mapped(temporary) <= 2 * 1.1 * limit  # of two readers
    for reader in (first, second):
        assert 0 < reader._mapped.held_bytes <= limit
    assert not first.table("a shard", 99, ["x"], read)[1]
    first.close()
    second.close()
    assert _deleted_but_mapped(temporary) == 0
