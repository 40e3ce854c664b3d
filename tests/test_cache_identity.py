"""Whose outputs a cache holds: every way in which it can be another's is named, with both sides."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loader import Pictures
from tiny import TEACHER, random_teacher, silent_student

from pipelines.caching.plan import make_cache_plan
from qskd.checks import check_cache, check_enough
from qskd.config import Config, StudentConfig
from qskd.config.recipe import apply_overrides, build
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shards import write_shards
from qskd.detectors import save_detector
from qskd.errors import QskdError
from qskd.storage.files import sha256_of
from qskd.teacher.identity import cache_identity, cache_names
from qskd.teacher.manifest import (
    CacheManifest,
    CacheSizes,
    check_identity,
    check_views,
    fingerprint_of,
    save_cache_manifest,
    sizes_of,
)

LABELS = ("three", "eight", "nine")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("identity")
    write_shards(Pictures(10), str(root / "data"), rows_per_shard=8)
    write_shards(Pictures(11), str(root / "other-data"), rows_per_shard=8)
    teacher = random_teacher("conditional", LABELS, LABELS)
    save_detector(teacher.detector, root / "teacher", teacher.preprocessing.resize)
    return root


def config(work: Path, *overrides: str) -> Config:
    tree = {"data": {"train": str(work / "data")}, "teacher": {"path": str(work / "teacher")}}
    return build(apply_overrides(tree, overrides))


def identity(config: Config) -> dict[str, Any]:
    return cache_identity(config, load_manifest(config.data.train))


def manifest_of(config: Config, views: int = 1) -> CacheManifest:
    shards = load_manifest(config.data.train).shards
    files = tuple((shard.rows, 10) for shard in shards)
    sizes = CacheSizes(1, 10, 3, (64,))
    names = tuple(shard.file for shard in shards)
    return CacheManifest(identity(config), sizes, 16, names, dict.fromkeys(range(views), files))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("data.train={work}/other-data", "data.train"),
        ("data.views.seed=7", "data.views.seed is 0 in the cache, 7 in the recipe"),
        ("data.views.flip_probability=0.25", "data.views.flip_probability is 0.5 in the cache, 0.25 in the recipe"),
        ("data.views.crop_probability=0.5", "data.views.crop_probability"),
        ("data.views.min_visible=0.5", "data.views.min_visible"),
        ("teacher.resize={size: 96}", "teacher.resize"),
        ("teacher.class_map={three: eight, eight: three}", "teacher.class_slots"),
        ("teacher.cache.precision=float16", 'teacher.cache.precision is "int8" in the cache, "float16" in the recipe'),
        ("teacher.cache.attention_giou_floor=0.4", "teacher.cache.attention_giou_floor is 0.3 in the cache, 0.4"),
        ("teacher.cache.attention_layers=mean", "teacher.cache.attention_layers"),
        ("teacher.cache.all_layers=true", "teacher.cache.all_layers"),
        ("detection.giou_cost=3", "detection.giou_cost is 2.0 in the cache, 3.0 in the recipe"),
    ],
)
def test_a_cache_of_other_outputs_is_refused_with_both_sides(work: Path, override: str, field: str) -> None:
    mine, other = config(work), config(work, override.replace("{work}", str(work)))
    check_identity(manifest_of(mine), identity(mine), "here")
    with pytest.raises(QskdError) as caught:
        check_identity(manifest_of(mine), identity(other), "here")
    assert field in caught.value.found
    assert caught.value.found.count(" in the cache") == 1
    assert fingerprint_of(identity(mine)) != fingerprint_of(identity(other))


@pytest.mark.parametrize(
    "override",
    [
        "data.views.count=9",
        "data.views.derived=flip",
        "seed=5",
        "teacher.cache.path=/elsewhere",
        "student.queries=7",
        "detection.class_weight=2",
    ],
)
def test_what_does_not_decide_the_outputs_makes_no_other_cache(work: Path, override: str) -> None:
    check_identity(manifest_of(config(work)), identity(config(work, override)), "here")


def test_derived_crops_read_a_cache_of_whole_images_whatever_the_crops_are(work: Path) -> None:
    crops = ["data.views.crop_probability=0.9", "data.views.crop_min_scale=0.7", "data.views.min_visible=0.5"]
    derived = identity(config(work, "data.views.derived=flip_and_crop", *crops))
    assert derived == identity(config(work))
    assert derived != identity(config(work, "data.views.derived=flip", *crops))


def test_other_weights_of_the_same_architecture_are_another_teacher(work: Path, tmp_path: Path) -> None:
    other = random_teacher("conditional", LABELS, LABELS, seed=8)
    save_detector(other.detector, tmp_path / "teacher", other.preprocessing.resize)
    with pytest.raises(QskdError, match=r"teacher\.weights_sha256 is \"[0-9a-f]{11}….*in the recipe"):
        check_identity(manifest_of(config(work)), identity(config(work, f"teacher.path={tmp_path}/teacher")), "here")


def test_the_two_teachers_and_the_two_datasets_are_told_by_name(work: Path, tmp_path: Path) -> None:
    other = random_teacher("conditional", LABELS, LABELS, seed=8)
    save_detector(other.detector, tmp_path / "other", other.preprocessing.resize)
    mine = config(work)
    theirs = config(work, f"teacher.path={tmp_path}/other", f"data.train={work}/other-data")

    def said(manifest: CacheManifest, asked: Config, where: Path) -> str:
        save_cache_manifest(str(where), manifest)
        cached = asked.teacher.model_copy(update={"cache": asked.teacher.cache.model_copy(update={"path": str(where)})})
        asked = asked.model_copy(update={"teacher": cached})
        with pytest.raises(QskdError) as by_training:
            check_cache(asked, load_manifest(asked.data.train))
        with pytest.raises(QskdError) as by_cache:
            make_cache_plan(asked)
        assert str(by_cache.value) == str(by_training.value)
        return by_cache.value.found

    named = replace(manifest_of(mine), made_with=cache_names(mine))
    both = said(named, theirs, tmp_path / "a")
    assert f"made with teacher {work}/teacher, and the recipe's is {tmp_path}/other" in both
    assert f"made with data {work}/data, and the recipe's is {work}/other-data" in both
    assert "data" not in said(named, config(work, f"teacher.path={tmp_path}/other"), tmp_path / "b").partition(";")[0]
    old = said(manifest_of(mine), theirs, tmp_path / "c")  # of before names were kept
    assert f"made with another teacher than {tmp_path}/other" in old
    save_detector(other.detector, tmp_path / "teacher", other.preprocessing.resize)
    changed = replace(manifest_of(mine), made_with={"teacher": f"{tmp_path}/teacher", "data": mine.data.train})
    again = said(changed, config(work, f"teacher.path={tmp_path}/teacher"), tmp_path / "d")
    assert f"made with teacher {tmp_path}/teacher as it was then" in again
    assert "made with" not in said(named, config(work, "detection.giou_cost=3"), tmp_path / "e")


def test_other_configuration_of_the_same_weights_is_another_teacher(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "teacher", tmp_path / "teacher")
    said = json.loads((tmp_path / "teacher" / "config.json").read_text())
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(said | {"transformers_version": "9.9"}))
    moved = config(work, f"teacher.path={tmp_path}/teacher")
    check_identity(manifest_of(config(work)), identity(moved), "here")  # a copy is the same teacher
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(said | {"decoder_attention_heads": 2}))
    with pytest.raises(QskdError, match="config_sha256"):
        check_identity(manifest_of(config(work)), identity(moved), "here")


def test_weights_in_several_files_count_all(work: Path, tmp_path: Path) -> None:
    detector = silent_student(StudentConfig.model_validate(TEACHER), LABELS, 7)
    resize = StudentConfig.model_validate(TEACHER).resize
    digests = []
    for number, change in enumerate((0.0, 0.0, 1.0)):
        with torch.no_grad():
            next(detector.parameters()).add_(change)
        folder = tmp_path / str(number)
        save_detector(detector, folder, resize)
        detector.model.save_pretrained(folder, max_shard_size="20KB")
        assert (folder / "model.safetensors.index.json").exists()
        (folder / "model.safetensors").unlink(missing_ok=True)
        digests.append(identity(config(work, f"teacher.path={folder}"))["teacher.weights_sha256"])
    assert digests[0] == digests[1] != digests[2]


def test_views_that_are_missing_are_named(work: Path) -> None:
    check_views(manifest_of(config(work), views=2), 2, "here")
    with pytest.raises(QskdError, match=r"no view 2, 3\n.*data.views.count is 4"):
        check_views(manifest_of(config(work), views=2), 4, "here")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["distillation.selection.boundaries=[0.2]"], r"reach down to GIoU 0\.2\n.*GIoU 0\.3 or more"),
        (["distillation.selection.relative=true"], "a query of any GIoU can be kept"),
        (["distillation.selection.band_weights=[0.1, 1.0]"], "a query of any GIoU can be kept"),
        (["distillation.features.attention_layers=mean"], r"attention_layers: mean\n.*last, as the cache has it"),
        (["distillation.predictions.teacher_layers=same_index"], r"teacher\.cache\.all_layers=true"),
    ],
)
def test_a_method_that_needs_more_than_the_cache_holds_is_refused(work: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(QskdError, match=said):
        check_enough(config(work, *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["distillation.selection.boundaries=[0.3, 0.6]", "distillation.selection.band_weights=[0, 1, 1]"],
        # Nothing of this asks for attention, so no floor can be too high.
        ["distillation.selection.boundaries=[0.1]", "distillation.features.weight=0"],
        ["distillation.selection.boundaries=[0.1]", "distillation.features.background=1"],
        ["distillation.selection.relative=true", "teacher.cache.attention_giou_floor=-1"],
        ["distillation.method=none", "distillation.selection.boundaries=[0.1]"],
    ],
)
def test_a_method_that_needs_no_more_is_let_through(work: Path, overrides: list[str]) -> None:
    check_enough(config(work, *overrides))


def test_a_teacher_s_weights_are_read_once_a_process_and_not_where_the_cache_is_known(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(work / "teacher", tmp_path / "teacher")
    mine = config(work, f"teacher.path={tmp_path}/teacher", f"teacher.cache.path={tmp_path}/cache")
    read: list[str] = []

    def counted(stream: Any) -> str:
        read.append(stream.name)
        return sha256_of(stream)

    monkeypatch.setattr("qskd.detectors.checkpoint.sha256_of", counted)
    first = identity(mine)
    assert identity(mine) == first
    assert len(read) == 1
    weights = tmp_path / "teacher" / "model.safetensors"
    os.utime(weights, ns=(1, 1))  # written again, perhaps with other numbers
    assert identity(mine) == first
    assert len(read) == 2
    manifest = manifest_of(mine)
    save_cache_manifest(str(tmp_path / "cache"), manifest)
    for name, size in sizes_of(manifest, manifest.views).items():  # all that is looked at of its files
        (tmp_path / "cache" / name).write_bytes(bytes(size))
    weights.unlink()  # a trial of a sweep that has looked asks no teacher
    assert check_cache(mine, load_manifest(mine.data.train), manifest.fingerprint) == manifest
    with pytest.raises(QskdError, match=r"no safetensors|no weights"):
        check_cache(mine, load_manifest(mine.data.train), "another")
