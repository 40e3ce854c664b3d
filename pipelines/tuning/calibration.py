"""What a step of a recipe costs on the machine at hand, with the teacher at work and with its outputs cached: measured by
real training steps in this process, in a few seconds. Starts no Ray."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Any

from pipelines.cluster.devices import device_here
from pipelines.feed.stream import local_stream
from pipelines.run.resolve import ResolvedConfig
from pipelines.training.estimate import (
    BATCHES,
    as_a_worker,
    as_the_teacher_sees,
    maker_as_cached,
    seconds_per_evaluated_image,
    seconds_per_step,
    with_record,
)
from pipelines.training.plan import Plan, make_plan
from qskd.config import Config
from qskd.config.recipe import replace_fields
from qskd.distillation.method import teacher_needs
from qskd.errors import QskdError
from qskd.from_recipe import make_student, make_teacher
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.table import TeacherRow, columns_for
from qskd.teacher.memory.directions import flat_directions
from qskd.teacher.told.results import is_results
from qskd.training.step import Training


@dataclass(frozen=True)
class Calibration:
    """Seconds are of one accelerator: those of several workers, added up.

    cached_step_s, online_step_s: one training step of the global batch, the teacher's outputs given or the teacher run.
    teacher_image_s: the teacher run on one image and its outputs encoded, as when the cache is made.
    evaluate_image_s: the student run on one image of the validation set.
    cached_bytes: what a training reads of the cache for one image and view; stored_bytes: what the cache holds of it.
    students: how many different ones this is the mean of.
    """

    cached_step_s: float
    online_step_s: float
    teacher_image_s: float
    evaluate_image_s: float
    cached_bytes: float
    stored_bytes: float
    device: str
    students: int = 1

    @staticmethod
    def mean(parts: Sequence[Calibration]) -> Calibration:
        """Of several students, for a space that changes the architecture."""
        if not parts:
            raise ValueError("the mean of no calibrations")
        measured = [field.name for field in fields(Calibration) if field.name not in ("device", "students")]
        means = {name: fmean(getattr(part, name) for part in parts) for name in measured}
        return replace(parts[0], **means, students=sum(part.students for part in parts))  # type: ignore[arg-type]


def calibrate(config: ResolvedConfig, budget_s: float = 2.0) -> Calibration:
    """Train a few steps of the recipe, without a cache and as if with one; the cache itself need not be there.

    budget_s: for each of the two kinds of step, after one to wake up; a step that takes longer is measured once. Raises
    QskdError when data or teacher are missing, or the recipe has no distillation.
    """
    if is_results(config.teacher.path):
        raise QskdError(
            "--dry-run",
            f"a sweep whose teacher is a file of detections, {config.teacher.path}: costs are measured with one that can be asked",
            "a detector",
            "leave --dry-run out; `qskd distill RECIPE --dry-run` says what one training takes",
        )
    config = _with_enough_cached(config)
    plan = make_plan(config, "distill")
    with as_a_worker(config):
        return _measure(config, plan, budget_s)


def _with_enough_cached(config: ResolvedConfig) -> ResolvedConfig:
    """The recipe without its cache's folder, and with settings of a cache that holds what the method reads."""
    needs, cache = teacher_needs(config.distillation), config.teacher.cache
    if needs is None:
        raise QskdError(
            "distillation.method", "none", "a method that learns from a teacher", "--set distillation.method=qskd"
        )
    enough: dict[str, Any] = {"path": "", "all_layers": cache.all_layers or needs.all_layers}
    if needs.attention:
        enough["attention_layers"] = needs.attention_layers
        enough["attention_giou_floor"] = min(cache.attention_giou_floor, needs.attention_giou_floor)
    return replace_fields(config, {f"teacher.cache.{name}": value for name, value in enough.items()}, "calibration")


def _measure(config: Config, plan: Plan, budget_s: float) -> Calibration:
    device, workers, labels = device_here(config), config.compute.workers, plan.train.labels
    teacher = make_teacher(config, labels)
    assert teacher is not None  # the method is not "none"
    teacher.directions = flat_directions(teacher.facts.channels)  # of the true ones' cost
    student = make_student(config, labels)
    steps = plan.stream.schedule.total_steps
    shares = (share.arrays for share in local_stream(plan.stream, 0, workers, 0) if share.subset == "train")
    batches = list(itertools.islice(shares, BATCHES))

    online_s = seconds_per_step(Training(config, student, teacher, steps, device), batches, budget_s)[0]

    maker, rows, teacher_s = maker_as_cached(config, teacher, batches[:1]), [], 0.0
    for arrays in batches:
        started = time.perf_counter()
        rows.append(maker.rows(as_the_teacher_sees(arrays)))
        teacher_s = time.perf_counter() - started  # the last one's: the first wakes it up
    needs = teacher_needs(config.distillation)
    assert needs is not None
    columns = columns_for(needs)
    cached = [with_record(*pair, maker.sizes, columns) for pair in zip(batches, rows, strict=True)]
    decoder = teacher.decoder if needs.decoder else None
    memory = CachedTeacher(maker.sizes, teacher.directions, decoder, bases=maker.bases)
    training = Training(config, student, memory, steps, device)
    cached_s = seconds_per_step(training, cached, budget_s)[0]

    evaluate_s = seconds_per_evaluated_image(training, batches[-1], plan.train)
    every_row = [maker.stored(row) for part in rows for row in part]
    return Calibration(
        cached_step_s=cached_s * workers,
        online_step_s=online_s * workers,
        teacher_image_s=teacher_s / len(batches[-1]["images"]),
        evaluate_image_s=evaluate_s,
        cached_bytes=fmean(_bytes(row, columns) for row in every_row),
        stored_bytes=fmean(row.nbytes for row in every_row),
        device=str(device),
    )


def _bytes(row: TeacherRow, columns: Sequence[str]) -> int:
    return sum(getattr(row, name).nbytes for name in columns if name != "image_id")
