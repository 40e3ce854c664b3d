"""What `qskd tune RECIPE --dry-run` prints: trials, epochs, accelerator-hours and bytes read, with and without the cache."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.caching.plan import bytes_text
from pipelines.reporting.words import duration_text
from pipelines.run.resolve import ResolvedConfig
from pipelines.training.plan import make_plan
from pipelines.tuning.calibration import Calibration
from pipelines.tuning.search.request import Search
from qskd.config import Config
from qskd.config.recipe import replace_fields
from qskd.datasets.manifest import Manifest, load_manifest
from qskd.datasets.order.schedule import Schedule
from qskd.teacher.identity import cache_sources
from qskd.teacher.manifest import load_cache_manifest


@dataclass(frozen=True)
class Cost:
    """accelerator_s: seconds that accelerators (or CPU workers) are held busy, added up. bytes_read: from storage, as if
    readers kept nothing in memory: the most there can be."""

    accelerator_s: float
    bytes_read: float

    @property
    def accelerator_hours(self) -> float:
        return self.accelerator_s / 3600

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.accelerator_s + other.accelerator_s, self.bytes_read + other.bytes_read)


def halving_epochs(trials: int, epochs: int, grace: int, reduction: int) -> float:
    """Epochs that successive halving trains in all: every trial to `grace`, one in `reduction` to `reduction` times as many,
    and so on, the best to the end. ASHA, which does not wait for the others at a rung, trains about as many, rather more.
    """
    each, reached, share = 0.0, 0, 1.0
    rung = grace
    while rung < epochs:
        each += share * (rung - reached)
        reached, share, rung = rung, share / reduction, rung * reduction
    each += share * (epochs - reached)
    return min(trials * epochs, max(trials * each, epochs + (trials - 1) * min(grace, epochs)))


@dataclass(frozen=True)
class TunePlan:
    """A sweep before it starts. missing: images times views, labelled or not, that no cache has yet; missing_bytes: of these in
    their shards. image_bytes: of a training image in its shard, on the average of a batch."""

    config: Config
    search: Search
    train: Manifest
    val: Manifest
    schedule: Schedule  # of one trial at full length
    calibration: Calibration
    missing: int
    missing_bytes: float
    image_bytes: float

    @property
    def images(self) -> int:
        """Labelled and unlabelled ones to train on."""
        return self.schedule.train_images + self.schedule.unlabeled_images

    @property
    def trial_epochs(self) -> float:
        """Of one trial at full length; not whole when training.max_steps ends it within an epoch."""
        return self.schedule.total_steps / self.schedule.steps_per_epoch

    @property
    def most_epochs(self) -> float:
        """Over all trials, if none is stopped."""
        return self.search.trials * self.trial_epochs

    @property
    def likely_epochs(self) -> float:
        """Over all trials, as early stopping leaves them."""
        if not self.search.asha:
            return self.most_epochs
        search, whole = self.search, self.schedule.epochs_begun
        return min(self.most_epochs, halving_epochs(search.trials, whole, search.grace_epochs, search.reduction))

    def cost_of_cache(self) -> Cost:
        """Making what is missing of it, once: 0 when it is there."""
        return Cost(self.missing * self.calibration.teacher_image_s, self.missing_bytes)

    def cost_of_trials(self, epochs: float, cached: bool) -> Cost:
        """Training and evaluating `epochs` in all, the teacher's outputs cached or the teacher run in every step."""
        measured, schedule = self.calibration, self.schedule
        steps = epochs * schedule.steps_per_epoch
        images = steps * min(schedule.batch_size, self.images)
        evaluated = self.val.num_images * epochs / schedule.evaluate_every_epochs
        seconds = steps * (measured.cached_step_s if cached else measured.online_step_s)
        read = images * (self.image_bytes + (measured.cached_bytes if cached else 0.0))
        return Cost(seconds + evaluated * measured.evaluate_image_s, read + evaluated * _bytes_of_one(self.val))

    def cost(self, cached: bool, likely: bool = True) -> Cost:
        """The whole sweep. likely: with early stopping, where it is on; otherwise every trial at full length."""
        trials = self.cost_of_trials(self.likely_epochs if likely else self.most_epochs, cached)
        return trials + self.cost_of_cache() if cached else trials

    def describe(self) -> str:
        """The plan as lines of text."""
        measured, search = self.calibration, self.search
        lines = [search.describe()]
        epochs = f"epochs: {self.trial_epochs:g} a trial, {self.most_epochs:g} in all"
        if search.asha:
            epochs += f"; with ASHA about {self.likely_epochs:.0f} (at each rung one in {search.reduction} goes on)"
        lines.append(epochs)
        rows = [("", "with the cache", "without it")]
        making = self.cost_of_cache()
        stored = bytes_text(self.missing * measured.stored_bytes)
        made = f"{duration_text(making.accelerator_s)}, {stored}" if making.accelerator_s else "is there"
        rows.append(("the teacher's outputs, once", made, "-"))
        rows.append(("a training step", _step_text(measured.cached_step_s), _step_text(measured.online_step_s)))
        for likely in (True, False) if search.asha else (False,):
            costs = [self.cost(cached, likely) for cached in (True, False)]
            of = "" if not search.asha else ", with ASHA" if likely else ", none stopped"
            rows.append((f"accelerator-hours{of}", *(f"{cost.accelerator_hours:.3g}" for cost in costs)))  # type: ignore[arg-type]
            rows.append((f"bytes read, at most{of}", *(bytes_text(cost.bytes_read) for cost in costs)))  # type: ignore[arg-type]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines += [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
        of_whom = "the recipe's own student" if measured.students == 1 else f"{measured.students} students"
        lines.append(
            f"measured here on {measured.device} with {of_whom}: other sizes cost more or less; starting up comes on top"
        )
        return "\n".join(lines)


def make_tune_plan(config: ResolvedConfig, search: Search, calibration: Calibration) -> TunePlan:
    """Read the manifests. Raises QskdError when data is missing; a cache need not be there yet."""
    plan = make_plan(replace_fields(config, {"teacher.cache.path": ""}, "qskd tune"), "distill")
    views, missing, missing_bytes = config.data.views.count, 0, 0.0
    for source in cache_sources(config):
        path, data = source.teacher.cache.path, load_manifest(source.data.train)
        manifest = load_cache_manifest(path) if path else None
        there = sum(view < views for view in manifest.views) if manifest is not None else 0
        missing += data.num_images * (views - there)
        missing_bytes += data.num_images * (views - there) * _bytes_of_one(data)
    schedule, own = plan.stream.schedule, _bytes_of_one(plan.train)
    share = schedule.unlabeled_in_batch / schedule.batch_size
    others = _bytes_of_one(*plan.unlabeled) if plan.unlabeled else 0.0
    mean = own * (1 - share) + others * share
    return TunePlan(config, search, plan.train, plan.val, schedule, calibration, missing, missing_bytes, mean)


def _bytes_of_one(*manifests: Manifest) -> float:
    """Of one image in its shard, its annotations included."""
    stored = sum(shard.bytes for manifest in manifests for shard in manifest.shards)
    return stored / max(1, sum(manifest.num_images for manifest in manifests))


def _step_text(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else duration_text(seconds)
