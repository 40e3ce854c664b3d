"""No shards, cache or checkpoint end in anything but success or a QskdError, in bounded time and memory. See test_fuzz.py."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd import (
    COCO,
    MOST_MB,
    RAW,
    bounded,
    ends_well,
    mutated,
    picture_folder,
    resident_mb,
    with_depth,
)

from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.coco import read_coco
from qskd.datasets.loader import BatchLoader
from qskd.datasets.manifest import load_manifest
from qskd.datasets.samples import SCHEMA
from qskd.datasets.shards import ShardReader, read_annotations, verify, write_shards
from qskd.errors import QskdError
from qskd.teacher.cache import FINGERPRINT_KEY, TeacherCacheReader, write_rows
from qskd.teacher.columns.table import TeacherRow, collate
from qskd.teacher.manifest import CacheManifest, CacheSizes, file_name, fingerprint_of, save_cache_manifest


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    before = resident_mb()
    yield
    assert resident_mb() - before < MOST_MB


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("fuzz") / "images")


@pytest.fixture(scope="module")
def shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    annotations = pictures.parent / "whole.json"
    annotations.write_text(json.dumps(COCO))
    folder = tmp_path_factory.mktemp("shards") / "whole"
    write_shards(read_coco(annotations, pictures), str(folder))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "whole"
    identity = {"teacher.cache.precision": "float32", "codec": 1}
    manifest = CacheManifest(identity, CacheSizes(1, 3, 2, (2,), (4.0,)), 2, ("one",), {})
    written = write_rows(str(folder), file_name("one", 0), [_row(7), _row(9)], manifest.fingerprint)
    save_cache_manifest(str(folder), manifest.with_view(0, (written,)))
    return folder


def _row(image_id: int) -> TeacherRow:
    def floats(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    shapes, queries = np.array([[2, 2]], np.int32), np.array([1], np.int32)
    none = np.zeros(0, np.float32)
    return TeacherRow(image_id, floats(1, 3, 2), floats(1, 3, 4), shapes, floats(8), none, queries, floats(1, 4), none)


# --- manifests and Parquet ------------------------------------------------------------------------------------------
def _signed(tree: Any) -> Any:
    """With the fingerprint that goes with what it says, if it is of a shape to have one."""
    try:
        content = [[shard["sha256"] for shard in tree["shards"]], [[c["id"], c["name"]] for c in tree["categories"]]]
        return {**tree, "fingerprint": hashlib.sha256(json.dumps(content).encode()).hexdigest()}
    except (KeyError, TypeError):
        return tree


def _signed_cache(tree: Any) -> Any:
    try:
        return {**tree, "fingerprint": fingerprint_of(tree["identity"])}
    except (KeyError, TypeError):
        return tree


def _use_shards(folder: Path) -> None:
    def read() -> None:
        loader = BatchLoader(str(folder), "", ViewConfig(), ResizeConfig(size=16))
        count = sum(len(range(min(rows, 3))) for rows in loader.manifest("train").shard_rows)
        for row in range(min(count, 3)):
            ends_well(lambda row=row: loader.load("train", np.array([[0, row, 0]])))  # type: ignore[misc]
        ends_well(lambda: ShardReader(str(folder)).read(0, [0]))
        ends_well(lambda: read_annotations(str(folder)))
        verify(str(folder))

    ends_well(read)


def _use_cache(folder: Path) -> None:
    def read() -> None:
        reader = TeacherCacheReader(str(folder))
        for view in list(reader.manifest.views)[:2]:
            ends_well(lambda view=view: collate(reader.read(0, view, [0, 1]), reader.manifest.sizes, reader.columns))  # type: ignore[misc]

    ends_well(read)


@bounded
@given(data=st.data(), signed=st.booleans())
def test_shard_manifests(shards: Path, data: Any, signed: bool) -> None:
    tree = data.draw(mutated(json.loads((shards / "manifest.json").read_text())))
    folder = _copy(shards)
    (folder / "manifest.json").write_text(with_depth(json.dumps(_signed(tree) if signed else tree)))
    _use_shards(folder)


@bounded
@given(data=st.data(), signed=st.booleans())
def test_cache_manifests(cache: Path, data: Any, signed: bool) -> None:
    tree = data.draw(mutated(json.loads((cache / "manifest.json").read_text())))
    folder = _copy(cache)
    (folder / "manifest.json").write_text(with_depth(json.dumps(_signed_cache(tree) if signed else tree)))
    _use_cache(folder)


@bounded
@given(raw=st.sampled_from(RAW) | st.binary(max_size=20))
def test_bytes_that_are_no_manifest(shards: Path, cache: Path, raw: bytes) -> None:
    for whole, use in ((shards, _use_shards), (cache, _use_cache)):
        folder = _copy(whole)
        (folder / "manifest.json").write_bytes(raw)
        use(folder)


def _copy(whole: Path) -> Path:
    folder = whole.parent / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    return folder


TYPES = (
    *(
        pa.int64(),
        pa.int32(),
        pa.uint64(),
        pa.float32(),
        pa.float64(),
        pa.string(),
        pa.binary(),
        pa.bool_(),
        pa.date32(),
    ),
    *(pa.large_string(), pa.large_binary(), pa.decimal128(5, 2), pa.list_(pa.int64()), pa.list_(pa.float32())),
    *(pa.list_(pa.list_(pa.float32(), 4)), pa.list_(pa.list_(pa.float32())), pa.list_(pa.bool_()), pa.null()),
    *(pa.struct([("a", pa.int64())]), pa.map_(pa.string(), pa.int64()), pa.dictionary(pa.int8(), pa.string())),
)


def _filled(kind: pa.DataType, seed: int) -> Any:
    """A value of an Arrow type, or None."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.25 or pa.types.is_null(kind):
        return None
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        length = 4 if pa.types.is_fixed_size_list(kind) else int(rng.integers(0, 4))
        return [_filled(kind.value_type, seed * 7 + n + 1) for n in range(length)]
    if pa.types.is_struct(kind):
        return {"a": 1}
    if pa.types.is_map(kind):
        return [("a", 1)]
    if pa.types.is_boolean(kind):
        return bool(rng.integers(2))
    if pa.types.is_floating(kind):
        return float(rng.choice([0.0, 1.5, 1e30, np.inf, np.nan, -7.0]))
    if pa.types.is_integer(kind):
        return int(rng.choice([0, 1, 5, 7, 9, 2**30]))
    if pa.types.is_decimal(kind) or pa.types.is_date(kind):
        return None
    if pa.types.is_dictionary(kind):
        return "a"
    return (
        bytes(rng.bytes(int(rng.integers(0, 12)))) if "binary" in str(kind) else str(rng.choice(["a", "", "\x1b[1m"]))
    )


@st.composite
def tables(draw: st.DrawFn, whole: pa.Table) -> pa.Table:
    """The table with a column of another type, with nulls or other values, twice, renamed or missing."""
    columns = list(zip(whole.column_names, whole.columns, strict=True))
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(columns) - 1))
        name, column = columns[place]
        how = draw(st.sampled_from(["type", "values", "values", "drop", "twice", "rename"]))
        kind = draw(st.sampled_from(TYPES)) if how == "type" else column.type
        if how in ("type", "values"):
            rows = [_filled(kind, draw(st.integers(0, 50))) for _ in range(whole.num_rows)]
            columns[place] = name, pa.chunked_array([pa.array(rows, kind)], kind)
        elif how == "drop" and len(columns) > 1:
            del columns[place]
        elif how == "twice":
            columns.append((name, column))
        else:
            columns[place] = draw(st.sampled_from(["other", name.upper()])), column
    fields = [pa.field(name, column.type) for name, column in columns]
    return pa.Table.from_arrays([column for _, column in columns], schema=pa.schema(fields, whole.schema.metadata))


def _damaged(draw: Callable[[Any], Any], raw: bytes) -> bytes:
    how = draw(st.sampled_from(["cut", "flip", "flip", "footer", "garbage"]))
    at = draw(st.integers(0, len(raw) - 1))
    if how == "cut":
        return raw[:at]
    if how == "garbage":
        return bytes(draw(st.binary(min_size=1, max_size=40)))
    if how == "footer":  # thrift, without a checksum
        at = len(raw) - 8 - at % max(int.from_bytes(raw[-8:-4], "little"), 1)
    return raw[:at] + bytes([draw(st.integers(0, 255))]) + raw[at + 1 :]


def _file_bytes(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


@bounded
@given(data=st.data())
def test_parquet_shards(shards: Path, data: Any) -> None:
    folder = _copy(shards)
    tree = json.loads((folder / "manifest.json").read_text())
    path = folder / tree["shards"][0]["file"]
    if data.draw(st.booleans()):
        raw = _file_bytes(data.draw(tables(pq.read_table(path))))
    else:
        raw = _damaged(data.draw, path.read_bytes())
    path.write_bytes(raw)
    entry = tree["shards"][0] | {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(_signed(tree | {"shards": [entry]})))
    _use_shards(folder)


@bounded
@given(data=st.data())
def test_parquet_cache_files(cache: Path, data: Any) -> None:
    folder = _copy(cache)
    tree = json.loads((folder / "manifest.json").read_text())
    path = folder / file_name("one", 0)
    if data.draw(st.booleans()):
        raw = _file_bytes(data.draw(tables(pq.read_table(path))))
    else:
        raw = _damaged(data.draw, path.read_bytes())
    path.write_bytes(raw)
    (folder / "manifest.json").write_text(json.dumps(tree | {"views": {"0": [[2, len(raw)]]}}))
    _use_cache(folder)


def test_the_tables_that_are_mutated_are_read_when_they_are_not(shards: Path, cache: Path) -> None:
    assert pq.read_schema(next(shards.glob("*.parquet"))).names == SCHEMA.names
    assert [sample.image_id for sample in ShardReader(str(shards)).read(0, [0, 1])] == [7, 9]
    assert [row.image_id for row in TeacherCacheReader(str(cache)).read(0, 0, [0, 1])] == [7, 9]
    assert FINGERPRINT_KEY in pq.read_schema(cache / file_name("one", 0)).metadata


NULL = pa.nulls(2)
ODD_COLUMNS = {
    "image_id": (pa.array([7, None]), pa.array(["7", "9"]), pa.array([7.0, 9.0])),
    "file_name": (pa.array(["a", None]), pa.array([b"a", b"b"]), NULL),
    "encoded": (pa.array([b"", None], pa.binary()), pa.array(["", ""])),
    "width": (pa.array([8, 8], pa.int64()), pa.array([8, None], pa.int32())),
    "boxes_xyxy": (
        pa.array([[[1.0, 2.0, 3.0, None]], []], SCHEMA.field("boxes_xyxy").type),
        pa.array([[None], []], SCHEMA.field("boxes_xyxy").type),
        pa.array([[[1.0, 2.0]], []], pa.list_(pa.list_(pa.float32()))),
        pa.array([[[1.0, 2.0, 3.0, 4.0]] * 2, []], SCHEMA.field("boxes_xyxy").type),
    ),
    "category_ids": (
        pa.array([[5, None], [2]]),
        pa.array([[5, 5], [2]]),
        pa.array([["5"], ["2"]]),
        pa.array([None, [2]]),
    ),
    "iscrowd": (pa.array([[0], [1]]), pa.array([[None], [True]], pa.list_(pa.bool_()))),
}


@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_a_shard_with_a_column_of_another_type_with_nulls_or_of_other_lengths_is_named(shards: Path, name: str) -> None:
    whole = pq.read_table(next(shards.glob("*.parquet")))
    for column in ODD_COLUMNS[name]:
        folder = _copy(shards)
        tree = json.loads((folder / "manifest.json").read_text())
        raw = _file_bytes(whole.set_column(whole.column_names.index(name), name, column))
        (folder / tree["shards"][0]["file"]).write_bytes(raw)
        entry = tree["shards"][0] | {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(_signed(tree | {"shards": [entry]})))
        with pytest.raises(QskdError, match=rf"{entry['file']}: .*({name}|all lists)") as caught:
            ShardReader(str(folder)).read(0, [0, 1])
        assert "what to do" in str(caught.value)


def test_a_cache_file_with_a_column_of_another_type_with_nulls_or_of_other_sizes_is_named(cache: Path) -> None:
    whole = pq.read_table(cache / file_name("one", 0))
    short, huge = np.float32([1.0]).tobytes(), np.int32([[2**15, 2**15]]).tobytes()
    columns = {
        "logits": (pa.array([None, b""], pa.binary()), pa.array(["", ""]), pa.array([short, short])),
        "image_id": (pa.array([7, None]), pa.array([7.0, 9.0])),
        "memory_shapes": (pa.array([huge, huge]), pa.array([short, short])),
        "memory": (pa.array([short, short]),),
        "attention_queries": (pa.array([np.int32([9]).tobytes()] * 2),),
    }
    for name, odd in columns.items():
        for column in odd:
            folder = _copy(cache)
            tree = json.loads((folder / "manifest.json").read_text())
            raw = _file_bytes(whole.set_column(whole.column_names.index(name), name, column))
            (folder / file_name("one", 0)).write_bytes(raw)
            (folder / "manifest.json").write_text(json.dumps(tree | {"views": {"0": [[2, len(raw)]]}}))
            with pytest.raises(QskdError, match=r"one.view-000.parquet: "):
                TeacherCacheReader(str(folder)).read(0, 0, [0, 1])


def test_manifests_that_list_nothing_or_odd_counts_are_refused(shards: Path, cache: Path) -> None:
    tree = json.loads((shards / "manifest.json").read_text())
    shard = tree["shards"][0]
    for change in (
        *(
            {"shards": [], "num_images": 0},
            {"categories": []},
            {"shards": [shard | {"rows": "2"}]},
            {"num_objects": True},
        ),
        *({"shards": [shard | {"rows": -2}]}, {"num_images": 10**30}, {"problems": [{"a": {"b": 1}}]}, {"unknown": 1}),
        *(
            {"categories": [{"id": 2**70, "name": "a"}]},
            {"categories": [{"id": 1, "name": "a" * 2000}]},
            {"source": None},
        ),
    ):
        folder = _copy(shards)
        (folder / "manifest.json").write_text(json.dumps(_signed(tree | change)))
        with pytest.raises(QskdError, match="not a manifest"):
            load_manifest(str(folder))
    tree = json.loads((cache / "manifest.json").read_text())
    for change in (
        *(
            {"shards": [], "views": {"0": []}},
            {"views": {"x": [[2, 3]]}},
            {"views": {"0": [[-2, 3]]}},
            {"views": {"0": [["2", 3]]}},
        ),
        *(
            {"sizes": tree["sizes"] | {"layers": 0}},
            {"sizes": tree["sizes"] | {"channels": [2**40]}},
            {"batch_size": 1.5},
        ),
        *({"shards": ["../one"]}, {"shards": ["a\0b"]}, {"identity": [1]}),
    ):
        folder = _copy(cache)
        (folder / "manifest.json").write_text(json.dumps(_signed_cache(tree | change)))
        with pytest.raises(QskdError, match="not a manifest"):
            TeacherCacheReader(str(folder))
    folder = _copy(cache)
    (folder / "manifest.json").write_text(json.dumps(_signed_cache(tree | {"identity": {}})))
    with pytest.raises(QskdError, match="precision None"):
        TeacherCacheReader(str(folder))


# --- checkpoints ----------------------------------------------------------------------------------------------------
# True once `qskd.detectors` reads config.json and preprocessor_config.json with the same care.
CHECKPOINTS_ARE_HARDENED = True
checkpoints = pytest.mark.skipif(not CHECKPOINTS_ARE_HARDENED, reason="config.json is hardened elsewhere")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import STUDENT, recipe, silent_student

    from qskd.detectors import save_detector

    folder, config = tmp_path_factory.mktemp("checkpoint") / "whole", recipe(STUDENT)
    save_detector(silent_student(config.student, ("cat", "dog"), 1), folder, config.student.resize)
    return folder


@checkpoints
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@bounded
@given(data=st.data())
def test_checkpoints(checkpoint: Path, file: str, data: Any) -> None:
    from qskd.detectors import load_detector, read_config, read_preprocessing

    folder = _copy(checkpoint)
    if data.draw(st.integers(0, 4)):
        tree = data.draw(mutated(json.loads((folder / file).read_text())))
        (folder / file).write_text(with_depth(json.dumps(tree)))
    else:
        (folder / file).write_bytes(data.draw(st.sampled_from(RAW) | st.binary(max_size=20)))
    for read in (read_config, read_preprocessing, load_detector):
        ends_well(lambda read=read: read(str(folder)))  # type: ignore[misc]
