"""Compute a teacher's outputs once, for every training that follows (`qskd cache`), as a Ray Data job.

python -m pipelines.cache_teacher student.yaml --set teacher.cache.path=shards/train.teacher
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.caching.actors import TeacherActor
from pipelines.caching.plan import CachePlan, Unit, bytes_text, clean, estimate, make_cache_plan
from pipelines.cluster.address import check_address
from pipelines.cluster.room import actors_that_fit, check_gpus, readers_each, say_if_on_cpus
from pipelines.cluster.start import quiet_ray_data, start_ray
from pipelines.feed.hunger import WAIT_SHARE, hungry
from pipelines.reporting.board import current, progress, stage
from pipelines.reporting.watch import CountWatch
from pipelines.reporting.words import duration_text
from pipelines.run.logs import say, start_logs
from pipelines.run.resolve import resolve
from qskd.checks import lacks_directions
from qskd.config import Config
from qskd.config.recipe import to_tree
from qskd.errors import QskdError
from qskd.from_recipe import make_teacher
from qskd.teacher.directions import FILE as DIRECTIONS
from qskd.teacher.directions import compute_directions, save_directions
from qskd.teacher.identity import cache_names
from qskd.teacher.manifest import CacheManifest, load_cache_manifest, save_cache_manifest, shard_names

log = logging.getLogger("qskd")


@dataclass(frozen=True)
class CacheResult:
    """images: views of images computed by this command, of `total`. bytes: of the whole cache. seconds: of this command;
    actor_seconds: those in which actors were at work on shards, summed over actors, start-up not counted; of these,
    waited_seconds were spent waiting for decoded pixels."""

    path: str
    images: int
    total: int
    bytes: int
    seconds: float
    actor_seconds: float
    waited_seconds: float


def foresee(config: Config, overwrite: bool = False) -> str:
    """What `--dry-run` prints: what there is, and what the rest will cost, tried on a few images."""
    plan = make_cache_plan(resolve(config, "cache"), overwrite)
    if not plan.todo:
        lacks = plan.existing is not None and lacks_directions(plan.config, plan.existing)
        return f"{plan.describe()}\n{'the directions of the memory are' if lacks else 'nothing is'} missing"
    teacher = make_teacher(plan.config, plan.data.labels)
    assert teacher is not None
    return f"{plan.describe()}\n{estimate(plan, teacher).describe(plan.images(plan.todo), plan.actors)}"


def run(config: Config, overwrite: bool = False, quiet: bool = False) -> CacheResult:
    """Compute what is missing. Killed at any moment and run again, it keeps every whole file and computes the rest."""
    started, config = time.perf_counter(), resolve(config, "cache")
    plan = make_cache_plan(config, overwrite)
    if plan.todo:
        check_address()
    start_logs(run=config.name)
    say(f"cache: {plan.describe()}", quiet)
    if overwrite:
        clean(plan.path, everything=True)
    sizes, spent = dict(plan.done), (0.0, 0.0)
    if plan.todo:
        with progress("cache", plan.images(plan.todo), quiet=quiet):
            stage("trying the teacher on a few images")
            teacher = make_teacher(config, plan.data.labels)  # its complaints belong here, not in a worker's log
            assert teacher is not None
            say(estimate(plan, teacher).describe(plan.images(plan.todo), plan.actors), quiet)
            manifest = plan.existing or CacheManifest(
                plan.identity,
                teacher.sizes(config.teacher.cache.all_layers),
                plan.batch_size,
                shard_names(plan.data),
                {},
                cache_names(config),
            )
            save_cache_manifest(plan.path, manifest)
            del teacher
            spent = _persist(plan, manifest, sizes)
    elif plan.existing is not None:
        record_finished_views(plan, plan.existing, sizes)  # killed between its last file and the manifest
    clean(plan.path)
    _add_directions(config, quiet)
    seconds = time.perf_counter() - started
    done = plan.images(plan.todo)
    total = sum(sizes.values())
    images = plan.images(plan.units)
    say(
        f"{done} computed in {duration_text(seconds)}, start-up included; {images} in the cache, {bytes_text(total)} "
        f"({bytes_text(total / images)} an image) → {plan.path}",
        quiet,
        computed=done,
        cached=images,
        bytes=total,
    )
    return CacheResult(plan.path, done, images, total, seconds, *spent)


def _add_directions(config: Config, quiet: bool) -> None:
    """Beside a cache that is whole, what the recipe's method asks for and is not there."""
    manifest = load_cache_manifest(config.teacher.cache.path)
    if manifest is not None and lacks_directions(config, manifest):
        found = compute_directions(config.teacher.cache.path)
        save_directions(config.teacher.cache.path, found, manifest)
        widths = ", ".join(str(len(each.variances)) for each in found)
        say(f"cache: the directions in which the memory varies, of maps {widths} wide → {DIRECTIONS}", quiet)


def record_finished_views(plan: CachePlan, manifest: CacheManifest, sizes: Mapping[Unit, int]) -> CacheManifest:
    """Enter in the manifest each view whose files are all written: a new one, and one of which a file was made again, on
    another device perhaps, with other bytes."""
    for view in range(plan.config.data.views.count):
        units = [(shard, view) for shard in range(len(plan.data.shards))]
        if all(unit in sizes for unit in units):
            files = tuple((plan.data.shard_rows[unit[0]], sizes[unit]) for unit in units)
            if manifest.views.get(view) != files:
                manifest = manifest.with_view(view, files)
                save_cache_manifest(plan.path, manifest)
    return manifest


def _persist(plan: CachePlan, manifest: CacheManifest, sizes: dict[Unit, int]) -> tuple[float, float]:
    """`_compute`, begun again with what is missing when Ray itself gives up: Ray Data's own helpers, which it does not replace
    within a job, may be on a node that goes. At most `compute.max_failures` times. The seconds are of the last try."""
    import ray

    allowed, tries = plan.config.compute.max_failures, 0
    while True:
        try:
            return _compute(plan, manifest, sizes)
        except ray.exceptions.RayError as error:
            tries += 1
            # An error in the code that ran, which would come again, is a RayTaskError.
            if isinstance(error, ray.exceptions.RayTaskError) or tries > allowed >= 0:
                raise
            log.warning("Ray gave up on the job, which is begun again with what is missing: %s", error)
            plan = make_cache_plan(plan.config)
            sizes.update(plan.done)
            manifest = plan.existing or manifest
            if not plan.todo:
                record_finished_views(plan, manifest, sizes)
                return 0.0, 0.0


def _compute(plan: CachePlan, manifest: CacheManifest, sizes: dict[Unit, int]) -> tuple[float, float]:
    """Compute what is missing and enter it in `sizes`; returns the seconds that actors were at work, and waited."""
    stage("starting Ray")
    start_ray()
    import ray

    quiet_ray_data()
    say_if_on_cpus(plan.config.compute.device)
    config, todo = plan.config, plan.todo
    gpu = config.compute.device == "cuda" or (
        config.compute.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
    )
    if gpu:
        check_gpus(1)
    actors, cpus = actors_that_fit(plan.actors, max(1, config.compute.threads_per_worker))
    units = [{"shard": shard, "view": view} for shard, view in todo]
    dataset = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        TeacherActor,
        fn_constructor_args=(to_tree(config), manifest.fingerprint, manifest.batch_size),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        num_cpus=cpus,
        num_gpus=1 if gpu else 0,
    )
    worked = waited = 0.0
    stage("starting the teacher's processes")
    with CountWatch(current(), plan.path, plan.images(todo)):
        for batch in dataset.iter_batches(batch_size=None):
            for shard, view, size, failure in zip(
                *(batch[n] for n in ("shard", "view", "bytes", "failure")), strict=True
            ):
                if failure:
                    raise QskdError.from_json(str(failure))
                sizes[int(shard), int(view)] = int(size)
            worked += float(batch["seconds"].sum())
            waited += float(batch["waited_seconds"].sum())
            manifest = record_finished_views(plan, manifest, sizes)
    if worked and waited > WAIT_SHARE * worked:
        cpus_there = ray.cluster_resources().get("CPU", 1.0)
        log.warning(hungry(waited / worked, readers_each(config.compute, gpu, cpus_there), "the teacher"))
    return worked, waited
