"""What a step of a recipe costs on the machine at hand, with the teacher at work and with its outputs cached: measured by
real training steps in this process, in a few seconds. Starts no Ray."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from pipelines.cluster.devices import device_here
from pipelines.run.resolve import ResolvedConfig
from pipelines.training.plan import Plan, make_plan
from pipelines.training.stream import local_stream
from qskd.config import Config
from qskd.config.recipe import replace_fields
from qskd.datasets.batch import parts_of, train_batch
from qskd.distillation.method import teacher_needs
from qskd.errors import QskdError
from qskd.evaluation.inference import predict_batch
from qskd.from_recipe import make_student, make_teacher
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.table import TeacherRow, collate, columns_for
from qskd.teacher.making import CacheMaker
from qskd.teacher.online import OnlineTeacher
from qskd.training.step import Training

Arrays = Mapping[str, np.ndarray]
BATCHES = 3  # held in memory; steps go round


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
    config = _with_enough_cached(config)
    plan = make_plan(config, "distill")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.compute.threads_per_worker or threads)
    try:
        with torch.random.fork_rng():
            return _measure(config, plan, budget_s)
    finally:
        torch.set_num_threads(threads)


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
    student = make_student(config, labels)
    steps = plan.stream.schedule.total_steps
    shares = (share.arrays for share in local_stream(plan.stream, 0, workers, 0) if share.subset == "train")
    batches = list(itertools.islice(shares, BATCHES))

    online_s = _seconds_per_step(Training(config, student, teacher, steps, device), batches, budget_s)

    maker, rows, teacher_s = CacheMaker(config, teacher, device), [], 0.0
    for arrays in batches:
        started = time.perf_counter()
        rows.append(maker.rows(_as_the_teacher_sees(arrays)))
        teacher_s = time.perf_counter() - started  # the last one's: the first wakes it up
    needs = teacher_needs(config.distillation)
    assert needs is not None
    columns = columns_for(needs)
    cached = [_with_record(*pair, teacher, config, columns) for pair in zip(batches, rows, strict=True)]
    memory = CachedTeacher(teacher.sizes(config.teacher.cache.all_layers))
    training = Training(config, student, memory, steps, device)
    cached_s = _seconds_per_step(training, cached, budget_s)

    def evaluate() -> None:
        categories = tuple(category.id for category in plan.train.categories)
        with training.evaluation_weights() as weights:
            predict_batch(weights, batches[-1], weights.preprocessing(config.student.resize), categories, device=device)

    evaluate()
    evaluate_s = _timed(evaluate, device)
    every_row = [row for part in rows for row in part]
    return Calibration(
        cached_step_s=cached_s * workers,
        online_step_s=online_s * workers,
        teacher_image_s=teacher_s / len(batches[-1]["images"]),
        evaluate_image_s=evaluate_s / len(batches[-1]["images"]),
        cached_bytes=fmean(_bytes(row, columns) for row in every_row),
        stored_bytes=fmean(row.nbytes for row in every_row),
        device=str(device),
    )


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds, with all that the device was given to do."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _seconds_per_step(training: Training, batches: Sequence[Arrays], budget_s: float) -> float:
    """The median over as many steps as fit into the budget, the first left out; the way to the device included."""

    def step(arrays: Arrays) -> None:
        parts = parts_of(arrays, training.config.training, training.world)
        training.train_step(*(train_batch(part, training.device) for part in parts))

    times: list[float] = []
    for arrays in itertools.cycle(batches):
        times.append(_timed(partial(step, arrays), training.device))
        if len(times) > 1 and sum(times[1:]) + times[-1] > budget_s:
            break
    training.check_finite()
    return median(times[1:])


def _as_the_teacher_sees(arrays: Arrays) -> Arrays:
    """The loader's arrays with the teacher's pixels as the images, as the cache job loads them."""
    if "teacher_images" not in arrays:
        return arrays
    return {**arrays, "images": arrays["teacher_images"], "sizes": arrays["teacher_sizes"]}


def _with_record(
    arrays: Arrays, rows: Sequence[TeacherRow], teacher: OnlineTeacher, config: Config, columns: Sequence[str]
) -> Arrays:
    """The loader's arrays as they are where there is a cache: the teacher's outputs in place of its pixels."""
    own = {name: array for name, array in arrays.items() if not name.startswith("teacher_")}
    return own | collate(rows, teacher.sizes(config.teacher.cache.all_layers), columns)


def _bytes(row: TeacherRow, columns: Sequence[str]) -> int:
    return sum(getattr(row, name).nbytes for name in columns if name != "image_id")
