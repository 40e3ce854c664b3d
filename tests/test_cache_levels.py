"""Some of a teacher's memory maps, and of each map some cells: the same lesson, in fewer bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_feature_methods import settings_of as build
from test_loader import Pictures
from test_teacher_cache import EVERYTHING, LABELS, cache_config, losses, stream_of
from tiny import STUDENT, own, random_teacher

from benchmarks.local_cache import make_cache
from pipelines.caching.levels import levels_read
from qskd.checks import check_decoder, check_enough
from qskd.config import Config, StudentConfig
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shards import write_shards
from qskd.detectors import save_detector
from qskd.distillation.method import Facts, build_method
from qskd.errors import QskdError
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.attended import attended_cells, packed, silenced, unpacked
from qskd.teacher.columns.table import TeacherRow
from qskd.teacher.identity import cache_identity
from qskd.teacher.manifest import load_cache_manifest
from qskd.teacher.online import OnlineTeacher, facts_of

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("shards"))
    write_shards(Pictures(10), folder, rows_per_shard=8, rows_per_group=3)
    return folder


def of_levels(levels: tuple[int, ...] | None) -> OnlineTeacher:
    whole = random_teacher("refined", LABELS, LABELS)
    return OnlineTeacher(whole.detector, tuple(range(len(LABELS))), whole.preprocessing, levels)


def with_levels(config: Config, levels: tuple[int, ...]) -> Config:
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"levels": levels})})


def test_the_map_that_a_student_of_one_map_meets_teaches_it_all_that_all_maps_do(data: str, tmp_path: Path) -> None:
    config = cache_config(data, str(tmp_path / "cache"), "float32")
    whole = of_levels(None)
    (read,) = levels_read(config.student, whole.facts)
    assert whole.facts.cells[read] == pytest.approx(64 * 64 / 8**2)  # the student's stride is 8
    some = of_levels((read,))
    assert some.facts.channels == whole.facts.channels[read : read + 1]
    stream = stream_of(data, "", None)
    expected = losses(config, whole, stream)
    for mine, theirs in zip(losses(config, some, stream), expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)

    kept = with_levels(config, (read,))
    manifest = make_cache(kept, some, some.resize)
    assert manifest.sizes.channels == some.facts.channels
    cached = losses(kept, CachedTeacher(manifest.sizes), stream_of(data, kept.teacher.cache.path, None))
    for mine, theirs in zip(cached, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)

    other = cache_config(data, str(tmp_path / "every"), "float32")
    make_cache(other, whole, whole.resize)
    few, all_ = (TeacherCacheReader(str(tmp_path / name)).read(0, 0, [3])[0] for name in ("cache", "every"))
    start = sum(  # of the map among all
        width * int(np.prod(shape))
        for width, shape in zip(whole.facts.channels[:read], all_.memory_shapes[:read], strict=True)
    )
    assert np.array_equal(few.memory, all_.memory[start : start + few.memory.size])
    assert few.attention.size < all_.attention.size


def test_a_student_reads_the_maps_that_are_nearest_in_cells() -> None:
    teacher = random_teacher("rt_detr", LABELS, LABELS)
    facts = facts_of(teacher.detector, teacher.resize)
    assert len(facts.channels) == 2
    plain = StudentConfig.model_validate({**STUDENT, "family": "detr"})
    finer = StudentConfig.model_validate({**STUDENT, "family": "detr", "resize": {"size": 128}})
    assert (levels_read(plain, facts), levels_read(finer, facts)) == ((1,), (0,))
    several = StudentConfig.model_validate({**STUDENT, **own("d_fine"), "queries": 5})
    assert levels_read(several, facts) == (0, 1)


def test_what_cannot_be_kept_is_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(QskdError, match=r"map 2, and a teacher of 2"):
        of_levels((0, 2))
    with pytest.raises(ValidationError, match="each map once, the finest first"):
        Config.model_validate({"teacher": {"levels": [1, 0]}})
    asks = Config.model_validate({"teacher": {"levels": [1]}, "distillation": {"method": "kd-detr"}})
    with pytest.raises(QskdError, match=r"teacher\.levels.*asks the teacher's decoder"):
        check_decoder(asks)


def test_a_cache_of_some_maps_is_another_than_one_of_all(data: str, tmp_path: Path) -> None:
    teacher = random_teacher("refined", LABELS, LABELS)
    save_detector(teacher.detector, tmp_path / "teacher", teacher.resize)
    config = cache_config(data, str(tmp_path / "cache"))
    config = config.model_copy(
        update={"teacher": config.teacher.model_copy(update={"path": str(tmp_path / "teacher")})}
    )
    before = cache_identity(config, load_manifest(data))
    assert not [name for name in before if "levels" in name]  # the identity of caches from before there was a choice
    assert cache_identity(with_levels(config, (1,)), load_manifest(data)) == before | {"teacher.levels": [1]}
    assert load_cache_manifest(str(tmp_path / "cache")) is None


# --- of each map the cells that attention reaches ---------------------------------------------------------------------
def attended(config: Config) -> Config:
    cache = config.teacher.cache.model_copy(update={"cells": "attended"})
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"cache": cache})})


def slow_cells(row: Any) -> list[bool]:
    """Those of which some kept query's attention, or a neighbour's, is not 0."""
    found, start = [], 0
    for high, wide in row.memory_shapes.tolist():
        reached = row.attention[:, start : start + high * wide].reshape(-1, high, wide)
        for y in range(high):
            for x in range(wide):
                near = reached[:, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                found.append(bool((near > 0).any()))
        start += high * wide
    return found


@pytest.mark.parametrize("family", ["conditional", "refined"])
def test_attended_cells_teach_what_all_cells_do_and_no_other_is_kept(data: str, family: str, tmp_path: Path) -> None:
    teacher = random_teacher(family, LABELS, LABELS)
    for part in teacher.detector.modules():  # looks that differ: random ones are all but even
        if "sampling_offsets" in dict(part.named_modules()):
            part.sampling_offsets.bias.data.mul_(3.0)
    every = cache_config(data, str(tmp_path / "every"), attention_giou_floor=0.2)
    every = every.model_copy(update={"distillation": build(method="qskd", selection={"boundaries": [0.2]})})
    some = attended(cache_config(data, str(tmp_path / "some"), attention_giou_floor=0.2))
    some = some.model_copy(update={"distillation": every.distillation})
    said = [make_cache(config, teacher, teacher.resize) for config in (every, some)]
    assert said[1].num_bytes < said[0].num_bytes
    readers = [TeacherCacheReader(config.teacher.cache.path, EVERYTHING) for config in (every, some)]
    assert [reader.attended for reader in readers] == [False, True]
    dropped = 0
    for whole, part in zip(*(reader.read(0, 1, range(8)) for reader in readers), strict=True):
        kept, at, cell = np.array(slow_cells(whole)), 0, 0
        for width, (high, wide) in zip(teacher.facts.channels, whole.memory_shapes.tolist(), strict=True):
            cells = high * wide
            here = kept[cell : cell + cells]
            mine, theirs = (row.memory[at : at + width * cells].reshape(width, cells) for row in (part, whole))
            assert np.array_equal(mine[:, here], theirs[:, here])
            assert not mine[:, ~here].any()
            at, cell, dropped = at + width * cells, cell + cells, dropped + int((~here).sum())
        assert np.array_equal(part.attention, whole.attention)
    assert dropped > 0

    mine, theirs = (
        losses(
            config,
            CachedTeacher(manifest.sizes, attended=config is some),
            stream_of(data, config.teacher.cache.path, None),
        )
        for config, manifest in zip((some, every), reversed(said), strict=True)
    )
    assert mine == theirs  # to the last bit: on the same grid nothing else is read


@pytest.mark.parametrize("precision", ["int8", "float16", "float32"])
def test_a_row_of_attended_cells_comes_back_and_damage_is_an_error(precision: str) -> None:
    rng = np.random.default_rng(0)
    kind = {"int8": "|i1", "float16": "<f2", "float32": "<f4"}[precision]
    shapes, widths = np.array([[5, 7], [3, 3]], np.int32), (4, 6)
    attention = (rng.random((3, 35 + 9)) < 0.05).astype(np.uint8)
    memory = rng.integers(-9, 9, 4 * 35 + 6 * 9).astype(kind)
    row = TeacherRow(1, memory_shapes=shapes, memory=memory, attention_queries=np.arange(3), attention=attention)
    assert attended_cells(row).tolist() == slow_cells(row)
    quiet = silenced(row, widths)
    stored = packed(quiet, widths).memory
    assert stored.nbytes < memory.nbytes
    assert np.array_equal(unpacked(stored, shapes, widths), quiet.memory)
    for broken in (stored[:-1], np.concatenate([stored, stored[:1]]), stored[:0]):
        with pytest.raises(ValueError, match="memory has"):
            unpacked(broken, shapes, widths)
    for strange in (-shapes, shapes[:1], shapes * 1000):
        with pytest.raises(ValueError, match="maps of"):
            unpacked(stored, strange, widths)
    nobody = replace(row, attention_queries=np.zeros(0, np.int32), attention=np.zeros((0, 0), np.uint8))
    assert not unpacked(packed(silenced(nobody, widths), widths).memory, shapes, widths).any()


def test_what_reads_other_cells_is_refused_with_the_field(tmp_path: Path) -> None:
    cache: dict[str, Any] = {"cells": "attended", "attention_giou_floor": 0.0}
    check_enough(Config.model_validate({"teacher": {"cache": cache}}))
    for section, words in (
        ({"features": {"background": 0.1}}, r"(?s)features\.background: 0\.1.*set it to 0, or make a cache"),
        ({"method": "mimic"}, r"(?s)distillation\.method: mimic.*make a cache with --set teacher\.cache\.cells=all"),
        ({"also": {"mimic": {}}}, r"(?s)also\.mimic\.method: mimic.*do: make a cache"),
    ):
        with pytest.raises(QskdError, match=words):
            check_enough(Config.model_validate({"teacher": {"cache": cache}, "distillation": section}))


def test_crops_of_attended_cells_are_refused_for_they_read_further() -> None:
    tree = {"teacher": {"cache": {"cells": "attended", "attention_giou_floor": 0.0}}}
    views = {"views": {"derived": "flip_and_crop", "crop_probability": 0.5}}
    with pytest.raises(QskdError, match=r"derived=flip; or make a cache"):
        check_enough(Config.model_validate({**tree, "data": views}))


def test_a_student_too_coarse_for_the_kept_cells_is_refused() -> None:
    fine, coarse = Facts((8,), (64.0,)), Facts((8,), (9.0,))
    settings = build(method="qskd")
    build_method(settings, coarse, fine)
    with pytest.raises(QskdError, match=r"2\.7 times as wide as those of the teacher's map 0"):
        build_method(settings, coarse, replace(fine, attended=True))
    build_method(settings, replace(coarse, cells=(16.0,)), replace(fine, attended=True))
