"""The cache of teacher outputs: what goes in comes out, as exactly as the precision allows, and losses don't notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from reference import corners, make_targets, near, random_logits, slow_giou
from test_loader import Pictures
from tiny import make_training, random_teacher, recipe
from torch import Tensor

from benchmarks.local_cache import make_cache
from pipelines.caching.plan import clean
from pipelines.feed.stream import StreamConfig, local_stream
from qskd.config import Config, DetectionLossConfig, ResizeConfig, ViewConfig
from qskd.datasets.batch import train_batch
from qskd.datasets.loader import BatchLoader
from qskd.datasets.order.schedule import Schedule
from qskd.datasets.shards import ShardReader, write_shards
from qskd.errors import QskdError
from qskd.from_recipe import teacher_for_training
from qskd.losses.matching import assign
from qskd.storage.files import UNFINISHED
from qskd.structures import TeacherNeeds, TeacherRecord
from qskd.teacher.cache import TeacherCacheReader, finished_file, write_rows
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.table import (
    ALWAYS,
    ARRAYS,
    TeacherRow,
    collate,
    columns_for,
    decode_batch,
    encode,
    largest_errors,
)
from qskd.teacher.making import CacheMaker, row_batches
from qskd.teacher.manifest import CacheManifest, CacheSizes, file_name, load_cache_manifest, save_cache_manifest
from qskd.teacher.online import OnlineTeacher, queries_above

LABELS = ("three", "eight", "nine")
EVERYTHING = columns_for(TeacherNeeds(memory=True, attention=True))
ASPECT = ResizeConfig(mode="shortest_edge", size=64, longest=96)


def cache_config(data: str, path: str, precision: str = "int8", **cache: Any) -> Config:
    settings = {"path": path, "precision": precision, "attention_giou_floor": -0.9, "batch_size": 4, **cache}
    return recipe(data={"train": data, "views": {"count": 2, "crop_probability": 0.5}}, teacher={"cache": settings})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("shards"))
    write_shards(Pictures(22), folder, rows_per_shard=8, rows_per_group=3)
    return folder


@pytest.fixture(scope="module")
def teacher() -> OnlineTeacher:
    return random_teacher("refined", LABELS, ("N/A", "nine", "N/A", "three", "other", "eight"))


@pytest.fixture(scope="module")
def cache(data: str, teacher: OnlineTeacher, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("cache"))
    make_cache(cache_config(data, path), teacher, ASPECT)
    return path


def decoded(rows: list[TeacherRow], sizes: CacheSizes, columns: tuple[str, ...] = EVERYTHING) -> TeacherRecord:
    arrays = collate(rows, sizes, columns)
    return decode_batch({name: torch.from_numpy(value) for name, value in arrays.items()})


# ---- the codec


def random_record(seed: int = 0) -> tuple[TeacherRecord, list[int]]:
    """Three images of two levels; the second is smaller, the third has no known attention."""
    g = torch.Generator().manual_seed(seed)
    valid = [torch.zeros(3, h, w, dtype=torch.bool) for h, w in ((6, 8), (3, 4))]
    for level, part in enumerate(valid):
        for image, (high, wide) in enumerate(((6, 8), (4, 6), (6, 2))):
            part[image, : high >> level, : wide >> level] = True
    memory = tuple(torch.randn(3, 5, *part.shape[1:], generator=g) * 3 for part in valid)
    memory[0][1, 2] = 0.0  # a channel that says nothing
    attention = [torch.rand(3, 4, *part.shape[1:], generator=g) * part[:, None] for part in valid]
    total = sum(part.sum((2, 3), keepdim=True) for part in attention)
    record = TeacherRecord(
        logits=torch.randn(2, 3, 7, 4, generator=g) * 5,
        boxes_cxcywh=torch.rand(2, 3, 7, 4, generator=g),
        memory=memory,
        memory_valid=tuple(valid),
        attention_queries=torch.tensor([[0, 2, 6, -1], [5, -1, -1, -1], [-1, -1, -1, -1]]),
        attention=tuple(part / total for part in attention),
    )
    return record, [11, 12, 13]


@pytest.mark.parametrize(("precision", "worst"), [("float32", 0.0), ("float16", 1e-3), ("int8", 0.51 / 127)])
def test_a_record_comes_back_as_exactly_as_its_precision_allows(precision: str, worst: float, tmp_path: Path) -> None:
    record, ids = random_record()
    sizes = random_sizes(record)
    write_rows(str(tmp_path), "one.parquet", encode(record, ids, precision), "f")
    manifest = CacheManifest({"teacher.cache.precision": precision}, sizes, 3, ("one",), {0: ((3, 1),)})
    write_rows(str(tmp_path), file_name("one", 0), encode(record, ids, precision), manifest.fingerprint)
    size = finished_file(str(tmp_path), file_name("one", 0), 3, manifest.fingerprint)
    assert size
    save_cache_manifest(str(tmp_path), replace(manifest, views={0: ((3, size),)}))
    rows = TeacherCacheReader(str(tmp_path)).read(0, 0, [0, 1, 2])
    assert [row.image_id for row in rows] == ids
    found = decoded(rows, sizes)
    errors = largest_errors(found, record)
    assert errors["boxes_cxcywh"] == 0
    assert errors["memory_relative"] <= worst
    assert errors["attention_relative"] <= worst
    assert errors["attention_queries_missing"] == 0
    assert errors["logits"] <= (0 if precision == "float32" else 0.01)
    for mine, theirs in zip(found.memory_valid, record.memory_valid, strict=True):
        assert torch.equal(mine, theirs)
    assert found.attention_queries is not None
    assert found.attention_queries.tolist() == [[0, 2, 6], [5, -1, -1], [-1, -1, -1]]
    for image, line in enumerate(found.attention_queries.tolist()):
        for place, query in enumerate(line):
            total = sum(float(part[image, place].sum()) for part in found.attention)
            assert total == pytest.approx(float(query >= 0), abs=0.05)


def random_sizes(record: TeacherRecord) -> CacheSizes:
    layers, _, queries, classes = record.logits.shape
    return CacheSizes(layers, queries, classes, tuple(map_.shape[1] for map_ in record.memory))


def test_the_reported_errors_are_those_made_on_purpose() -> None:
    record, ids = random_record()
    rows = encode(record, ids, "float32")
    spoiled = [replace(row, boxes_cxcywh=row.boxes_cxcywh + 0.25) for row in rows]
    assert largest_errors(decoded(spoiled, random_sizes(record)), record)["boxes_cxcywh"] == pytest.approx(0.25)
    other = replace(rows[0], attention_queries=np.array([0, 2, 5], np.int32))
    assert largest_errors(decoded([other, *rows[1:]], random_sizes(record)), record)["attention_queries_missing"] == 1
    louder = replace(rows[0], memory=rows[0].memory * 2)
    assert largest_errors(decoded([louder, *rows[1:]], random_sizes(record)), record)["memory_relative"] > 0.9


def test_a_batch_of_no_rows_has_the_right_shapes() -> None:
    record, ids = random_record()
    full, none = (collate(rows, random_sizes(record), EVERYTHING) for rows in (encode(record, ids, "float32"), []))
    assert full.keys() == none.keys()
    assert all(len(value) == 0 and value.ndim == full[name].ndim for name, value in none.items())


def test_only_the_columns_asked_for_are_read(cache: str) -> None:
    reader = TeacherCacheReader(cache, columns_for(TeacherNeeds()))
    (row,) = reader.read(1, 0, [2])
    assert [name for name in ARRAYS if getattr(row, name).size] == ["logits", "boxes_cxcywh"]
    assert set(collate([row], reader.manifest.sizes, reader.columns)) == {"teacher_logits", "teacher_boxes_cxcywh"}
    attention = TeacherCacheReader(cache, columns_for(TeacherNeeds(attention=True))).read(1, 0, [2])
    assert not attention[0].memory.size
    assert decoded(attention, reader.manifest.sizes, columns_for(TeacherNeeds(attention=True))).attention


def test_reading_a_cache_does_not_import_torch(cache: str) -> None:
    code = "import sys; from qskd.teacher.cache import TeacherCacheReader; "
    code += f"TeacherCacheReader({cache!r}).read(0, 0, [0]); print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


# ---- what is kept


@pytest.mark.parametrize("floor", [-1.0, 0.0, 0.3, 0.7, 1.0])
def test_queries_above_the_floor_are_those_of_a_slow_loop(floor: float) -> None:
    targets = make_targets([3, 0, 1, 6], seed=4)
    boxes = near(targets, 12, seed=5)
    record = TeacherRecord(random_logits(1, 4, 12, 5, seed=6), boxes[None])
    found = queries_above(record, targets, floor, DetectionLossConfig())
    (matched,) = assign([(record.logits, record.boxes_cxcywh)], targets, DetectionLossConfig())
    for image, count in enumerate(targets.counts):
        objects = [corners(box) for box in targets.boxes_cxcywh[image, :count].tolist()]
        expected = {
            query
            for query, box in enumerate(boxes[image].tolist())
            if any(slow_giou(corners(box), other) >= floor for other in objects)
        } | set(matched[0, image, :count].tolist())
        assert [query for query in found[image].tolist() if query >= 0] == sorted(expected)


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_every_row_is_in_one_batch_and_rows_of_a_batch_are_alike(data: str, batch_size: int) -> None:
    views = ViewConfig(crop_probability=1.0)
    reader = ShardReader(data)
    for shard, count in enumerate(reader.manifest.shard_rows):
        windows = row_batches(reader, shard, 1, views, ASPECT, batch_size)
        rows = np.concatenate([batch for window in windows for batch in window])
        assert sorted(rows[:, 1].tolist()) == list(range(count))
        assert set(rows[:, 0].tolist()) == {shard}
        assert set(rows[:, 2].tolist()) == {1}
        places = [set(np.concatenate(window)[:, 1].tolist()) for window in windows]
        assert all(max(low) < min(high) for low, high in pairwise(places))
        sizes = BatchLoader(data, "", views, ASPECT).load("train", np.concatenate(windows[0]))["sizes"].tolist()
        assert sizes == sorted(sizes)


def test_the_same_cache_made_twice_is_the_same_bytes(
    data: str, teacher: OnlineTeacher, cache: str, tmp_path: Path
) -> None:
    make_cache(cache_config(data, str(tmp_path)), teacher, ASPECT)
    for path in Path(cache).iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in Path(cache).iterdir()}


def test_a_store_that_is_no_local_folder_holds_the_same_bytes(
    data: str, teacher: OnlineTeacher, cache: str, tmp_path: Path
) -> None:
    uri = f"local://{tmp_path}/cache"  # fsspec's, written and read as an object store would be
    make_cache(cache_config(data, uri), teacher, ASPECT)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == {
        path.name: path.read_bytes() for path in Path(cache).iterdir()
    }
    assert TeacherCacheReader(uri).read(0, 1, [3])[0].image_id == 103
    manifest = load_cache_manifest(uri)
    assert manifest is not None
    name = file_name(manifest.shards[0], 0)
    assert finished_file(uri, name, 8, manifest.fingerprint) == (Path(cache) / name).stat().st_size
    (tmp_path / "cache" / f"{UNFINISHED}left-over").write_text("half")
    clean(uri)
    assert len(list((tmp_path / "cache").iterdir())) == 8  # shards, manifest, directions
    clean(uri, everything=True)
    assert not list((tmp_path / "cache").iterdir())


# ---- training from it


def test_the_teacher_is_not_loaded_where_there_is_a_cache(data: str, cache: str) -> None:
    config = cache_config(data, cache)
    absent = config.teacher.model_copy(update={"path": "/nowhere/teacher"})
    found = teacher_for_training(config.model_copy(update={"teacher": absent}), LABELS, None)
    assert isinstance(found, CachedTeacher)
    assert found.facts.channels == (64, 64)
    nothing = absent.model_copy(update={"cache": config.teacher.cache.model_copy(update={"path": ""})})
    with pytest.raises(QskdError, match="/nowhere/teacher: no such folder"):
        teacher_for_training(config.model_copy(update={"teacher": nothing}), LABELS, None)


def stream_of(data: str, cache: str, teacher_resize: ResizeConfig | None, batch_size: int = 4) -> StreamConfig:
    """Two epochs, one of each view."""
    reader = ShardReader(data)
    schedule = Schedule(reader.manifest.shard_rows, (), 3, epochs=2, batch_size=batch_size, window_images=16, views=2)
    views = ViewConfig(count=2, crop_probability=0.5)
    columns = EVERYTHING if cache else ()
    return StreamConfig(data, "", schedule, views, ResizeConfig(size=64), teacher_resize, 2**28, cache, columns)


def losses(config: Config, teacher: Any, stream: StreamConfig) -> list[dict[str, float]]:
    training = make_training(config, teacher, labels=LABELS)
    return [
        {name: value.item() for name, value in training.train_step(train_batch(share.arrays)).items()}
        for share in local_stream(stream)
    ]


@pytest.mark.parametrize("family", ["conditional", "refined"])
def test_cached_and_online_teachers_give_the_same_losses(data: str, family: str, tmp_path: Path) -> None:
    # A square teacher: where pictures of other sizes are padded, a batch's largest picture moves a network's last bits.
    teacher = random_teacher(family, LABELS, LABELS)
    square = teacher.preprocessing.resize
    exact = cache_config(data, str(tmp_path / "exact"), "float32")
    compact = cache_config(data, str(tmp_path / "compact"), "int8")
    online = losses(exact, teacher, stream_of(data, "", None))
    assert len(online) == 10
    assert {"agfd", "lapd_class", "lapd_giou"} <= online[0].keys()
    for config, tolerance in ((exact, 1e-4), (compact, 0.02)):
        manifest = make_cache(config, teacher, square)
        cached = losses(config, CachedTeacher(manifest.sizes), stream_of(data, config.teacher.cache.path, None))
        for mine, theirs in zip(cached, online, strict=True):
            assert mine == pytest.approx(theirs, rel=tolerance, abs=1e-4)
    assert any(term["agfd"] != online[0]["agfd"] for term in cached[:1])  # rounding is there, and small


def test_each_image_meets_its_own_teacher_outputs_whatever_the_order(
    data: str, teacher: OnlineTeacher, cache: str
) -> None:
    reader = TeacherCacheReader(cache)
    loader = BatchLoader(data, "", ViewConfig(count=2, crop_probability=0.5), ASPECT, teacher_cache=reader)
    rows = np.array([(2, 3, 1), (0, 7, 0), (2, 3, 0), (1, 1, 1)], np.int32)
    batch = loader.load("train", rows)
    maker = CacheMaker(cache_config(data, cache), teacher, torch.device("cpu"))
    for i, row in enumerate(rows):
        alone = BatchLoader(data, "", ViewConfig(count=2, crop_probability=0.5), ASPECT).load("train", row[None])
        true = maker.ask(alone)
        found = decode_batch({n: torch.from_numpy(v[i : i + 1]) for n, v in batch.items() if "teacher" in n})
        # Alone, a picture is not padded: the last bits differ, another picture's outputs differ altogether.
        assert float((found.boxes_cxcywh - true.boxes_cxcywh).abs().max()) < 0.02
    assert not any("teacher" in name for name in BatchLoader(data, data, ViewConfig(), ASPECT).load("val", rows))


def test_rows_of_another_image_are_refused(data: str, cache: str, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    manifest = load_cache_manifest(cache)
    assert manifest is not None
    reader = TeacherCacheReader(cache)
    rows = reader.read(0, 0, list(range(8)))
    name = file_name(manifest.shards[0], 0)
    count, size = write_rows(str(tmp_path / "cache"), name, rows[::-1], manifest.fingerprint)
    views = {**manifest.views, 0: ((count, size), *manifest.views[0][1:])}
    save_cache_manifest(str(tmp_path / "cache"), replace(manifest, views=views))
    mixed = TeacherCacheReader(str(tmp_path / "cache"))
    loader = BatchLoader(data, "", ViewConfig(count=2), ASPECT, teacher_cache=mixed)
    with pytest.raises(QskdError, match=r"row 0 is of image 107[\s\S]*image 100"):
        loader.load("train", np.array([(0, 0, 0)]))


def test_an_empty_share_trains_from_a_cache_too(data: str, cache: str) -> None:
    config = cache_config(data, cache)
    manifest = load_cache_manifest(cache)
    assert manifest is not None
    training = make_training(config, CachedTeacher(manifest.sizes), labels=LABELS)
    loader = BatchLoader(data, "", ViewConfig(count=2), ASPECT, teacher_cache=TeacherCacheReader(cache))
    before = [parameter.clone() for parameter in training.student.parameters()]
    values = training.train_step(train_batch(loader.load("train", np.zeros((0, 3)))))
    assert all(value == 0 for value in values.values())
    assert len(before) == len(list(training.student.parameters()))
    full = training.train_step(train_batch(loader.load("train", np.array([(0, 1, 0), (0, 2, 0)]))))
    assert full.keys() == values.keys()
    assert all(torch.isfinite(value) for value in full.values())


# ---- damage


def copy_of(cache: str, tmp_path: Path) -> tuple[Path, str]:
    shutil.copytree(cache, tmp_path / "cache")
    manifest = load_cache_manifest(cache)
    assert manifest is not None
    return tmp_path / "cache", file_name(manifest.shards[0], 0)


def test_a_truncated_file_is_named(cache: str, tmp_path: Path) -> None:
    folder, name = copy_of(cache, tmp_path)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-100])
    with pytest.raises(QskdError, match=name):
        TeacherCacheReader(str(folder)).read(0, 0, [0])
    assert finished_file(str(folder), name, 8, "f") is None


def test_a_flipped_bit_is_named(cache: str, tmp_path: Path) -> None:
    folder, name = copy_of(cache, tmp_path)
    damaged = bytearray((folder / name).read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (folder / name).write_bytes(damaged)
    with pytest.raises(QskdError, match=name):
        TeacherCacheReader(str(folder)).read(0, 0, range(8))


def test_a_missing_file_is_named(cache: str, tmp_path: Path) -> None:
    folder, name = copy_of(cache, tmp_path)
    (folder / name).unlink()
    with pytest.raises(QskdError, match=rf"{name}: no such file"):
        TeacherCacheReader(str(folder)).read(0, 0, [0])


def test_a_file_of_another_cache_is_refused(cache: str, tmp_path: Path) -> None:
    folder, name = copy_of(cache, tmp_path)
    manifest = load_cache_manifest(cache)
    assert manifest is not None
    count, size = write_rows(str(folder), name, TeacherCacheReader(cache).read(0, 0, range(8)), "another")
    views = {**manifest.views, 0: ((count, size), *manifest.views[0][1:])}
    save_cache_manifest(str(folder), replace(manifest, views=views))
    with pytest.raises(QskdError, match=r"fingerprint another[\s\S]*expected: " + manifest.fingerprint):
        TeacherCacheReader(str(folder)).read(0, 0, [0])


def test_an_edited_manifest_is_refused(cache: str, tmp_path: Path) -> None:
    folder, _ = copy_of(cache, tmp_path)
    tree = json.loads((folder / "manifest.json").read_text())
    tree["identity"]["teacher"] = "that one"
    (folder / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(QskdError, match="fingerprint disagrees"):
        load_cache_manifest(str(folder))


def test_a_folder_without_a_cache_says_how_to_make_one(tmp_path: Path) -> None:
    assert load_cache_manifest(str(tmp_path)) is None
    with pytest.raises(QskdError, match="qskd cache"):
        TeacherCacheReader(str(tmp_path))


def test_a_teacher_that_says_nothing_finite_is_told_with_the_image(data: str, tmp_path: Path) -> None:
    broken = random_teacher("conditional", LABELS, LABELS)
    with torch.no_grad():
        head: Tensor = next(broken.detector.model.class_labels_classifier.parameters())
        head.fill_(float("nan"))
    with pytest.raises(QskdError, match=r"not a finite answer to image 10\d"):
        make_cache(cache_config(data, str(tmp_path)), broken, broken.preprocessing.resize)
    assert not list(tmp_path.iterdir())


COLUMN = """
from qskd.teacher.columns.column import Column, floats_of, host, largest_gap
import numpy as np

class QueryStates(Column):
    name, arrays, optional = "query_states", ("query_states",), True

    def asked(self, needs):
        return self.name in needs.columns

    def taken(self, output):
        return {self.name: output.query_states}

    def formats(self, precision):
        return {self.name: "<f2"}

    def encode(self, record, precision, shapes):
        return [{self.name: state} for state in host(record.extra[self.name].to(floats_of("float16")))]

    def shaped(self, flat, sizes):
        return {self.name: flat[self.name].reshape(sizes.queries, -1)}

    def collate(self, rows, sizes):
        return {"teacher_query_states": np.stack([row.query_states for row in rows])}

    def decode(self, tensors):
        return {self.name: tensors["teacher_query_states"].float()} if "teacher_query_states" in tensors else {}

    def blank(self, images, sizes, device):
        import torch
        return {self.name: torch.zeros(images, sizes.queries, 64, device=device)}

    def errors(self, found, true):
        return {self.name: largest_gap(found.extra[self.name], true.extra[self.name])} if found.extra else {}
"""
USE = """
import sys
from dataclasses import replace
import torch
from qskd.structures import TeacherNeeds
from qskd.teacher.cache import TeacherCacheReader, write_rows
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.table import collate, columns_for, decode_batch, encode, largest_errors
from qskd.teacher.manifest import CacheManifest, CacheSizes, file_name, save_cache_manifest
from tiny import batch_of, random_teacher

old, new = sys.argv[1:]
teacher, batch = random_teacher(), batch_of(2, 1)
for folder, extra in ((old, frozenset()), (new, frozenset({"query_states"}))):
    needs = TeacherNeeds(memory=True, attention=True, columns=extra)
    record = teacher.record(batch, needs)
    manifest = CacheManifest({"teacher.cache.precision": "int8"}, teacher.sizes(False), 2, ("one",), {})
    written = write_rows(folder, file_name("one", 0), encode(record, [1, 2], "int8"), manifest.fingerprint, sorted(extra))
    save_cache_manifest(folder, manifest.with_view(0, (written,)))
    reader = TeacherCacheReader(folder, columns_for(needs))
    arrays = collate(reader.read(0, 0, [0, 1]), reader.manifest.sizes, reader.columns)
    found = decode_batch({name: torch.from_numpy(value) for name, value in arrays.items()})
    blank = CachedTeacher(reader.manifest.sizes).record(replace(batch, cached={}), needs)
    assert {name: value.shape for name, value in blank.extra.items()} == {n: v.shape for n, v in found.extra.items()}
    print(sorted(found.extra), largest_errors(found, record).get("query_states", -1) < 0.01)
"""


def test_a_new_column_is_one_file_and_one_entry_and_caches_without_it_are_read_as_before(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    shutil.copytree(root / "qskd", tmp_path / "qskd")  # with its bytecode, which is of sources of that time and size
    columns = tmp_path / "qskd" / "teacher" / "columns"
    (columns / "query_states.py").write_text(COLUMN)
    table = (columns / "table.py").read_text()
    entry = "from qskd.teacher.columns.query_states import QueryStates\n\nCOLUMNS"
    table = table.replace("\nCOLUMNS", entry, 1).replace("States())", "States(), QueryStates())")
    (columns / "table.py").write_text(table)
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path / "old"), str(tmp_path / "new")],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{root / 'tests'}:{root / 'tests/quick'}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["[] True", "['query_states'] True"], done.stderr
    write = pq.ParquetFile(tmp_path / "old" / file_name("one", 0)).schema_arrow.names
    assert write == ["image_id", *ALWAYS]  # what a cache without further columns has always had
