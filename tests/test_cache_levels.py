"""Some of a teacher's memory maps: the same lesson for a student that learns from no other, in fewer bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_loader import Pictures
from test_teacher_cache import LABELS, cache_config, losses, stream_of
from tiny import STUDENT, own, random_teacher

from benchmarks.local_cache import make_cache
from pipelines.caching.levels import levels_read
from qskd.checks import check_decoder
from qskd.config import Config, StudentConfig
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shards import write_shards
from qskd.detectors import save_detector
from qskd.errors import QskdError
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.cached import CachedTeacher
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
