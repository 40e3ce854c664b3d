"""Compute random rows of a cache again and compare (`qskd cache --verify`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from pipelines.caching.actors import decode
from pipelines.caching.plan import make_cache_plan
from pipelines.cluster.devices import device_here
from pipelines.run.resolve import resolve
from qskd.config import Config
from qskd.datasets.shards import ShardReader
from qskd.errors import QskdError
from qskd.from_recipe import make_teacher
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.columns.table import collate, columns_for, decode_batch, largest_errors
from qskd.teacher.identity import cache_sources, cached_needs, teacher_preprocessing
from qskd.teacher.making import CacheMaker, row_batches
from qskd.teacher.manifest import FILE_REMEDY
from qskd.teacher.memory.basis import cached_basis, in_parts


def verify(config: Config, count: int, seed: int = 0) -> dict[str, float]:
    """Recompute random rows, each in the batch it was computed in, and compare: the largest error of each column."""
    errors: dict[str, float] = {}
    for source in cache_sources(resolve(config, "cache")):
        for name, value in _errors(source, count, seed).items():
            errors[name] = max(errors.get(name, 0.0), value)
    return errors


def _errors(config: Config, count: int, seed: int) -> dict[str, float]:
    """Of one folder of images."""
    plan = make_cache_plan(config)
    # Others, of a recipe that asked for more, are no views of this one.
    views = sorted(set(plan.existing.views if plan.existing else ()) & set(range(config.data.views.count)))
    if plan.existing is None or not views:
        raise QskdError(plan.path, "no finished view", "a cache made with this recipe", "run `qskd cache RECIPE`")
    teacher = make_teacher(config, plan.data.labels)
    assert teacher is not None
    if said := plan.existing.identity.get("computed.precision"):
        config = config.model_copy(update={"compute": config.compute.model_copy(update={"precision": said})})
    device = device_here(config)
    torch.set_num_threads(config.compute.threads_per_worker or torch.get_num_threads())
    bases = cached_basis(plan.path, plan.existing)
    maker, resize = CacheMaker(config, teacher, device, bases), teacher_preprocessing(config).resize
    columns = columns_for(cached_needs(config))
    reader, samples = TeacherCacheReader(plan.path, columns), ShardReader(config.data.train)
    rows_there = plan.data.num_images * len(views)
    chosen = np.random.default_rng(seed).choice(rows_there, min(count, rows_there), replace=False)
    starts = np.cumsum([0, *plan.data.shard_rows])
    errors: dict[str, float] = {}
    for number in sorted(chosen.tolist()):
        view = views[number // plan.data.num_images]
        shard = int(np.searchsorted(starts, number % plan.data.num_images, side="right")) - 1
        row = number % plan.data.num_images - int(starts[shard])
        windows = row_batches(samples, shard, view, config.data.views, resize, plan.existing.batch_size)
        (rows,) = (batch for window in windows for batch in window if row in batch[:, 1])
        arrays = decode((config.data.train, config.data.views, resize, device.type != "cuda"), [rows])[0]
        stored = reader.read(shard, view, rows[:, 1].tolist())
        if [entry.image_id for entry in stored] != arrays["image_ids"].tolist():
            raise QskdError(reader.where(shard, view), "rows of other images", "those of the shard", FILE_REMEDY)
        tensors = collate(stored, plan.existing.sizes, reader.columns)
        found = decode_batch({name: torch.from_numpy(value).to(device) for name, value in tensors.items()})
        true = in_parts(maker.ask(arrays), maker.bases)
        if reader.attended:  # of the other cells nothing is kept
            there = [part.any(1, keepdim=True) for part in found.memory]
            true = replace(true, memory=tuple(part * here for part, here in zip(true.memory, there, strict=True)))
        for name, value in largest_errors(found, true).items():
            errors[name] = max(errors.get(name, 0.0), value)
    return errors


# Rounding explains less than this; the teacher's own noise on another device, or in bfloat16, may come near.
TOLERANCES = {
    **{"probability": 0.01, "boxes_cxcywh": 0.002, "memory_relative": 0.02, "attention_relative": 0.02},
    "side_probability": 0.01,
}


def complain(config: Config, errors: Mapping[str, float]) -> None:
    """QskdError when an error is larger than rounding explains."""
    bad = [f"{name} {errors[name]:.3g}" for name, most in TOLERANCES.items() if not errors.get(name, 0.0) <= most]
    if bad:
        expected = ", ".join(f"{name} up to {most:g}" for name, most in TOLERANCES.items())
        remedy = (
            "was it made on another device, or in another precision? else replace it: `qskd cache RECIPE --overwrite`, which "
            "deletes its files"
        )
        raise QskdError(
            config.teacher.cache.path, f"rows that the teacher does not say again: {', '.join(bad)}", expected, remedy
        )
