"""A recipe's several caches: memory of all in one basis, the first one's directions beside each; and numbers that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_teacher_cache import cache, cache_config, data, teacher  # noqa: F401  (fixtures)
from test_tune_plan import sweep_config
from test_tune_plan import work as swept  # noqa: F401  (fixture)
from test_unlabeled import cached, config, trained, work  # noqa: F401  (fixture)
from test_whitening import decoder_of, replace_features
from tiny import random_teacher

from pipelines.caching import driver
from pipelines.caching.actors import Source, decode
from pipelines.caching.basis import bases_there
from pipelines.caching.directions import add_directions
from pipelines.caching.plan import make_cache_plans
from pipelines.run.resolve import resolve
from pipelines.selecting.job import plan_of
from pipelines.training.estimate import estimate
from pipelines.training.plan import make_plan
from pipelines.tuning.calibration import calibrate
from qskd.checks import check_decoder
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shards import ShardReader
from qskd.datasets.unlabeled.joined import source_manifest
from qskd.distillation.qskd.whitening import metric
from qskd.errors import QskdError
from qskd.from_recipe import make_teacher
from qskd.teacher.identity import cache_sources, teacher_preprocessing
from qskd.teacher.making import CacheMaker
from qskd.teacher.memory.basis import digest_of, sampled
from qskd.teacher.memory.directions import FILES, compute_sensitivities
from qskd.teacher.memory.moments import Directions

torch.set_num_threads(1)
WHITENED = ("distillation.features.whitening=1.0",)
BY_DECODER = (*WHITENED, "distillation.features.whitened_by=decoder")
SHARE = "teacher.cache.memory_share=0.9"


@pytest.mark.parametrize("fields", [WHITENED, BY_DECODER])
def test_the_first_caches_directions_are_those_of_the_others_too(fields: tuple[str, ...], work: Path) -> None:  # noqa: F811
    given = cached(work, f"cache-{'whitened' if fields == WHITENED else 'by-decoder'}", *fields)
    plans = make_cache_plans(given)
    for plan in plans:
        Path(plan.path, FILES["variance"]).unlink(missing_ok=True)
    assert driver.lacks_something(plans)
    with pytest.raises(QskdError, match="a cache without the directions") as caught:
        make_plan(given, "distill")
    assert caught.value.where == plans[0].path
    assert "the directions of the memory are missing" in driver.foresee(given)
    add_directions([plan.config for plan in plans], quiet=True)
    assert not driver.lacks_something(plans)
    free = f"{work}/free"
    one, other = (Path(plan.path, FILES["decoder" if fields == BY_DECODER else "variance"]) for plan in plans)
    assert len(pq.read_table(one)) == len(pq.read_table(other)) > 0  # `qskd select` looks at one folder alone
    assert pq.read_table(one).equals(pq.read_table(other))
    assert plan_of(given, free, load_manifest(free)).folder[1].num_images == 9
    assert driver.foresee(given).count("nothing is missing") == 2
    assert trained(given, 1).step == 1


def test_images_that_come_before_others_in_the_recipe_later_are_kept_in_the_others_basis(work: Path) -> None:  # noqa: F811
    free = make_cache_plans(cached(work, "cache-free", SHARE, "data.train="))
    both = resolve(config(work, f"teacher.cache.path={work}/cache-free", SHARE), "cache")
    assert [plan.existing is None for plan in make_cache_plans(both)] == [True, False]
    known = bases_there(make_cache_plans(both))
    assert known
    assert digest_of(known) == digest_of(bases_there(free))
    assert bases_there(make_cache_plans(resolve(both, "cache"), overwrite=True)) == ()


def test_caches_in_two_bases_are_refused_before_anything_is_computed(work: Path) -> None:  # noqa: F811
    given = cached(work, "cache-apart", SHARE)  # each in a basis of its own
    free = cache_sources(given)[1].teacher.cache.path
    for ask in (lambda: make_cache_plans(given), lambda: make_plan(given, "distill")):
        with pytest.raises(QskdError, match=r"memory_share[\s\S]*delete this folder") as caught:
            ask()
        assert caught.value.where == free


def test_a_basis_is_not_made_of_a_memory_that_is_not_finite(work: Path) -> None:  # noqa: F811
    given = resolve(config(work, f"teacher.cache.path={work}/cache-nan", SHARE, "data.unlabeled=[]"), "cache")
    broken = make_teacher(given, source_manifest(given.data).labels)
    assert broken is not None
    with torch.no_grad():
        dict(broken.detector.named_parameters())["model.model.encoder.layers.0.final_layer_norm.weight"][0] = torch.nan
    source: Source = (given.data.train, given.data.views, teacher_preprocessing(given).resize, True)
    with pytest.raises(QskdError, match=r"not a finite answer to image \d+"):
        CacheMaker(given, broken, torch.device("cpu")).bases_of(
            decode(source, list(sampled(ShardReader(given.data.train), 4)))
        )


def test_a_decoder_whose_answers_are_not_finite_has_no_directions(cache: str, data: str) -> None:  # noqa: F811
    broken = decoder_of(random_teacher("refined", ("three", "eight", "nine"), ("nine", "three", "eight")))
    with torch.no_grad():
        next(p for name, p in broken.detector.named_parameters() if "decoder.layers.0.self_attn.v_proj" in name).fill_(
            torch.nan
        )
    with pytest.raises(QskdError, match=r"whitened_by: decoder, and an answer[\s\S]*whitened_by=variance"):
        compute_sensitivities(cache, broken)


def test_a_memory_that_varies_nowhere_where_the_decoder_looks_counts_every_direction_alike() -> None:
    eye, zeros = np.eye(3, dtype=np.float32), np.zeros(3, np.float32)
    varies = np.array([0, 2, 1], np.float32)
    looks = np.array([1, 0, 0], np.float32)
    for sensitivities in (zeros, looks):
        assert torch.equal(metric(Directions(varies, eye, sensitivities), 1.0, 0.97), torch.eye(3))


def test_attended_cells_alone_are_not_what_a_decoder_is_asked_about(cache: str, data: str) -> None:  # noqa: F811
    attended = cache_config(data, cache, cells="attended")
    by_decoder = replace_features(attended, whitening=1.0, whitened_by="decoder", background=0.0)
    with pytest.raises(QskdError, match=r"teacher\.cache\.cells: attended[\s\S]*cells=all"):
        check_decoder(by_decoder)
    check_decoder(replace_features(attended, whitening=1.0, background=0.0))


def test_a_dry_run_counts_the_bytes_that_a_small_cache_has(swept: Path, work: Path) -> None:  # noqa: F811
    whole = calibrate(sweep_config(swept), budget_s=0.01)
    few = calibrate(sweep_config(swept, "teacher.cache.memory_share=0.5"), budget_s=0.01)
    assert whole.stored_bytes - few.stored_bytes > 20 * 64  # of 64 numbers a cell, in 64 cells, most are gone
    assert whole.cached_bytes - few.cached_bytes == pytest.approx(whole.stored_bytes - few.stored_bytes)
    missing = config(
        work, f"teacher.cache.path={work}/cache-none", "teacher.cache.memory_share=0.5", "data.unlabeled=[]"
    )
    assert estimate(make_plan(resolve(missing, "distill"), "distill", dry=True)).steps
