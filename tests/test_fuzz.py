"""No input of any kind ends in anything but success or a QskdError, in bounded time and memory.

Examples are the same each time. To look for new faults: QSKD_FUZZ_EXAMPLES=3000 QSKD_FUZZ_SEED=7 pytest tests/test_fuzz.py
"""

from __future__ import annotations

import hashlib
import io
import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from odd import DEEP, NAMES, SCALARS, bounded, ends_well, mutated, with_depth
from PIL import Image

from qskd.cache_manifest import CacheManifest, CacheSizes, file_name, fingerprint_of, save_cache_manifest
from qskd.classes import map_classes
from qskd.coco import read_coco
from qskd.config import Config, ResizeConfig, ViewConfig
from qskd.loader import BatchLoader
from qskd.manifest import load_manifest
from qskd.plots import draw_boxes
from qskd.recipe import build, changes, flatten, load, to_tree, to_yaml
from qskd.samples import SCHEMA
from qskd.shards import ShardReader, read_annotations, verify, write_shards
from qskd.teacher_cache import FINGERPRINT_KEY, TeacherCacheReader, TeacherRow, collate, write_rows

MOST_MB = 1500  # that all examples together may add to the process

COCO: dict[str, Any] = {
    "info": {"year": 2026},
    "images": [
        {"id": 7, "file_name": "a.png", "width": 8, "height": 6},
        {"id": 9, "file_name": "b.png", "width": 8, "height": 6},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 2.5], "area": 7.5, "iscrowd": 0},
        {"id": 2, "image_id": 9, "category_id": 2, "bbox": [0.5, 0, 7, 6], "iscrowd": 1},
    ],
    "categories": [{"id": 5, "name": "cat", "supercategory": "animal"}, {"id": 2, "name": "dog"}],
}
RECIPE = changes(
    build(
        {
            "name": "fuzz",
            "data": {"train": "a", "val": "b", "views": {"count": 2}},
            "student": {"backbone": {"hidden_sizes": [8, 16], "depths": [1, 1]}, "width": 64, "resize": {"size": 64}},
            "teacher": {"path": "t", "cache": {"path": "c"}, "class_map": {"cat": "lynx", "dog": "17"}},
            "training": {"epochs": 2, "learning_rate": 0.01},
            "distillation": {"selection": {"boundaries": [0.2], "band_weights": [0.0, 1.0]}},
        }
    )
)
FIELDS = sorted(flatten(to_tree(Config())))


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    scale = 1024 if sys.platform != "darwin" else 1024**2  # to MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / scale < MOST_MB


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((6, 8, 3), 90, np.uint8)).save(folder / name)
    return folder


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


# --- COCO JSON ------------------------------------------------------------------------------------------------------
def _read_coco(raw: bytes, pictures: Path, mode: Any) -> None:
    path = pictures.parent / "instances.json"
    path.write_bytes(raw)

    def read() -> None:
        from pipelines.prepare import describe

        dataset = read_coco(path, pictures, mode)
        destination = pictures.parent / "made"
        shutil.rmtree(destination, ignore_errors=True)
        manifest = write_shards(dataset, str(destination))
        assert load_manifest(str(destination)).fingerprint == manifest.fingerprint
        describe(manifest, str(destination)).encode()
        assert all(np.isfinite(value).all() for value in read_annotations(str(destination)).values())

    ends_well(read)


@bounded
@given(document=mutated(COCO), mode=st.sampled_from(["stop", "skip"]))
def test_coco_json(pictures: Path, document: Any, mode: str) -> None:
    _read_coco(with_depth(json.dumps(document)).encode(), pictures, mode)


RAW = (
    *(
        b"",
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b"\xff",
        b"[]",
        b"7",
        b"null",
        b'"text"',
        b"{",
        b"\x00" * 9,
        b"NaN",
    ),
    *(b"[" * 200_000, b'{"a":' * 200_000, b'{"images": null, "annotations": [], "categories": []}', b"1" * 5000),
    b'{"images": [], "images": [], "annotations": [], "categories": [{"id": 1, "name": "\xed\xa0\x80"}]}',
)


@bounded
@given(raw=st.one_of(st.sampled_from(RAW), st.binary(max_size=40)), mode=st.sampled_from(["stop", "skip"]))
def test_bytes_that_are_no_coco_json(pictures: Path, raw: bytes, mode: str) -> None:
    _read_coco(raw, pictures, mode)


@bounded
@given(name=st.sampled_from(NAMES) | st.text(max_size=300), mode=st.sampled_from(["stop", "skip"]))
def test_file_names_and_class_names_of_a_dataset(pictures: Path, name: str, mode: str) -> None:
    document = json.loads(json.dumps(COCO))
    document["images"][0]["file_name"] = name
    _read_coco(json.dumps(document).encode(), pictures, mode)
    document = json.loads(json.dumps(COCO))
    document["categories"][0]["name"] = name
    _read_coco(json.dumps(document).encode(), pictures, mode)


# --- recipes --------------------------------------------------------------------------------------------------------
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join(['*' + old] * 9)}]}}\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
YAMLS = (
    *("", " ", "~", "- a", "7", "text", "a: b: c", "a: [", "a: {b", "\t", "%TAG", "--- a\n--- b", "? [a]\n: b", "1: 2"),
    *("!!python/object:os.system x", "!!python/name:os.system", "name: !!binary x", "name: !!int x", "name: !!bool x"),
    *("seed: !!int ''", "name: !!timestamp x", "name: 2026-99-99", "name: 2026-01-01", "seed: .inf", "seed: .nan"),
    *(
        "seed: 0x" + "f" * 5000,
        "seed: " + "9" * 5000,
        "seed: 1" + ":1" * 5000,
        "seed: 1_0",
        "name: a\nname: b",
        "<<: 7",
    ),
    *("a: &a [*a]", "a: &a {b: *a}", "&a [*a]", "data: &d {train: *d}", "<<: &m {<<: *m}", "a: *b", "name: \x1b[31m"),
    *('name: "\\0"', 'data: {train: "a\\0b"}', 'data: {train: "\\ud800"}', "data: {train: \ud800}", "student: 5"),
    *("[" * 3000, "{a: " * 3000, "- " * 3000, "a:\n" + "".join(" " * n + "a:\n" for n in range(1, 400)), BOMB, MERGES),
    *(
        "a: " + "x" * 2_000_000,
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!pairs [a: b]",
        "name: !!str [a]",
        "seed: !!float ''",
    ),
    *("teacher: {class_map: {1: 2}}", "teacher: {class_map: {[a]: b}}", "student: {backbone: {depths: !!set {1, 2}}}"),
    *("student: {feature_levels: 99999999999999, family: rt_detr}", "student: {resize: {size: 99999999999999999999}}"),
    *(
        "teacher: &t {resize: {size: 64}}\nstudent: *t",
        "\ufeffname: a",
        "name: " + "a" * 100_000,
        "student: {size: [s]}",
    ),
)


def _recipe(text: str | bytes, folder: Path, overrides: tuple[str, ...] = ()) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))

    def read() -> None:
        config = load(path, overrides)
        assert build(yaml.safe_load(to_yaml(config))) == config
        flatten(changes(config))
        for uri in (config.data.train, config.output):
            ends_well(lambda uri=uri: load_manifest(uri))  # type: ignore[misc]

    ends_well(read)


@bounded
@given(tree=mutated(RECIPE))
def test_recipes(pictures: Path, tree: Any) -> None:
    try:
        text = yaml.safe_dump(tree)
    except UnicodeEncodeError:
        text = json.dumps(tree)  # which is YAML too
    _recipe(text, pictures.parent)
    _recipe(json.dumps(tree).replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000), pictures.parent)


@bounded
@given(
    text=st.sampled_from(YAMLS)
    | st.binary(max_size=30)
    | st.text(alphabet="ab:-[]{}&*!<>|?,#%@'\"\\ \n\t1.e", max_size=40)
)
def test_texts_that_are_no_recipe(pictures: Path, text: Any) -> None:
    _recipe(text, pictures.parent)


@bounded
@given(
    field=st.sampled_from([*FIELDS, *NAMES, "data", "student.", ".", "a." * 5000 + "b"]),
    value=st.sampled_from([*YAMLS, *NAMES]) | SCALARS.map(lambda value: f"{value}") | st.text(max_size=10),
    equals=st.sampled_from(["=", "=", "=", "", "=="]),
)
def test_overrides(pictures: Path, field: str, value: str, equals: str) -> None:
    def read() -> None:
        config = load(None, [f"{field}{equals}{value}"])
        assert build(yaml.safe_load(to_yaml(config))) == config

    ends_well(read)


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
def test_shard_manifests(shards: Path, tmp_path_factory: pytest.TempPathFactory, data: Any, signed: bool) -> None:
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


# --- names ----------------------------------------------------------------------------------------------------------
@bounded
@given(names=st.lists(st.sampled_from(NAMES) | st.text(max_size=40), min_size=3, max_size=3))
def test_class_names_in_pictures_and_maps(names: list[str]) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    draw_boxes(image, np.array([[1, 1, 20, 20], [5, 5, 50, 30]]), [0, 1], [0.5, 0.75], names)
    ends_well(lambda: map_classes(names[:2], names, {}))
    ends_well(lambda: map_classes(names[:2], ["a", "b"], {names[0]: names[2]}))
