"""What a teacher's cache and a training are computed in, and that a cache says so of itself and is gone on with alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_cache_identity import config, identity, manifest_of, work  # noqa: F401  (a fixture)
from torch import nn

from pipelines.caching import driver
from pipelines.caching.actors import TeacherActor
from pipelines.caching.plan import make_cache_plan
from pipelines.cluster import devices
from qskd.checks import check_cache
from qskd.config import Config
from qskd.datasets.manifest import load_manifest
from qskd.errors import QskdError
from qskd.teacher.cache import finished_file, write_rows
from qskd.teacher.identity import computed_by
from qskd.teacher.making import CacheMaker
from qskd.teacher.manifest import check_computed, load_cache_manifest, save_cache_manifest


@pytest.fixture
def plain_float32() -> Iterator[None]:
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("plain_float32")
def test_where_a_gpu_computes_float32_products_are_tf32_and_on_a_cpu_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert devices.device_of("cpu").type == "cpu"
    assert devices.pick_device("cpu").type == "cpu"
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.device_of("auto").type == "cuda"
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(
    ("asked", "expected"), [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_a_cache_is_computed_in_float32_unless_bfloat16_is_asked_for(
    asked: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qskd.precision.has_bfloat16", lambda: True)
    teacher = tiny.random_teacher()
    maker = CacheMaker(tiny.recipe(None, f"compute.precision={asked}"), teacher, torch.device("cpu"))
    found: list[torch.dtype] = []
    convolution = next(module for module in teacher.modules() if isinstance(module, nn.Conv2d))
    convolution.register_forward_hook(lambda module, args, output: found.append(output.dtype))
    maker.ask(tiny.arrays((1, 2)))
    assert found == [expected]


CPU = {"computed.device": "cpu", "computed.precision": "float32"}


def begun(config: Config, here: dict[str, str], **changes: Any) -> Any:
    manifest = manifest_of(config, **changes)
    return replace(manifest, identity={**manifest.identity, **here})


@pytest.mark.parametrize(
    ("field", "value"), [("computed.device", "cuda"), ("computed.precision", "bfloat16")], ids=["device", "precision"]
)
def test_a_cache_is_gone_on_with_only_as_it_was_begun(
    work: Path,  # noqa: F811
    field: str,
    value: str,
) -> None:
    mine = config(work)
    check_computed(begun(mine, CPU), CPU, "here")
    with pytest.raises(QskdError) as caught:
        check_computed(begun(mine, CPU), CPU | {field: value}, "here")
    assert f'{field} is "{CPU[field]}" in the cache, "{value}" in this job' in caught.value.found
    check_computed(manifest_of(mine), CPU | {field: value}, "here")  # one of before this was kept does not say


def test_the_recipe_and_the_device_say_what_a_job_computes_in(work: Path) -> None:  # noqa: F811
    assert computed_by(config(work), "cpu") == CPU
    assert computed_by(config(work, "compute.precision=bfloat16"), "cuda") == {
        "computed.device": "cuda",
        "computed.precision": "bfloat16",
    }


def test_what_a_cache_was_computed_on_is_in_its_fingerprint_and_no_concern_of_who_reads_it(
    work: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    mine = config(work, f"teacher.cache.path={tmp_path}/cache", "compute.device=cpu", "compute.precision=float32")
    plan = make_cache_plan(mine)
    first = driver._begun(plan, manifest_of(mine, views=0), CPU | {"computed.device": "cuda"})
    assert load_cache_manifest(plan.path) == first
    assert first.fingerprint != driver._begun(plan, manifest_of(mine, views=0), CPU).fingerprint

    save_cache_manifest(plan.path, first)
    write_rows(plan.path, "shard.view-000.parquet", [], first.fingerprint)
    assert finished_file(plan.path, "shard.view-000.parquet", 0, first.fingerprint)
    again = make_cache_plan(mine)  # its files are known as its own by its own fingerprint
    assert again.existing == first
    with pytest.raises(QskdError, match=r"computed\.device is \"cuda\" in the cache, \"cpu\" in this job"):
        driver._begun(again, first, CPU)
    with pytest.raises(QskdError, match="no view 0"):  # past the identity: a training on a CPU may read it
        check_cache(mine, load_manifest(mine.data.train))


def test_an_actor_on_another_device_than_the_cache_names_computes_nothing(
    work: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    mine = config(work, f"teacher.cache.path={tmp_path}/cache", "compute.device=cuda")
    actor = TeacherActor.__new__(TeacherActor)
    actor.config, actor.maker = mine, CacheMaker(mine, tiny.random_teacher(), torch.device("cpu"))
    with pytest.raises(QskdError, match="computes on cpu"):
        actor._check_device()
