"""Before a teacher's outputs are cached: what is there, what is missing, what it will cost."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.fs as pafs
import torch

from pipelines.caching.actors import decode
from pipelines.cluster.devices import device_here
from pipelines.reporting.words import duration_text
from qskd.checks import (
    check_columns,
    check_data,
    check_decoder,
    check_shards,
    check_teacher,
    check_unlabeled,
    directions_asked,
)
from qskd.config import Config
from qskd.datasets.manifest import MANIFEST, Manifest
from qskd.datasets.shards import ShardReader
from qskd.datasets.unlabeled.joined import source_manifest, training_manifest
from qskd.errors import QskdError
from qskd.storage.files import UNFINISHED
from qskd.storage.listing import MISSING, sizes_in
from qskd.storage.ownership import listed
from qskd.storage.places import open_folder
from qskd.storage.scratch import remove_orphan
from qskd.storage.stores import patiently
from qskd.teacher.cache import SPOOL, carries_fingerprint, finished_file
from qskd.teacher.identity import cache_identity, cache_names, cache_sources, teacher_preprocessing
from qskd.teacher.making import CacheMaker, row_batches
from qskd.teacher.manifest import (
    CacheManifest,
    check_identity,
    file_name,
    load_cache_manifest,
    replaceable_cache,
    shard_names,
    sizes_of,
)
from qskd.teacher.memory.basis import check_one_basis
from qskd.teacher.online import OnlineTeacher
from qskd.teacher.several.members import teachers_named
from qskd.teacher.told.checks import check_told
from qskd.teacher.told.fits import fit_notices

log = logging.getLogger("qskd")
Unit = tuple[int, int]  # shard, view


@dataclass(frozen=True)
class CachePlan:
    """What there is and what is to be computed. done: bytes of each unit's file that is there and whole."""

    config: Config
    data: Manifest
    identity: Mapping[str, Any]
    existing: CacheManifest | None
    done: Mapping[Unit, int]

    @property
    def path(self) -> str:
        return self.config.teacher.cache.path

    @property
    def units(self) -> list[Unit]:
        """All that the recipe asks for, views one after the other."""
        return [(shard, view) for view in range(self.config.data.views.count) for shard in range(len(self.data.shards))]

    @property
    def todo(self) -> list[Unit]:
        return [unit for unit in self.units if unit not in self.done]

    @property
    def batch_size(self) -> int:
        """An existing cache goes on as it was begun."""
        return self.existing.batch_size if self.existing else self.config.teacher.cache.batch_size

    @property
    def actors(self) -> int:
        """The most processes that hold a teacher."""
        return max(1, min(self.config.compute.workers, len(self.todo)))

    def images(self, units: Sequence[Unit]) -> int:
        return sum(self.data.shard_rows[shard] for shard, _ in units)

    def describe(self) -> str:
        views, done = self.config.data.views.count, self.images(list(self.done))
        asked = f"{self.data.num_images} images x {views} view(s) of {self.config.data.train}"
        return f"{teachers_named(self.config)} on {asked}: {self.images(self.units)} in all, {done} there already → {self.path}"


def make_cache_plans(config: Config, overwrite: bool = False) -> list[CachePlan]:
    """`make_cache_plan` of each folder of images that the recipe trains on, labelled or not."""
    check_path(config)
    check_teacher(config)
    check_data(config, ("train",) if config.data.train or not config.data.unlabeled else ("val",))
    check_unlabeled(config, training_manifest(config.data).labels)
    if directions_asked(config) == "decoder":  # before hours are spent
        check_decoder(config)
    plans = [make_cache_plan(source, overwrite) for source in cache_sources(config)]
    check_one_basis({plan.path: plan.existing for plan in plans if plan.existing is not None})
    return plans


def check_path(config: Config) -> None:
    """QskdError where the recipe names no place for a cache."""
    if not config.teacher.cache.path:
        remedy = "--set teacher.cache.path=FOLDER, best in the recipe: `qskd distill` then finds it"
        raise QskdError("teacher.cache.path", "empty", "the folder or URI the cache is to be in", remedy)


def make_cache_plan(config: Config, overwrite: bool = False) -> CachePlan:
    """Of one folder, `data.train`. Read the manifests, look at what is there. Raises QskdError when it is another cache (unless
    `overwrite`), or no cache at all."""
    check_path(config)
    check_teacher(config)
    check_columns(config)
    check_data(config, ("train",))
    data, path = source_manifest(config.data), config.teacher.cache.path
    check_shards(config.data.train, data)
    existing = None if overwrite else load_cache_manifest(path)
    check_told(config, existing)
    for notice in fit_notices(config):
        log.warning(notice)
    identity = cache_identity(config, data)
    if overwrite:
        replaceable_cache(path)
        return CachePlan(config, data, identity, None, {})
    if existing is not None:
        check_identity(existing, identity, path, cache_names(config))
        if existing.batch_size != config.teacher.cache.batch_size:
            log.warning("%s was begun with batches of %d, and goes on so", path, existing.batch_size)
    plan = CachePlan(config, data, identity, existing, {})
    if existing is None:
        return plan
    return replace(plan, done=_whole_files(plan, existing))


def _whole_files(plan: CachePlan, existing: CacheManifest) -> dict[Unit, int]:
    """The bytes of each unit's file that is there and whole. One listing says it of the views that are finished; a file's end
    is read where there is no such record, or the file is not as it says."""
    names, fingerprint = shard_names(plan.data), existing.fingerprint
    there, told = sizes_in(plan.path), sizes_of(existing, existing.views)

    def size_of(unit: Unit) -> int | None:
        shard, view = unit
        name = file_name(names[shard], view)
        if name in told and there.get(name) == told[name]:
            return told[name]
        if name not in there:
            return None
        return finished_file(plan.path, name, plan.data.shard_rows[shard], fingerprint)

    with ThreadPoolExecutor(16) as pool:
        sizes = dict(zip(plan.units, pool.map(size_of, plan.units), strict=True))
    lost = []
    for shard, view in plan.units:
        name = file_name(names[shard], view)
        if name in told and sizes[shard, view] is None:
            lost.append(f"{name} " + (f"has {there[name]} bytes instead of {told[name]}" if name in there else MISSING))
    if lost:
        log.warning("%s: %s: `qskd cache RECIPE` makes these again, and no others", plan.path, listed(lost))
    return {unit: size for unit, size in sizes.items() if size is not None}


@dataclass(frozen=True)
class Estimate:
    """Measured in this process on a few images: seconds and bytes for one, on the device named."""

    seconds: float
    bytes: float
    device: str

    def describe(self, images: int, workers: int) -> str:
        total, size = duration_text(images * self.seconds / workers), bytes_text(images * self.bytes)
        one = f"{1000 * self.seconds:.1f} ms and {bytes_text(self.bytes)} an image"
        return f"about {total} and {size}: {one}, tried here on {self.device}, {workers} actor(s); starting up comes on top"


def bytes_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def estimate(plan: CachePlan, teacher: OnlineTeacher) -> Estimate:
    """Run the teacher on one image to wake it, then on a batch (a slow teacher: on two images), and encode what it says."""
    config, device = plan.config, device_here(plan.config)
    resize, views = teacher_preprocessing(config).resize, config.data.views
    maker, threads = CacheMaker(config, teacher, device), torch.get_num_threads()
    torch.set_num_threads(config.compute.threads_per_worker or threads)
    try:
        shard, view = plan.todo[0]
        windows = row_batches(ShardReader(config.data.train), shard, view, views, resize, plan.batch_size)
        rows = windows[0][0]
        source = (config.data.train, views, resize, device.type != "cuda")
        started = time.perf_counter()
        maker.rows(decode(source, [rows[:1]])[0])
        count = len(rows) if time.perf_counter() - started < 0.5 else min(2, len(rows))
        arrays = decode(source, [rows[:count]])[0]
        # In these images' own basis, where there is to be one: a few numbers fewer than in that of all.
        maker = CacheMaker(config, teacher, device, maker.bases_of([arrays]))
        started = time.perf_counter()
        encoded = maker.rows(arrays)
        seconds = (time.perf_counter() - started) / count
    finally:
        torch.set_num_threads(threads)
    return Estimate(seconds, sum(maker.stored(row).nbytes for row in encoded) / count, str(device))


def clean(path: str, everything: bool = False) -> None:
    """Remove what a killed job left unfinished; with `everything` the cache too: its manifest, the files that this lists, and
    those that carry a cache's fingerprint. Other files are let alone, whatever they are called; QskdError where the
    manifest.json is not a cache's."""
    filesystem, root = open_folder(path)
    manifest = replaceable_cache(path) if everything else None
    views = manifest.views if manifest else ()
    listed = {file_name(shard, view) for shard in (manifest.shards if manifest else ()) for view in views}

    def is_own(name: str) -> bool:
        if name == MANIFEST or name in listed:
            return True
        return _is_cache_file(name) and carries_fingerprint(path, name)

    def delete() -> None:
        infos = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
        for info in (info for info in infos if info.base_name.startswith(UNFINISHED)):
            if info.type == pafs.FileType.Directory:
                remove_orphan(info.path, UNFINISHED, {SPOOL})  # on local disks only: elsewhere there are none
            else:
                filesystem.delete_file(info.path)
        if everything:
            files = [info for info in infos if info.type == pafs.FileType.File]
            with ThreadPoolExecutor(16) as pool:
                own = list(pool.map(lambda info: is_own(info.base_name), files))
            # The manifest last: until then this is a cache's folder, and the same command deletes the rest.
            for info in sorted((info for info, yes in zip(files, own, strict=True) if yes), key=_is_manifest):
                filesystem.delete_file(info.path)

    patiently(path, filesystem, delete)


def _is_manifest(info: pafs.FileInfo) -> bool:
    return bool(info.base_name == MANIFEST)


def _is_cache_file(name: str) -> bool:
    return re.fullmatch(r".+\.view-\d{3,}\.parquet", name) is not None
