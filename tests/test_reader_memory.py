"""A reader writes block after block into the same memory, but never into that of a block somebody still holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.feed import readers
from pipelines.feed.packing import unpack
from pipelines.feed.readers import RangeReader
from pipelines.feed.stream import StreamConfig
from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.manifest import load_manifest
from qskd.datasets.order.schedule import Schedule
from qskd.datasets.shards import write_shards
from tests.test_loader import Pictures


@pytest.fixture
def config(tmp_path: Path) -> StreamConfig:
    write_shards(Pictures(24), str(tmp_path), rows_per_shard=8, rows_per_group=4)
    schedule = Schedule(load_manifest(str(tmp_path)).shard_rows, (), 0, epochs=2, batch_size=4, window_images=8)
    return StreamConfig(
        str(tmp_path), "", schedule, ViewConfig(), ResizeConfig(size=32), None, keep_bytes=0, finish=False
    )


def tables(config: StreamConfig) -> list[pa.Table]:
    ranges = [{"subset": "train", "epoch": 0, "first": at, "last": at + 1} for at in range(6)]
    return [pa.Table.from_pylist([steps]) for steps in ranges]


def payload(block: pa.Table) -> bytes:
    return block["payload"][0].as_py()


def place(block: pa.Table) -> int:
    return block["payload"].chunk(0).buffers()[2].address


def test_blocks_that_are_held_stay_what_they_were(config: StreamConfig) -> None:
    reader = RangeReader(config, 1, 0)
    held = [block for table in tables(config) for block in reader(table)]
    assert len({place(block) for block in held}) == len(held)
    for table, block in zip(tables(config), held, strict=True):
        (expected,) = RangeReader(config, 1, 0)(table)
        assert payload(block) == payload(expected)


def test_memory_that_nobody_holds_is_used_again(config: StreamConfig) -> None:
    reader, places, found = RangeReader(config, 1, 0), set[int](), list[bytes]()
    for table in tables(config):
        for block in reader(table):
            places.add(place(block))
            found.append(payload(block))
            del block
    assert len(places) == 1
    assert found == [payload(block) for table in tables(config) for block in RangeReader(config, 1, 0)(table)]


def test_a_slice_of_a_block_holds_its_memory(config: StreamConfig) -> None:
    reader = RangeReader(config, 1, 0)
    first, second = tables(config)[:2]
    (block,) = reader(first)
    pixels = np.frombuffer(block["payload"].chunk(0).buffers()[2], np.uint8)
    before = pixels.copy()
    del block
    for _ in reader(second):
        pass
    np.testing.assert_array_equal(pixels, before)


def test_a_block_larger_than_expected_gets_the_room_it_needs(
    config: StreamConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arrays(reader: RangeReader) -> list[dict[str, np.ndarray]]:
        return [unpack(np.frombuffer(payload(block), np.uint8)) for table in tables(config) for block in reader(table)]

    expected = arrays(RangeReader(config, 1, 0))
    monkeypatch.setattr(readers, "RANGE_BYTES", 100)
    for found, wanted in zip(arrays(RangeReader(config, 1, 0)), expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, wanted[name])
