"""What a driver has tried out on its GPU is gone before other processes take that GPU."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_estimate import SIZES, TEACHER

from pipelines.caching import driver
from pipelines.cluster.devices import device_of
from pipelines.cluster.start import give_back_memory
from qskd.config.recipe import load
from qskd.from_recipe import make_teacher


def test_the_cache_job_holds_no_part_of_its_teacher_when_its_actors_start(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[weakref.ref[Any]] = []

    class Starts(Exception):
        pass

    def watched(*args: Any) -> Any:
        teacher = make_teacher(*args)
        assert teacher is not None
        parts.extend(weakref.ref(part) for part in (*teacher.modules(), *teacher.parameters(), *teacher.buffers()))
        return teacher

    def starts() -> None:
        raise Starts

    monkeypatch.setattr(driver, "make_teacher", watched)
    monkeypatch.setattr("pipelines.cluster.start.keep_back_noise", starts)
    monkeypatch.setattr(driver, "quiet_ray_data", starts)  # where Ray is running already
    fields = [f"data.train={here}/train", f"teacher.path={TEACHER}", f"teacher.cache.path={tmp_path}/cache"]
    gc.disable()  # what is gone is gone by the program's doing
    try:
        with pytest.raises(Starts):
            driver.run(load(None, [*SIZES, *fields]), quiet=True)
        assert len(parts) > 100
        assert [part() for part in parts if part() is not None] == []
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_the_gpus_memory_is_given_back_to_the_driver_of_the_device() -> None:
    device = device_of("cuda")
    held = torch.zeros(2**28, dtype=torch.uint8, device=device)
    assert torch.cuda.memory_reserved(device) >= held.numel()
    del held
    give_back_memory()
    assert torch.cuda.memory_reserved(device) < 2**21
