"""No input of any kind ends in anything but success or a QskdError, in bounded time and memory.

Examples are the same each time. To look for new faults: QSKD_FUZZ_EXAMPLES=3000 QSKD_FUZZ_SEED=7 pytest tests/test_fuzz.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from odd import (
    COCO,
    DEEP,
    MOST_MB,
    NAMES,
    RAW,
    SCALARS,
    bounded,
    ends_well,
    every,
    mutated,
    picture_folder,
    resident_mb,
    with_depth,
)

from qskd.config import Config
from qskd.config.recipe import build, changes, flatten, load, to_tree, to_yaml
from qskd.datasets.classes import map_classes
from qskd.datasets.coco import read_coco
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shards import read_annotations, write_shards
from qskd.pictures.plots import draw_boxes

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
    before = resident_mb()
    yield
    assert resident_mb() - before < MOST_MB


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("fuzz") / "images")


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


def _with(*path: Any, value: Any) -> Any:
    """COCO with one value replaced."""
    document = node = json.loads(json.dumps(COCO))
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return document


FOUND_COCO = (
    *(_with("annotations", 0, "bbox", 2, value=value) for value in (10**400, 1e308, float("nan"), DEEP, True)),
    *(_with("annotations", 0, "area", value=value) for value in (1e308, 10**400, float("inf"), DEEP)),
    *(_with("images", 0, "width", value=value) for value in (10**12, -8, 2**70, True, 8.0)),
    *(_with("annotations", 0, key, value=DEEP) for key in ("id", "iscrowd", "bbox", "category_id")),
    *(_with("categories", 0, "supercategory", value=value) for value in (DEEP, "\ud800", {"a": 1}, "x" * 10**5)),
    *(
        _with("annotations", 0, "bbox", value=value)
        for value in ([0, 0, 1e300, 1e300], [-1e308, 0, 1e308, 5], [0] * 10**5)
    ),
    _with("images", value=None),
)


@bounded
@every(example(document=document, mode="skip") for document in FOUND_COCO)
@given(document=mutated(COCO), mode=st.sampled_from(["stop", "skip"]))
def test_coco_json(pictures: Path, document: Any, mode: str) -> None:
    _read_coco(with_depth(json.dumps(document)).encode(), pictures, mode)


@bounded
@every(example(raw=raw, mode="skip") for raw in RAW)
@given(raw=st.one_of(st.sampled_from(RAW), st.binary(max_size=40)), mode=st.sampled_from(["stop", "skip"]))
def test_bytes_that_are_no_coco_json(pictures: Path, raw: bytes, mode: str) -> None:
    _read_coco(raw, pictures, mode)


@bounded
@every(example(name=name, mode="skip") for name in NAMES)
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


FOUND_YAML = (
    *(
        "student: {size: [s]}",
        "name: !!timestamp x",
        "name: 2026-99-99",
        'name: "\\0"',
        "seed: 0x" + "f" * 5000,
        BOMB,
        MERGES,
    ),
    *(
        "[" * 3000,
        "a: &a [*a]",
        "student: {feature_levels: 99999999999999, family: rt_detr}",
        b"\xff\xfe\x00",
        "data: {train: \ud800}",
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
@every(example(text=text) for text in FOUND_YAML)
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


# --- names ----------------------------------------------------------------------------------------------------------
@bounded
@given(names=st.lists(st.sampled_from(NAMES) | st.text(max_size=40), min_size=3, max_size=3))
def test_class_names_in_pictures_and_maps(names: list[str]) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    draw_boxes(image, np.array([[1, 1, 20, 20], [5, 5, 50, 30]]), [0, 1], [0.5, 0.75], names)
    ends_well(lambda: map_classes(names[:2], names, {}))
    ends_well(lambda: map_classes(names[:2], ["a", "b"], {names[0]: names[2]}))
