"""Files of shards and of a cache are compared with their manifests before anything starts, by listings alone; a cache's file
that is wrong is named, and made again alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from test_loader import Pictures
from tiny import random_teacher, recipe

from benchmarks.local_cache import make_cache
from pipelines.caching import plan as planning
from pipelines.caching.driver import ViewsLeft, record_finished_views
from pipelines.caching.plan import CachePlan, make_cache_plan
from pipelines.inspection.evaluate import evaluate
from pipelines.run.resolve import resolve
from pipelines.training.plan import make_plan
from pipelines.tuning.driver import plan_without_cache
from qskd import checks
from qskd.config import Config, ResizeConfig
from qskd.datasets.shards import load_manifest, write_shards
from qskd.errors import QskdError
from qskd.storage.listing import wrong_files
from qskd.teacher.manifest import CacheManifest, file_name, load_cache_manifest

IDENTITY = {"teacher.cache.precision": "int8"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data, shards; cache, of a teacher on two views of them."""
    root = tmp_path_factory.mktemp("whole")
    write_shards(Pictures(22), str(root / "data"), rows_per_shard=8, rows_per_group=3)
    make_cache(config(root), random_teacher("refined", ("three", "eight", "nine"), ("nine", "three", "eight")),
               ResizeConfig(size=64), IDENTITY)  # fmt: skip
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`made`, to be spoilt. What a teacher is, which its weights say, is not what is tried."""
    shutil.copytree(made, tmp_path / "here")
    for module in (planning, checks):
        monkeypatch.setattr(module, "cache_identity", lambda *_: IDENTITY)
    return tmp_path / "here"


def config(root: Path) -> Config:
    cache = {"path": f"{root}/cache", "precision": "int8", "attention_giou_floor": -0.9, "batch_size": 4}
    data = {"train": f"{root}/data", "val": f"{root}/data", "views": {"count": 2, "crop_probability": 0.5}}
    return recipe(data=data, output=f"{root}/runs", teacher={"path": f"{root}/teacher", "cache": cache})


def cut(path: Path) -> str:
    """A byte less, in the middle: the file's end can still be read."""
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + whole[101:])
    return f"{path.name} has {len(whole) - 1} bytes instead of {len(whole)}"


def grown(path: Path) -> str:
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"x")
    return f"{path.name} has {size + 1} bytes instead of {size}"


def gone(path: Path) -> str:
    path.unlink()
    return f"{path.name} is missing"


SPOIL = pytest.mark.parametrize("spoil", [cut, grown, gone])
DOORS: dict[str, Callable[[Config], object]] = {
    "distill": lambda config: make_plan(resolve(config, "distill"), "distill"),
    "distill --dry-run": lambda config: make_plan(resolve(config, "distill"), "distill", dry=True),
    "train": lambda config: make_plan(resolve(config, "train"), "train"),
    "cache": make_cache_plan,
    "tune": lambda config: plan_without_cache(resolve(config, "distill")),
    "evaluate": lambda config: evaluate(config.teacher.path, config.data.val),
}


@pytest.mark.parametrize("door", DOORS)
@SPOIL
def test_a_wrong_shard_is_named_before_anything_starts_with_the_command_that_makes_it_again(
    spoil: Callable[[Path], str], door: str, here: Path
) -> None:
    said = spoil(sorted((here / "data").glob("*.parquet"))[1])
    with pytest.raises(QskdError) as raised:
        DOORS[door](config(here))
    assert raised.value.found == said
    source = load_manifest(str(here / "data")).source
    assert f"`qskd prepare {source} IMAGES {here}/data --rows-per-shard 8`" in raised.value.remedy
    assert "overwrite" not in str(raised.value)


@SPOIL
def test_a_wrong_file_of_the_cache_is_named_before_a_distillation_and_no_advice_costs_the_rest(
    spoil: Callable[[Path], str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "check_enough", lambda *_: None)
    checks.check_cache(config(here), load_manifest(str(here / "data")))
    said = spoil(sorted((here / "cache").glob("*.view-001.parquet"))[2])
    with pytest.raises(QskdError) as raised:
        checks.check_cache(config(here), load_manifest(str(here / "data")))
    assert raised.value.found == said
    assert "`qskd cache RECIPE`" in raised.value.remedy
    assert "overwrite" not in str(raised.value)


@SPOIL
def test_the_cache_job_makes_a_wrong_file_again_and_no_other(
    spoil: Callable[[Path], str], here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = spoil(sorted((here / "cache").glob("*.view-001.parquet"))[2])
    assert make_cache_plan(config(here)).todo == [(2, 1)]
    assert said in caplog.text


def test_a_whole_cache_is_found_whole_without_opening_a_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(planning, "finished_file")
    assert make_cache_plan(config(here)).todo == []


def test_a_file_that_was_made_again_with_other_bytes_is_entered_in_the_manifest(here: Path) -> None:
    path = str(here / "cache")
    before = load_cache_manifest(path)
    assert isinstance(before, CacheManifest)
    name = file_name(before.shards[0], 0)
    shutil.copy(here / "cache" / file_name(before.shards[1], 0), here / "cache" / name)  # of as many rows, and whole
    plan: CachePlan = make_cache_plan(config(here))
    assert plan.todo == []  # a killed job's, of another device
    record_finished_views(plan, before, plan.done)
    after = load_cache_manifest(path)
    assert after is not None
    assert after.views[0][0] == before.views[0][1] != before.views[0][0]
    assert wrong_files(path, {name: after.views[0][0][1]}) == {}


class Asked(pafs.FSSpecHandler):
    """fsspec's local files, through which every request is counted, and listings may be empty, as web servers' are."""

    def __init__(self, listing: bool) -> None:
        import fsspec  # type: ignore[import-untyped]

        super().__init__(fsspec.filesystem("file"))
        self.listing, self.listed, self.asked = listing, 0, 0

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        self.listed += 1
        return super().get_file_info_selector(selector) if self.listing else []

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        self.asked += len(paths)
        return super().get_file_info(paths)


@pytest.mark.parametrize("listing", [True, False])
def test_a_store_is_asked_once_and_only_one_that_can_not_list_for_each_file(
    listing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qskd.storage import listing as module

    expected = {}
    for number in range(40):
        (tmp_path / f"{number}.parquet").write_bytes(os.urandom(number + 1))
        expected[f"{number}.parquet"] = number + 1
    store = Asked(listing)
    monkeypatch.setattr(module, "open_folder", lambda _: (pafs.PyFileSystem(store), str(tmp_path)))
    assert wrong_files("store://x", expected) == {}
    assert (store.listed, store.asked) == (1, 0 if listing else 40)
    (tmp_path / "39.parquet").write_bytes(b"")
    (tmp_path / "0.parquet").unlink()
    assert wrong_files("store://x", expected) == {
        "0.parquet": "is missing",
        "39.parquet": "has 0 bytes instead of 40",
    }


def test_a_view_is_looked_at_when_its_last_unit_comes_and_not_before() -> None:
    left = ViewsLeft([(0, 0), (1, 0), (1, 2), (2, 2)])
    assert [left.finished_by([unit]) for unit in ((0, 0), (1, 2), (1, 2), (5, 1))] == [[], [], [], []]
    assert left.finished_by([(2, 2), (1, 0)]) == [2, 0]
    assert left.finished_by([(1, 0)]) == []  # run again after an actor died
