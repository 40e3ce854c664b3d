"""What reaches a worker: the same pixels whoever makes them, in the background too; and a word when data come too slowly."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_loader import Pictures

from pipelines.cluster.room import reader_cpus, readers_each
from pipelines.feed.hunger import Hunger, enough_readers
from pipelines.feed.on_device import ready_shares
from pipelines.feed.stream import LOADER_ROWS, StreamConfig, local_stream
from qskd.config import ComputeConfig, ResizeConfig, TrainingConfig, ViewConfig
from qskd.datasets.batch import TrainBatch, images_of, parts_of, train_batch
from qskd.datasets.manifest import load_manifest
from qskd.datasets.order.schedule import Schedule
from qskd.datasets.shards import write_shards
from qskd.structures import tensors_of

VIEWS = ViewConfig(seed=5, count=2, crop_probability=0.5)
SMALL = ResizeConfig(mode="shortest_edge", size=24, longest=60)
LARGE = ResizeConfig(mode="shortest_edge", size=90, longest=200)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> StreamConfig:
    """Eleven steps of two images or one, evaluations between them; other sizes for student and teacher."""
    uri = str(tmp_path_factory.mktemp("shards"))
    write_shards(Pictures(11), uri, rows_per_shard=4, rows_per_group=2)
    rows = load_manifest(uri).shard_rows
    schedule = Schedule(rows, rows, seed=1, epochs=2, batch_size=4, window_images=8, views=2)
    return StreamConfig(uri, uri, schedule, VIEWS, SMALL, LARGE)


def same(one: TrainBatch, other: TrainBatch) -> bool:
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return one.targets.counts == other.targets.counts and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("teacher", [None, SMALL, LARGE])
@pytest.mark.parametrize("micro", [0, 1, 3])
def test_pixels_made_on_the_device_are_those_the_reader_would_have_made(
    stream: StreamConfig, teacher: ResizeConfig | None, micro: int
) -> None:
    made = replace(stream, teacher_resize=teacher)
    config = TrainingConfig(batch_size=4, micro_batch_size=micro)
    for finished, shipped in zip(local_stream(made), local_stream(replace(made, finish=False)), strict=True):
        assert "images" not in shipped.arrays
        if shipped.subset == "val":
            found, expected = (images_of(each.arrays) for each in (shipped, finished))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            continue
        parts, expected_parts = (parts_of(each.arrays, config, 1) for each in (shipped, finished))
        assert len(parts) == (-(-4 // micro) if micro else 1)
        for part, wanted in zip(parts, expected_parts, strict=True):
            own = train_batch(part)
            if micro:  # a part is padded to its own largest image, not to the batch's
                wanted = {**wanted, **cropped(wanted)}
            assert same(own, train_batch(wanted))


def cropped(arrays: Any) -> dict[str, np.ndarray]:
    found = {}
    for prefix in ("", "teacher_"):
        if f"{prefix}images" in arrays:
            sizes = arrays[f"{prefix}sizes"]
            high, wide = sizes.max(axis=0).tolist() if len(sizes) else (1, 1)
            found[f"{prefix}images"] = arrays[f"{prefix}images"][:, :high, :wide]
    return found


def test_a_share_without_images_has_empty_pixels_on_the_device_too(stream: StreamConfig) -> None:
    small = replace(stream, schedule=replace(stream.schedule, batch_size=2), finish=False)
    share = next(local_stream(small, 0, 3, 0))
    assert len(share.arrays["image_ids"]) == 0
    assert train_batch(share.arrays).images.shape == (0, 1, 1, 3)
    assert [
        len(part["cuts"]) for part in parts_of(share.arrays, TrainingConfig(batch_size=4, micro_batch_size=1), 2)
    ] == [0, 0]


def test_a_thread_makes_the_tensors_and_they_are_those_of_the_step(stream: StreamConfig) -> None:
    config, seen = TrainingConfig(batch_size=4, micro_batch_size=2), set[str]()

    def noted() -> Any:
        for share in local_stream(stream):
            seen.add(threading.current_thread().name)
            share.arrays[LOADER_ROWS] = np.array([3, 1])
            yield share

    ready = list(ready_shares(noted(), config, 1, CPU))
    assert seen != {threading.current_thread().name}
    for found, share in zip(ready, local_stream(stream), strict=True):
        assert found.loader_rows is not None
        assert (found.share.subset, found.share.index) == (share.subset, share.index)
        expected = [train_batch(part) for part in parts_of(share.arrays, config, 1)] if share.subset == "train" else []
        assert len(found.wait()) == len(expected)
        assert all(same(a, b) for a, b in zip(found.wait(), expected, strict=True))


def test_an_error_of_a_reader_reaches_the_step(stream: StreamConfig) -> None:
    def broken() -> Any:
        yield next(local_stream(stream))
        raise ValueError("a broken picture")

    ready = ready_shares(broken(), TrainingConfig(batch_size=4), 1, CPU)
    next(ready)
    with pytest.raises(ValueError, match="a broken picture"):
        next(ready)


def test_starving_is_said_once_with_the_readers_that_would_be_enough() -> None:
    def rows(first: int, *shares: float) -> list[tuple[int, dict[str, float]]]:
        return [(first + 20 * i, {"speed/loader_wait_share": share}) for i, share in enumerate(shares)]

    hunger = Hunger(2, "worker 3")
    assert hunger.look(rows(20, 0.9, 0.9)) == ""  # the readers are starting
    assert hunger.look(rows(60, 0.1, 0.2)) == ""
    said = hunger.look(rows(100, 0.7, 0.8))
    assert "worker 3 waited for data 75% of its time with 2 reader(s)" in said
    assert "compute.loader_workers=8 would be enough" in said
    assert hunger.look(rows(140, 0.9)) == ""
    # so many readers give what is used: rate with n readers is n / (n0 (1 - share)) of the rate that is wanted, n0 of them here
    for readers in (1, 3, 5):
        for share in (0.25, 0.5, 0.93):
            enough = enough_readers(readers, share)
            assert enough * (1 - share) >= readers - 1e-9 > (enough - 1) * (1 - share) - 1e-9


def test_readers_follow_the_cpus_beside_gpus_and_the_recipe_where_it_says() -> None:
    auto, told = ComputeConfig(workers=8), ComputeConfig(workers=8, loader_workers=3)
    assert [readers_each(auto, True, cpus) for cpus in (0, 4, 16, 40, 1000)] == [1, 1, 2, 5, 8]
    assert readers_each(auto, False, 64) == 1
    assert readers_each(told, True, 4) == readers_each(told, False, 4) == 3
    assert reader_cpus(auto, True, 8, 96) == 1
    for cpus in (2, 4, 7):  # one for each worker finds room
        assert 8 * reader_cpus(auto, True, 8, cpus) <= cpus


def test_images_are_dealt_by_aspect_and_the_batch_stays_what_it_is(stream: StreamConfig) -> None:
    schedule = replace(stream.schedule, batch_size=8, epochs=4)
    dealt, plain = (replace(stream, schedule=schedule, teacher_resize=None, by_aspect=by) for by in (True, False))
    padded = {True: 0, False: 0}
    for config, by in ((dealt, True), (plain, False)):
        for shares in zip(*(local_stream(config, 0, 4, rank) for rank in range(4)), strict=True):
            for share in shares:
                padded[by] += share.arrays["images"][..., 0].size if share.subset == "train" else 0
    real = 0
    whole = [share for share in local_stream(plain) if share.subset == "train"]
    parts = [list(local_stream(dealt, 0, 4, rank)) for rank in range(4)]
    for batch, *shares in zip(whole, *([s for s in part if s.subset == "train"] for part in parts), strict=True):
        ids = np.concatenate([share.arrays["image_ids"] for share in shares])
        assert sorted(ids.tolist()) == sorted(batch.arrays["image_ids"].tolist())
        sizes = np.concatenate([share.arrays["sizes"] for share in shares])
        aspect = sizes[:, 0] / sizes[:, 1]
        assert (np.diff(aspect) >= 0).all()
        assert sum(share.arrays["counts"].sum() for share in shares) == batch.arrays["counts"].sum()
        real += int(sizes.prod(axis=1).sum())
    assert real <= padded[True] < real + 0.6 * (padded[False] - real)


def test_sizes_are_known_before_a_picture_is_read(stream: StreamConfig) -> None:
    loader = stream.loader()
    for share in local_stream(replace(stream, teacher_resize=None)):
        rows = np.column_stack([share.arrays["positions"], share.arrays["views"]])
        np.testing.assert_array_equal(loader.sizes(share.subset, rows), share.arrays["sizes"])
