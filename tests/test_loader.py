"""Batches: padded right, targets of the same view as the pixels, every row once, cheap the second time."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.coco import read_coco
from qskd.datasets.loader import BatchLoader, label_index
from qskd.datasets.manifest import load_manifest
from qskd.datasets.order.schedule import Schedule, Subset, split, stream, training_batches
from qskd.datasets.pictures.cuts import Plan
from qskd.datasets.pictures.joining import pad
from qskd.datasets.samples import Category, Sample
from qskd.datasets.shards import ShardReader, write_shards
from qskd.datasets.views import View, make_view, view_boxes, view_image
from qskd.errors import QskdError

REAL = Path(__file__).parents[2] / "shared" / "coco-sample"
VIEWS = ViewConfig(seed=5, count=4, crop_probability=0.5)
SQUARE = ResizeConfig(size=32)
KEEP_ASPECT = ResizeConfig(mode="shortest_edge", size=24, longest=60)


class Pictures:
    """`count` pictures of varied sizes; number n has n % 4 objects, of which the last is a crowd when there are three."""

    source, source_sha256 = "made.json", "0" * 64
    categories: tuple[Category, ...] = (Category(3, "three"), Category(8, "eight"), Category(9, "nine"))
    problems: list[dict[str, str]] = []  # noqa: RUF012

    def __init__(self, count: int, spoiled: int = -1) -> None:
        self.count, self.spoiled = count, spoiled

    def __len__(self) -> int:
        return self.count

    def samples(self) -> Iterator[Sample]:
        for number in range(self.count):
            rng = np.random.default_rng(number)
            width, height = (int(v) for v in rng.integers(30, 70, 2))
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
            encoded = buffer.getvalue()
            objects = number % 4
            low = rng.uniform(0, 20, (objects, 2))
            boxes_xyxy = np.concatenate([low, low + rng.uniform(2, 10, (objects, 2))], axis=1).astype(np.float32)
            ids, area = rng.choice([3, 8, 9], objects), np.ones(objects, np.float32)
            crowd = np.arange(objects) == 2
            encoded = encoded[: len(encoded) // 2] if number == self.spoiled else encoded
            name = f"{number}.png"
            yield Sample(100 + number, name, width, height, encoded, boxes_xyxy, ids, area, crowd)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("shards"))
    write_shards(Pictures(22), folder, rows_per_shard=8, rows_per_group=3)
    return folder


def loader(uri: str, **options: Any) -> BatchLoader:
    return BatchLoader(uri, uri, VIEWS, **{"student_resize": SQUARE, **options})


def rows_of(*rows: tuple[int, int, int]) -> np.ndarray:
    return np.array(rows, np.int32).reshape(-1, 3)


def test_a_batch_is_each_view_made_by_hand(uri: str) -> None:
    rows = rows_of((0, 3, 1), (2, 5, 0), (1, 7, 3), (0, 3, 2))
    batch = loader(uri, student_resize=KEEP_ASPECT, teacher_resize=SQUARE).load("train", rows)
    samples, manifest = list(Pictures(22).samples()), load_manifest(uri)
    for i, (shard, row, index) in enumerate(rows.tolist()):
        sample = samples[shard * 8 + row]
        pixels = np.asarray(Image.open(io.BytesIO(sample.encoded)))
        view = make_view(VIEWS, sample.image_id, index)
        expected = view_image(pixels, view, KEEP_ASPECT)
        h, w = batch["sizes"][i]
        assert (h, w) == expected.shape[:2]
        np.testing.assert_array_equal(batch["images"][i, :h, :w], expected)
        assert not batch["images"][i, h:].any()
        assert not batch["images"][i, :, w:].any()
        np.testing.assert_array_equal(batch["teacher_images"][i], view_image(pixels, view, SQUARE))
        one = ~sample.iscrowd
        boxes, kept = view_boxes(sample.boxes_xyxy[one], sample.width, sample.height, view, VIEWS.min_visible)
        count = batch["counts"][i]
        assert count == len(kept)
        np.testing.assert_array_equal(batch["boxes_cxcywh"][i, :count], boxes)
        labels = [manifest.category_index[c] for c in sample.category_ids[one][kept].tolist()]
        assert batch["labels"][i, :count].tolist() == labels
        assert not batch["boxes_cxcywh"][i, count:].any()
        assert not batch["labels"][i, count:].any()
        assert batch["original_sizes"][i].tolist() == [sample.height, sample.width]
        assert batch["image_ids"][i] == sample.image_id
    assert batch["images"].shape[1:3] == tuple(batch["sizes"].max(axis=0))
    np.testing.assert_array_equal(batch["positions"], rows[:, :2])
    np.testing.assert_array_equal(batch["views"], rows[:, 2])


def test_an_empty_batch_has_every_array(uri: str) -> None:
    full = loader(uri, teacher_resize=KEEP_ASPECT).load("train", rows_of((0, 1, 0)))
    kinds: tuple[Subset, ...] = ("train", "val")
    for kind in kinds:
        empty = loader(uri, teacher_resize=KEEP_ASPECT).load(kind, rows_of())
        assert {name: (a.dtype, a.ndim) for name, a in empty.items()} == {n: (a.dtype, a.ndim) for n, a in full.items()}
        assert all(len(array) == 0 for array in empty.values())
        assert empty["images"].shape == empty["teacher_images"].shape == (0, 1, 1, 3)


def test_a_batch_without_objects_has_no_columns_of_objects(uri: str) -> None:
    batch = loader(uri).load("train", rows_of((0, 0, 0), (0, 4, 0)))
    assert batch["boxes_cxcywh"].shape == (2, 0, 4)
    assert batch["labels"].shape == (2, 0)
    assert batch["counts"].tolist() == [0, 0]


def test_val_is_the_identity_view_without_crowds(uri: str) -> None:
    batch = loader(uri).load("val", rows_of((0, 3, 2)))
    sample = list(Pictures(22).samples())[3]
    picture = Image.open(io.BytesIO(sample.encoded))
    np.testing.assert_array_equal(batch["images"][0], view_image(picture, View.IDENTITY, SQUARE))
    assert batch["counts"].tolist() == [2]  # of three, one is a crowd


def test_the_teacher_gets_images_of_its_own_only_at_another_size(uri: str) -> None:
    rows = rows_of((0, 1, 0))
    assert "teacher_images" not in loader(uri, teacher_resize=ResizeConfig(size=32)).load("train", rows)
    assert loader(uri, teacher_resize=ResizeConfig(size=48)).load("train", rows)["teacher_images"].shape == (
        1,
        48,
        48,
        3,
    )


@pytest.mark.parametrize("keep_bytes", [0, 20_000, 60_000, 2**30])
def test_what_is_kept_changes_no_batch(uri: str, keep_bytes: int) -> None:
    bounded = loader(uri, keep_bytes=keep_bytes)
    schedule = Schedule(load_manifest(uri).shard_rows, (8,), 0, epochs=3, batch_size=5, window_images=8, views=2)
    for batch in stream(schedule):
        fresh = loader(uri, keep_bytes=0)
        expected = fresh.load(batch.subset, batch.rows)
        for name, array in bounded.load(batch.subset, batch.rows).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
        assert bounded._recent.held_bytes <= keep_bytes


@pytest.mark.parametrize("finish", [True, False])
def test_fresh_flips_of_what_fits_in_memory_are_decoded_once_each_and_change_no_batch(
    uri: str, finish: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, original = list[str](), Plan.fill

    def counting(self: Plan, encoded: bytes, where: str, out: Any) -> tuple[int, int]:
        decoded.append(where)
        return original(self, encoded, where, out)

    monkeypatch.setattr(Plan, "fill", counting)
    flips = VIEWS.model_copy(update={"derived": "flip", "count": 2})
    manifest = load_manifest(uri)
    kept = BatchLoader(uri, "", flips, SQUARE, finish=finish)
    schedule = Schedule(manifest.shard_rows, (), 0, epochs=12, batch_size=5, window_images=8, views=2, fresh_views=True)
    batches = [batch for epoch in range(12) for batch in training_batches(schedule, epoch)]
    found = [kept.load("train", batch.rows) for batch in batches]
    assert len(decoded) <= 2 * 2 * manifest.num_images  # two views of each, and the mirror images of both
    assert len(decoded) < sum(len(batch.rows) for batch in batches) / 2
    fresh = BatchLoader(uri, "", flips, SQUARE, keep_bytes=0, finish=finish)
    for batch, arrays in zip(batches, found, strict=True):
        for name, array in fresh.load("train", batch.rows).items():
            np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_each_group_is_read_once_an_epoch_where_two_windows_fit_and_the_dataset_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(Pictures(240), str(tmp_path), rows_per_shard=8, rows_per_group=4)
    manifest = load_manifest(str(tmp_path))
    window, row_bytes = 32, sum(shard.bytes for shard in manifest.shards) / 240 + 1000
    reads: list[tuple[int, int]] = []
    original = ShardReader.read

    def counting(self: ShardReader, shard: int, rows: Any, columns: Any = None) -> list[Sample]:
        reads.extend((shard, row) for row in rows)
        return original(self, shard, rows, columns)

    monkeypatch.setattr(ShardReader, "read", counting)
    bounded = BatchLoader(str(tmp_path), "", VIEWS, SQUARE, keep_bytes=int(2 * window * row_bytes))
    schedule = Schedule(manifest.shard_rows, (), 0, epochs=2, batch_size=6, window_images=window)
    for epoch in range(2):
        reads.clear()
        for batch in training_batches(schedule, epoch):
            bounded.load("train", batch.rows)
        assert len(reads) == len(set(reads)) == 240


def test_a_dataset_that_fits_is_read_once(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    original = ShardReader.read

    def counting(self: ShardReader, shard: int, rows: Any, columns: Any = None) -> list[Sample]:
        reads.extend(rows)
        return original(self, shard, rows, columns)

    monkeypatch.setattr(ShardReader, "read", counting)
    one = loader(uri)
    everything = rows_of(*((shard, row, 0) for shard, count in enumerate((8, 8, 6)) for row in range(count)))
    for _ in range(3):
        for row in everything:
            one.load("train", row[None])
    assert len(reads) == 22


def test_evaluation_sees_every_image_once_over_ranks_and_batches(uri: str) -> None:
    schedule = Schedule((1,), load_manifest(uri).shard_rows, 0, epochs=1, batch_size=5, window_images=8)
    one = loader(uri)
    for world_size in (1, 3):
        ids = [
            image_id
            for batch in stream(schedule)
            if batch.subset == "val"
            for rank in range(world_size)
            for image_id in one.load("val", split(batch.rows, world_size, rank))["image_ids"].tolist()
        ]
        assert ids == [100 + number for number in range(22)]


def test_a_broken_picture_is_named_with_shard_and_image(tmp_path: Path) -> None:
    manifest = write_shards(Pictures(4, spoiled=2), str(tmp_path))
    one = loader(str(tmp_path))
    one.load("train", rows_of((0, 1, 0)))
    with pytest.raises(QskdError) as caught:
        one.load("train", rows_of((0, 1, 0), (0, 2, 0)))
    for word in (manifest.shards[0].file, "image 102", "2.png", "what to do"):
        assert word in str(caught.value)


def test_a_kind_without_shards_is_named(uri: str) -> None:
    with pytest.raises(QskdError, match=r"data\.val: not given"):
        BatchLoader(uri, "", VIEWS, SQUARE).load("val", rows_of((0, 0, 0)))


def test_labels_are_the_order_of_category_ids(uri: str) -> None:
    manifest = load_manifest(uri)
    assert label_index(manifest, np.array([9, 3, 8, 3])).tolist() == [2, 0, 1, 0]
    with pytest.raises(QskdError, match="category id 4"):
        label_index(manifest, np.array([4]))


def test_padding_is_right_and_below() -> None:
    images, sizes = pad([np.full((2, 5, 3), 7, np.uint8), np.full((4, 3, 3), 9, np.uint8)])
    assert images.shape == (2, 4, 5, 3)
    assert sizes.tolist() == [[2, 5], [4, 3]]
    assert images.sum() == 2 * 5 * 3 * 7 + 4 * 3 * 3 * 9
    assert (images[1, :4, :3] == 9).all()


def test_the_modules_of_a_data_worker_import_nothing_heavy() -> None:
    code = "import sys, qskd.datasets.loader, qskd.datasets.coco, qskd.datasets.shapes, qskd.datasets.order.schedule; "
    code += "print([m for m in ('torch', 'ray', 'mlflow', 'transformers', 'pandas') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the COCO sample is not at {REAL}")
def test_the_real_sample_loads(tmp_path: Path) -> None:
    dataset = read_coco(REAL / "annotations" / "instances_val2017.json", REAL / "val2017")
    manifest = write_shards(dataset, str(tmp_path))
    one = BatchLoader(str(tmp_path), str(tmp_path), VIEWS, ResizeConfig(size=64), KEEP_ASPECT)
    schedule = Schedule(manifest.shard_rows, manifest.shard_rows, 0, epochs=1, batch_size=16, window_images=64)
    objects = {"train": 0, "val": 0}
    for batch in stream(schedule):
        found = one.load(batch.subset, batch.rows)
        objects[batch.subset] += int(found["counts"].sum())
        low = found["boxes_cxcywh"][..., :2] - found["boxes_cxcywh"][..., 2:] / 2
        assert low.min() >= -1e-6
        assert (low + found["boxes_cxcywh"][..., 2:]).max() <= 1 + 1e-6
        assert found["labels"].max() < 80
    assert objects["val"] == manifest.num_objects
    assert 0 < objects["train"] < manifest.num_objects
