"""Compute a teacher's outputs once, for every training that follows (`qskd cache`), as a Ray Data job.

python -m pipelines.cache_teacher student.yaml --set teacher.cache.path=shards/train.teacher
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipelines.caching.actors import TeacherActor
from pipelines.caching.basis import bases_for, bases_there, told_of
from pipelines.caching.derived import look_at_flips
from pipelines.caching.directions import add_directions
from pipelines.caching.domains import tell_of_domains
from pipelines.caching.levels import look_at_levels
from pipelines.caching.looks import look_at_crops
from pipelines.caching.plan import (
    CachePlan,
    Unit,
    bytes_text,
    clean,
    estimate,
    make_cache_plan,
    make_cache_plans,
)
from pipelines.cluster.address import check_address
from pipelines.cluster.room import actors_that_fit, check_gpus, readers_each, say_if_on_cpus
from pipelines.cluster.start import quiet_ray_data, start_ray
from pipelines.feed.hunger import WAIT_SHARE, hungry
from pipelines.reporting.board import current, progress, stage
from pipelines.reporting.watch import CountWatch
from pipelines.reporting.words import duration_text
from pipelines.run.logs import say, start_logs
from pipelines.run.resolve import resolve
from qskd.checks import check_enough, lacks_directions
from qskd.config import Config
from qskd.config.recipe import to_tree
from qskd.errors import QskdError
from qskd.from_recipe import make_teacher
from qskd.teacher.identity import cache_names, computed_by
from qskd.teacher.manifest import (
    COMPUTED,
    CacheManifest,
    check_computed,
    load_cache_manifest,
    save_cache_manifest,
    shard_names,
)
from qskd.teacher.memory.basis import Bases, cached_basis, in_basis, save_bases

log = logging.getLogger("qskd")
WARM_UP_S = 60.0  # of the actors, before it is said that they wait
SUMMED = ("images", "total", "bytes", "seconds", "actor_seconds", "waited_seconds")  # over the folders of images


@dataclass(frozen=True)
class CacheResult:
    """path: of the first folder of images. images: views of images computed by this command, of `total`. bytes: of the whole
    cache. seconds: of this command; actor_seconds: those in which actors were at work on shards, summed over actors, start-up not
    counted; of these, waited_seconds were spent waiting for decoded pixels."""

    path: str
    images: int
    total: int
    bytes: int
    seconds: float
    actor_seconds: float
    waited_seconds: float


def foresee(config: Config, overwrite: bool = False) -> str:
    """What `--dry-run` prints: what there is, and what the rest will cost, tried on a few images."""
    config = resolve(config, "cache")
    plans = make_cache_plans(config, overwrite)
    _say_if_unread(config)
    return "\n".join(_foresee(plan) for plan in plans)


def _say_if_unread(config: Config) -> None:
    """A loud word where the recipe's own method could not read the cache; other recipes may."""
    try:
        check_enough(config)
    except QskdError as error:
        log.warning("the recipe's own `qskd distill` can't read this cache: %s", error)


def _foresee(plan: CachePlan) -> str:
    if not plan.todo:
        lacks = plan.existing is not None and lacks_directions(plan.config, plan.existing)
        return f"{plan.describe()}\n{'the directions of the memory are' if lacks else 'nothing is'} missing"
    teacher = make_teacher(plan.config, plan.data.labels)
    assert teacher is not None
    lines = [plan.describe(), estimate(plan, teacher).describe(plan.images(plan.todo), plan.actors)]
    if spare := look_at_levels(plan, teacher):
        lines.append(spare)
    if crops := look_at_crops(plan, teacher):
        lines.append(f"{'notice: ' if crops.ruined else ''}{crops.describe(plan.config.data.views)}")
    if flips := look_at_flips(plan, teacher):
        lines.append(f"{'' if flips[0] else 'notice: '}{flips[1]}")
    return "\n".join(lines)


def run(config: Config, overwrite: bool = False, quiet: bool = False) -> CacheResult:
    """Compute what is missing. Killed at any moment and run again, it keeps every whole file and computes the rest."""
    config = resolve(config, "cache")
    plans = make_cache_plans(config, overwrite)
    _say_if_unread(config)
    if any(plan.todo for plan in plans):
        check_address()
    start_logs(run=config.name)
    done: list[CacheResult] = []
    bases = bases_there(plans)
    for plan in plans:
        done.append(_run(plan, overwrite, quiet, bases))
        if not bases and (manifest := load_cache_manifest(plan.path)):
            bases = cached_basis(plan.path, manifest)
    add_directions([plan.config for plan in plans], quiet)
    if config.data.unlabeled:
        tell_of_domains([plan.config for plan in plans], bool(config.data.train), quiet)
    return replace(done[0], **{name: sum(getattr(each, name) for each in done) for name in SUMMED})


def _run(plan: CachePlan, overwrite: bool, quiet: bool, bases: Bases = ()) -> CacheResult:
    """Of one folder of images. bases: of another cache of the recipe's, where one is there."""
    started, config = time.perf_counter(), plan.config
    say(f"cache: {plan.describe()}", quiet)
    # What killed jobs left is as large as the files that they wrote, and a job that is killed again and again never ends.
    clean(plan.path, everything=overwrite)
    sizes, spent = dict(plan.done), (0.0, 0.0)
    if plan.todo:
        with progress("cache", plan.images(plan.todo), quiet=quiet):
            stage("trying the teacher on a few images")
            teacher = make_teacher(config, plan.data.labels)  # its complaints belong here, not in a worker's log
            assert teacher is not None
            say(estimate(plan, teacher).describe(plan.images(plan.todo), plan.actors), quiet)
            if spare := look_at_levels(plan, teacher):
                say(spare, quiet)
            # Before hours are spent on views that teach nothing.
            if crops := look_at_crops(plan, teacher):
                said = crops.describe(config.data.views)
                log.warning(said) if crops.ruined else say(said, quiet)
            if flips := look_at_flips(plan, teacher):
                say(flips[1], quiet) if flips[0] else log.warning(flips[1])
            manifest = plan.existing or CacheManifest(
                plan.identity,
                teacher.sizes(config.teacher.cache.all_layers),
                plan.batch_size,
                shard_names(plan.data),
                {},
                cache_names(config),
            )
            del teacher
            manifest = _begun(plan, manifest, computed_by(config, _start(config)), bases, quiet)
            say_if_on_cpus(config.compute.device)
            spent = _persist(plan, manifest, sizes)
    elif plan.existing is not None:
        record_finished_views(plan, plan.existing, sizes)  # killed between its last file and the manifest
    clean(plan.path)
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


def lacks_something(plans: Sequence[CachePlan]) -> bool:
    """Whether `run` would add anything: outputs of the teacher, or directions of its memory."""
    return any(
        plan.todo or (plan.existing is not None and lacks_directions(plan.config, plan.existing)) for plan in plans
    )


class ViewsLeft:
    """Which units each view still lacks, so that a view is looked at when its last one comes, and not at each."""

    def __init__(self, todo: Iterable[Unit]) -> None:
        self._left: dict[int, set[int]] = {}
        for shard, view in todo:
            self._left.setdefault(view, set()).add(shard)

    def finished_by(self, units: Iterable[Unit]) -> list[int]:
        """The views of which these are the last. A unit may come twice."""
        finished = []
        for shard, view in units:
            left = self._left.get(view)
            if left is not None:
                left.discard(shard)
                if not left:
                    del self._left[view]
                    finished.append(view)
        return finished


def record_finished_views(
    plan: CachePlan, manifest: CacheManifest, sizes: Mapping[Unit, int], views: Iterable[int] | None = None
) -> CacheManifest:
    """Enter in the manifest each view (of `views`; by default of all) whose files are all written: a new one, and one of which a
    file was made again, on another device perhaps, with other bytes."""
    for view in range(plan.config.data.views.count) if views is None else views:
        units = [(shard, view) for shard in range(len(plan.data.shards))]
        if all(unit in sizes for unit in units):
            files = tuple((plan.data.shard_rows[unit[0]], sizes[unit]) for unit in units)
            if manifest.views.get(view) != files:
                manifest = manifest.with_view(view, files)
                save_cache_manifest(plan.path, manifest)
    return manifest


def _start(config: Config) -> str:
    """Ray started or joined; the kind of device, "cpu" or "cuda", that the teacher computes on there."""
    stage("starting Ray")
    start_ray()
    import ray

    quiet_ray_data()
    wanted = config.compute.device
    gpu = wanted == "cuda" or (wanted == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    if gpu:
        check_gpus(1)
    return "cuda" if gpu else "cpu"


def _begun(
    plan: CachePlan, manifest: CacheManifest, here: Mapping[str, str], first: Bases = (), quiet: bool = False
) -> CacheManifest:
    """The manifest on disk, before the first unit is computed; QskdError where an existing cache was begun in another way.
    here: what `computed_by` says. first: the bases of another cache of the recipe, where one is there."""
    if plan.existing is not None:
        check_computed(plan.existing, here, plan.path)
        cached_basis(plan.path, plan.existing)  # its complaints belong here, not in a worker's log
        return manifest
    bases = bases_for(plan, first, here[COMPUTED[0]])
    manifest = in_basis(replace(manifest, identity={**manifest.identity, **here}), bases)
    if bases:
        say(told_of(bases, plan.config.teacher.cache.memory_share), quiet)
        save_bases(plan.path, bases, manifest)
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
    import ray

    config, todo, kind = plan.config, plan.todo, _start(plan.config)
    check_computed(manifest, computed_by(config, kind), plan.path)  # GPUs may have come or gone since it was begun
    # Said, not guessed by each actor: a torch that can't use the GPU it was given would compute another cache's numbers.
    config = config.model_copy(update={"compute": config.compute.model_copy(update={"device": kind})})
    actors, cpus = actors_that_fit(plan.actors, max(1, config.compute.threads_per_worker))
    units = [{"shard": shard, "view": view} for shard, view in todo]
    dataset = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        TeacherActor,
        fn_constructor_args=(to_tree(config), manifest.fingerprint, manifest.batch_size),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        num_cpus=cpus,
        num_gpus=1 if kind == "cuda" else 0,
    )
    worked = waited = 0.0
    manifest, left = record_finished_views(plan, manifest, sizes), ViewsLeft(todo)
    stage("starting the teacher's processes")
    with CountWatch(current(), plan.path, plan.images(todo)):
        for batch in dataset.iter_batches(batch_size=None):
            came = [(int(shard), int(view)) for shard, view in zip(batch["shard"], batch["view"], strict=True)]
            for unit, size, failure in zip(came, batch["bytes"], batch["failure"], strict=True):
                if failure:
                    raise QskdError.from_json(str(failure))
                sizes[unit] = int(size)
            worked += float(batch["seconds"].sum())
            waited += float(batch["waited_seconds"].sum())
            manifest = record_finished_views(plan, manifest, sizes, left.finished_by(came))
    # A short job waits for its first pixels, which no number of readers would bring sooner.
    if worked > WARM_UP_S and waited > WAIT_SHARE * worked:
        cpus_there = ray.cluster_resources().get("CPU", 1.0)
        log.warning(hungry(waited / worked, readers_each(config.compute, kind == "cuda", cpus_there), "the teacher"))
    return worked, waited
