"""A cache of teacher outputs made in this process, without Ray: for benchmarks and tests."""

from __future__ import annotations

from typing import Any

import torch

from qskd.checks import directions_asked, lacks_directions
from qskd.config import Config, ResizeConfig
from qskd.datasets.loader import BatchLoader
from qskd.datasets.shards import ShardReader
from qskd.teacher.cache import write_rows
from qskd.teacher.making import CacheMaker, row_batches
from qskd.teacher.manifest import CacheManifest, file_name, save_cache_manifest, shard_names
from qskd.teacher.memory.basis import in_basis, sampled, save_bases
from qskd.teacher.memory.directions import compute_directions, save_directions
from qskd.teacher.online import OnlineTeacher


def make_cache(
    config: Config, teacher: OnlineTeacher, resize: ResizeConfig, identity: dict[str, Any] | None = None
) -> CacheManifest:
    """What the job does. identity: None names only the precision, enough for a reader that checks nothing else."""
    reader, views, cache = ShardReader(config.data.train), config.data.views, config.teacher.cache
    cpu, loader = torch.device("cpu"), BatchLoader(config.data.train, "", views, resize)
    bases = CacheMaker(config, teacher, cpu).bases_of(
        loader.load("train", rows) for rows in sampled(reader, cache.batch_size)
    )
    maker = CacheMaker(config, teacher, cpu, bases)
    names = shard_names(reader.manifest)
    said = identity or {"teacher.cache.precision": cache.precision, "teacher.cache.cells": cache.cells}
    manifest = in_basis(CacheManifest(said, teacher.sizes(cache.all_layers), cache.batch_size, names, {}), bases)
    if bases:
        save_bases(cache.path, bases, manifest)
    for view in range(views.count):
        files = []
        for shard, name in enumerate(names):
            windows = row_batches(reader, shard, view, views, resize, cache.batch_size)
            decoded = (loader.load("train", rows) for window in windows for rows in window)
            rows = maker.in_order(windows, decoded)
            file, kept = file_name(name, view), maker.attended_of
            files.append(write_rows(cache.path, file, rows, manifest.fingerprint, cache.columns, kept))
        manifest = manifest.with_view(view, tuple(files))
    save_cache_manifest(cache.path, manifest)
    if directions_asked(config) == "variance" and lacks_directions(config, manifest):
        save_directions(cache.path, compute_directions(cache.path), manifest)
    return manifest
