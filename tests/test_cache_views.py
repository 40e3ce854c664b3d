"""Views of a cache that the recipe asks for no longer, and a job that goes on after a kill."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from test_loader import Pictures
from test_teacher_cache import ASPECT, LABELS, cache_config
from tiny import random_teacher

from benchmarks.local_cache import make_cache
from pipelines.caching import driver
from pipelines.caching import verify as verifying
from pipelines.caching.plan import CachePlan
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shards import write_shards
from qskd.detectors import Preprocessing
from qskd.errors import QskdError
from qskd.storage.files import UNFINISHED
from qskd.teacher.cache import SPOOL


def test_a_cache_of_more_views_than_the_recipe_asks_for_is_verified_by_those_that_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are no views of this recipe: number 1 of one view is derived from number 0, and has its crop."""
    data, path = str(tmp_path / "shards"), str(tmp_path / "cache")
    write_shards(Pictures(12), data, rows_per_shard=8, rows_per_group=3)
    teacher = random_teacher("refined", LABELS, ("N/A", "nine", "N/A", "three", "other", "eight"))
    two = cache_config(data, path)
    existing = make_cache(two, teacher, ASPECT)
    assert sorted(existing.views) == [0, 1]
    views = two.data.views.model_copy(update={"count": 1})
    one = two.model_copy(update={"data": two.data.model_copy(update={"views": views})})
    monkeypatch.setattr(verifying, "make_teacher", lambda *_: teacher)
    monkeypatch.setattr(verifying, "teacher_preprocessing", lambda _: Preprocessing(ASPECT))
    monkeypatch.setattr(
        verifying, "make_cache_plan", lambda config: CachePlan(config, load_manifest(data), {}, existing, {})
    )
    for config in (two, one):
        errors = verifying._errors(config, 24, 0)
        assert errors["boxes_cxcywh"] == 0
        verifying.complain(config, errors)


def test_what_a_killed_job_left_goes_when_the_next_one_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when one ends: a job that is killed each night would fill the disk."""
    data, cache = str(tmp_path / "shards"), tmp_path / "cache"
    write_shards(Pictures(12), data, rows_per_shard=8, rows_per_group=3)
    cache.mkdir()
    left = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=cache))
    (left / SPOOL).write_bytes(b"half a file")
    seen: list[bool] = []

    def stopped(*_: object) -> None:
        seen.append(left.exists())
        raise QskdError("the teacher", "stopped here")

    monkeypatch.setattr(driver, "make_teacher", stopped)
    plan = CachePlan(cache_config(data, str(cache)), load_manifest(data), {}, None, {})
    with pytest.raises(QskdError, match="stopped here"):
        driver._run(plan, False, True, ())
    assert seen == [False]
