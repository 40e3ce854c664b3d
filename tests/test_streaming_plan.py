"""The stream's plan, without Ray: ranges that cover the schedule, and arrays that come out of a buffer as they went in."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.feed.packing import pack, unpack
from pipelines.feed.stream import MAX_RANGE, RANGE_BYTES, StreamConfig, local_stream
from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.coco import read_coco
from qskd.datasets.manifest import load_manifest
from qskd.datasets.order.schedule import Batch, Schedule, split, stream
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.datasets.shards import write_shards

SCHEDULES = {
    "plain": Schedule((30, 25), (9, 4), 3, epochs=3, batch_size=4, window_images=20),
    "rare evaluation": Schedule((30,), (9,), 0, epochs=5, batch_size=7, window_images=20, evaluate_every_epochs=2),
    "no validation": Schedule((30,), (), 0, epochs=2, batch_size=4, window_images=20),
    "batch larger than the data": Schedule((3,), (2,), 0, epochs=2, batch_size=8, window_images=20),
    "other evaluation batch": Schedule(
        (30,), (50,), 0, epochs=2, batch_size=8, window_images=9, evaluation_batch_size=3
    ),
    "many views": Schedule((500,), (7,), 0, epochs=3, batch_size=4, window_images=50, views=3),
}


def plan(schedule: Schedule, size: int = 320, teacher: ResizeConfig | None = None, uri: str = "") -> StreamConfig:
    return StreamConfig(uri, uri, schedule, ViewConfig(count=schedule.views), ResizeConfig(size=size), teacher)


def facts(batch: Batch) -> tuple[object, ...]:
    return batch.subset, batch.step, batch.epoch, batch.index, batch.count, batch.rows.tolist()


# ---- pack and unpack

ARRAYS: dict[str, np.ndarray] = {
    "images": np.arange(2 * 3 * 5 * 3, dtype=np.uint8).reshape(2, 3, 5, 3),
    "no objects": np.zeros((2, 0, 4), np.float32),
    "no images": np.zeros((0, 1, 1, 3), np.uint8),
    "number": np.array(7, np.int64),
    "bools": np.array([True, False, True]),
    "halves": np.linspace(0, 1, 7, dtype=np.float16),
    "0/é name": np.array([-1, 2**40], np.int64),
    "doubles": np.array([[np.nan, np.inf, -0.0]]),
}


def test_arrays_come_out_as_they_went_in() -> None:
    found = unpack(np.frombuffer(pack(ARRAYS), np.uint8))
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(60).reshape(3, 4, 5)[:, ::2, ::-1],
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.broadcast_to(np.arange(4), (3, 4)),
    ],
)
def test_arrays_that_are_not_contiguous_are_packed_by_value(array: np.ndarray) -> None:
    np.testing.assert_array_equal(unpack(np.frombuffer(pack({"a": array}), np.uint8))["a"], array)


def test_no_arrays_are_packed_too() -> None:
    assert unpack(np.frombuffer(pack({}), np.uint8)) == {}


def test_unpacked_arrays_are_aligned_views_of_the_buffer() -> None:
    buffer = np.frombuffer(pack(ARRAYS), np.uint8)
    base = buffer.ctypes.data
    for name, array in unpack(buffer).items():
        assert array.size == 0 or np.shares_memory(array, buffer), name
        assert (array.ctypes.data - base) % 64 == 0, name


# ---- ranges


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ranges_cover_the_schedule_exactly_from_any_step(name: str, world_size: int) -> None:
    schedule = SCHEDULES[name]
    config = plan(schedule, size=1000)  # blocks of a few steps
    steps = range(schedule.total_steps + 1) if schedule.total_steps < 60 else (0, 1, 124, 125, 126, 374, 375)
    for start in steps:
        found = [facts(batch) for part in config.ranges(start, world_size) for batch in config.batches(part)]
        assert found == [facts(batch) for batch in stream(schedule, start)]


def test_blocks_of_an_evaluation_with_its_own_batch_size_hold_no_more_pixels_than_those_of_training() -> None:
    schedule = Schedule((4000,), (4000,), 0, epochs=1, batch_size=4, window_images=50, evaluation_batch_size=64)
    found = plan(schedule)
    longest = {"train": 0, "val": 0}
    for steps in found.ranges(0, 1):
        longest[steps["subset"]] = max(longest[steps["subset"]], steps["last"] - steps["first"])
    assert longest["train"] * 4 * 3 * 320**2 <= RANGE_BYTES
    assert longest["val"] * 64 * 3 * 320**2 <= RANGE_BYTES
    assert longest["train"] > longest["val"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_range_crosses_an_epoch_or_the_border_between_training_and_evaluation(name: str) -> None:
    config = plan(SCHEDULES[name], size=100)
    ranges = list(config.ranges(0, 1))
    for steps in ranges:
        batches = list(config.batches(steps))
        assert {(batch.subset, batch.epoch) for batch in batches} == {(steps["subset"], steps["epoch"])}
        assert [batch.index for batch in batches] == list(range(steps["first"], steps["last"]))
        assert len(batches) <= config.range_length(1)
    for _, part in itertools.groupby(ranges, key=lambda steps: (steps["subset"], steps["epoch"])):
        lengths = [steps["last"] - steps["first"] for steps in part]
        assert set(lengths[:-1]) <= {config.range_length(1)}  # only the last of a part may be short


@pytest.mark.parametrize("size", [16, 64, 320, 640, 5000])
@pytest.mark.parametrize("teacher", [None, ResizeConfig(mode="shortest_edge", size=480, longest=800)])
def test_the_pixels_of_a_range_stay_within_bounds(size: int, teacher: ResizeConfig | None) -> None:
    config = plan(SCHEDULES["plain"], size, teacher)
    length = config.range_length(1)
    assert 1 <= length <= MAX_RANGE
    pixels = size * size + (480 * 720 if teacher else 0)
    assert length == 1 or length * 3 * pixels * 4 <= RANGE_BYTES
    assert config.range_length(4) >= length  # a smaller share leaves room for more steps


def test_ranges_from_the_end_are_none() -> None:
    for schedule in SCHEDULES.values():
        assert list(plan(schedule).ranges(schedule.total_steps, 1)) == []


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_stretches_joined_are_the_ranges_and_none_is_too_long(count: int) -> None:
    config = replace(plan(SCHEDULES["many views"], size=1000), stretch_ranges=count)
    for start in (0, 1, 200, 374):
        stretches = list(config.stretches(start, 2))
        assert [steps for stretch in stretches for steps in stretch] == list(config.ranges(start, 2))
        assert {len(stretch) for stretch in stretches[:-1]} <= {count}
        assert 0 < len(stretches[-1]) <= count


def test_a_long_schedule_s_first_stretch_does_not_wait_for_its_last() -> None:
    # A billion images, a hundred epochs: some 10^9 ranges that no one could list.
    schedule = Schedule((10**6,) * 1000, (8,), 0, epochs=100, batch_size=64, window_images=4096)
    stretch = next(plan(schedule, size=1000).stretches(schedule.total_steps // 2, 1))
    assert len(stretch) == 4096
    assert stretch[0]["epoch"] == 50


# ---- the stream in one process


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    annotations, images = make_shapes(ShapesConfig(images=14, size=48), folder / "coco")
    write_shards(read_coco(annotations, images), str(folder / "shards"), rows_per_shard=5)
    return str(folder / "shards")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_local_stream_is_the_loader_s_batches_in_order(uri: str, world_size: int) -> None:
    rows = load_manifest(uri).shard_rows
    schedule = Schedule(rows, rows, 1, epochs=2, batch_size=4, window_images=6, views=2)
    config = plan(schedule, size=32, teacher=ResizeConfig(size=48), uri=uri)
    loader = config.loader()
    for start in (0, 2, schedule.steps_per_epoch, schedule.total_steps - 1):
        for rank in range(world_size):
            shares = list(local_stream(config, start, world_size, rank))
            batches = list(stream(schedule, start))
            assert len(shares) == len(batches)
            for share, batch in zip(shares, batches, strict=True):
                own = (share.subset, share.epoch, share.index, share.count, share.is_last)
                assert own == (batch.subset, batch.epoch, batch.index, batch.count, batch.is_last)
                expected = loader.load(batch.subset, split(batch.rows, world_size, rank))
                assert share.arrays.keys() == expected.keys()
                for name, array in expected.items():
                    np.testing.assert_array_equal(share.arrays[name], array, err_msg=name)


def test_workers_shares_joined_are_one_worker_s_batches(uri: str) -> None:
    rows = load_manifest(uri).shard_rows
    config = plan(Schedule(rows, rows, 1, epochs=1, batch_size=5, window_images=6), size=32, uri=uri)
    parts = [list(local_stream(config, 0, 3, rank)) for rank in range(3)]
    for whole, *shares in zip(local_stream(config), *parts, strict=True):
        ids = np.concatenate([share.arrays["image_ids"] for share in shares])
        np.testing.assert_array_equal(ids, whole.arrays["image_ids"])
        images = np.concatenate([share.arrays["images"] for share in shares if len(share.arrays["image_ids"])])
        np.testing.assert_array_equal(images, whole.arrays["images"])


def test_the_plan_needs_no_ray() -> None:
    code = "import sys, pipelines.feed.stream; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    root = Path(__file__).parents[1]
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert printed.strip() == "[]"
