"""How long a training will take: a few real steps of the real student on real batches, in this process. Starts no Ray."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch

from pipelines.cluster.devices import device_here
from pipelines.cluster.environment import joined
from pipelines.cluster.room import readers_each
from pipelines.feed.stream import local_stream
from pipelines.reporting.words import duration_text
from pipelines.training.plan import Plan
from qskd.checks import directions_asked
from qskd.config import Config
from qskd.datasets.batch import parts_of, train_batch
from qskd.datasets.manifest import Manifest
from qskd.datasets.packing import cores
from qskd.detectors import Detector
from qskd.distillation.method import teacher_needs
from qskd.errors import QskdError
from qskd.evaluation.inference import predict_pairs
from qskd.evaluation.pairs import Pairs
from qskd.from_recipe import make_student, make_teacher, teacher_for_training
from qskd.teacher.cached import CachedTeacher, Teacher
from qskd.teacher.columns.table import TeacherRow, collate, columns_for
from qskd.teacher.making import CacheMaker
from qskd.teacher.manifest import CacheSizes
from qskd.teacher.memory.directions import flat_directions
from qskd.teacher.online import OnlineTeacher
from qskd.training.step import Training

Arrays = Mapping[str, np.ndarray]
BATCHES = 3  # held in memory; steps go round
BUDGET_S, PATIENCE_S = 3.0, 10.0  # for steps after the first; of a first that takes longer, no second is asked


# --- what is measured, here and for a sweep's dry run ------------------------------------------------------------------
@contextmanager
def as_a_worker(config: Config) -> Iterator[None]:
    """A worker's threads; afterwards threads and random numbers are as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.compute.threads_per_worker or threads)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds, with all that the device was given to do."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def seconds_per_step(training: Training, batches: Sequence[Arrays], budget_s: float) -> tuple[float, int]:
    """The median over as many steps as fit into the budget, the first left out unless it took too long for a second; the way
    to the device included. And how many that were."""

    def step(arrays: Arrays) -> None:
        parts = parts_of(arrays, training.config.training, training.world)
        training.train_step(*(train_batch(part, training.device) for part in parts))

    times: list[float] = []
    for arrays in itertools.cycle(batches):
        times.append(timed(partial(step, arrays), training.device))
        if times[0] > PATIENCE_S or (len(times) > 1 and sum(times[1:]) + times[-1] > budget_s):
            break
    training.check_finite()
    return median(times[1:] or times), len(times[1:]) or 1


def seconds_per_evaluated_image(training: Training, arrays: Arrays, data: Manifest) -> float:
    """The student run on the images of a batch, once to wake it up, once timed."""
    categories, resize = tuple(category.id for category in data.categories), training.config.student.resize

    precision = training.config.compute.evaluation_precision

    def evaluate(student: Detector) -> None:
        seen_as = student.preprocessing(resize)
        predict_pairs(student, arrays, seen_as, categories, [Pairs(100, False)], None, training.device, precision)

    with training.evaluation_weights() as student:
        evaluate(student)
        return timed(partial(evaluate, student), training.device) / len(arrays["images"])


def as_the_teacher_sees(arrays: Arrays) -> Arrays:
    """The loader's arrays with the teacher's pixels as the images, as the cache job loads them."""
    if "teacher_images" not in arrays:
        return arrays
    return {**arrays, "images": arrays["teacher_images"], "sizes": arrays["teacher_sizes"]}


def maker_as_cached(config: Config, teacher: OnlineTeacher, batches: Sequence[Arrays]) -> CacheMaker:
    """Whose rows are as large as those of the recipe's cache, be this yet to be made: memory is in these images' own basis, where
    there is to be one, a few numbers fewer than in that of all."""
    device = device_here(config)
    bases = CacheMaker(config, teacher, device).bases_of(map(as_the_teacher_sees, batches))
    return CacheMaker(config, teacher, device, bases)


def with_record(arrays: Arrays, rows: Sequence[TeacherRow], sizes: CacheSizes, columns: Sequence[str]) -> Arrays:
    """The loader's arrays as they are where there is a cache: the teacher's outputs in place of its pixels."""
    own = {name: array for name, array in arrays.items() if not name.startswith("teacher_")}
    return own | collate(rows, sizes, columns)


# --- a training's time -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Estimate:
    """step_s: of a worker with its share of a batch, which has `images`; read_s: reading that share. steps: that were tried."""

    step_s: float
    read_s: float
    evaluate_image_s: float
    images: int
    steps: int
    device: str
    threads: int

    def describe(self, plan: Plan) -> str:
        """Whole sentences; what was assumed is in the second line."""
        schedule, compute = plan.stream.schedule, plan.config.compute
        workers, own = compute.workers, cores()
        crowd = max(1.0, workers * self.threads / own) if self.device == "cpu" and not joined() else 1.0
        readers = readers_each(compute, self.device == "cuda", own)
        step_s = max(self.step_s * crowd, self.read_s / readers)
        image_s = max(self.evaluate_image_s * crowd, self.read_s / max(1, self.images) / readers) / workers
        evaluations = sum(map(schedule.evaluates_after, range(schedule.epochs_begun)))
        evaluation_s = image_s * plan.val.num_images
        total_s = schedule.total_steps * step_s + evaluations * evaluation_s
        times = "evaluation" if evaluations == 1 else "evaluations"
        lines = [
            f"time: about {duration_text(total_s)}: {schedule.total_steps} steps of {1000 * step_s:.0f} ms are "
            f"{duration_text(schedule.total_steps * step_s)}, {evaluations} {times} of {plan.val.num_images} images take "
            f"{duration_text(evaluation_s)} each; starting, checkpoints, AP's own arithmetic and the report come on top",
            f"  tried here on {self.device}, {self.threads} thread(s): {self.steps} step(s) of {1000 * self.step_s:.0f} ms on "
            f"{self.images} images, which take {1000 * self.read_s:.0f} ms to read in {readers} process(es) of each worker "
            "beside",
        ]
        if workers > 1:
            lines.append(
                f"  one of {workers} workers was tried, with its {self.images} of {schedule.batch_size} images; all are taken "
                "to be as fast at the same time, and what they send each other comes on top"
            )
        if crowd > 1:
            lines.append(f"  {crowd:.3g} times as long as tried: {workers} workers share {own} cores")
        return "\n".join(lines)


def reason_not_to_try(config: Config) -> str:
    """Why no step can be tried on this machine; empty where one can."""
    for field, path in (("data.train", config.data.train), ("teacher.cache.path", config.teacher.cache.path)):
        if "://" in path:
            return f"{field} is in a store, and not on this machine"
    if config.compute.device == "cuda" and device_here(config).type != "cuda":
        return "compute.device is cuda, and there is no GPU here"
    return ""


def foresee_time(plan: Plan) -> str:
    """What `--dry-run` says of the time. Never raises: that a training can't be tried here does not mean that it can't run."""
    reason = reason_not_to_try(plan.config)
    if not reason:
        try:
            return estimate(plan).describe(plan)
        except QskdError as error:  # what the training itself would say, most likely
            reason = f"a step was refused here:\n  {error}"
        except Exception as error:
            reason = f"a step could not be tried here: {type(error).__name__}: {str(error).splitlines()[0]}"
    return f"time: not known: {reason}"


def estimate(plan: Plan) -> Estimate:
    """Try a few steps as worker 0 would do them. Where the cache is yet to be made, with outputs of the teacher that are made
    for these batches. Raises what a training raises."""
    config, device = plan.config, device_here(plan.config)
    with as_a_worker(config):
        batches, read_s = _batches(plan)
        student = make_student(config, plan.train.labels)
        teacher: Teacher | None
        if plan.cache_is_missing:
            batches, teacher = _as_if_cached(batches, plan)
        else:
            teacher = teacher_for_training(config, plan.train.labels, None)
            if isinstance(teacher, OnlineTeacher) and directions_asked(config) == "variance":
                teacher.directions = flat_directions(teacher.facts.channels)  # of the true ones' cost
        training = Training(config, student, teacher, plan.stream.schedule.total_steps, device)
        step_s, steps = seconds_per_step(training, batches, BUDGET_S)
        evaluate_s = seconds_per_evaluated_image(training, batches[-1], plan.train)
        images = len(batches[-1]["images"])
        return Estimate(step_s, read_s, evaluate_s, images, steps, str(device), torch.get_num_threads())


def _batches(plan: Plan) -> tuple[list[Arrays], float]:
    """Worker 0's first shares, and the seconds to read one: the last's, for the first opens the files."""
    shares = local_stream(plan.stream, 0, plan.config.compute.workers, 0)
    found, read_s = list[Arrays](), 0.0
    for _ in range(min(BATCHES, plan.stream.schedule.steps_in(0))):
        started = time.perf_counter()
        found.append(next(shares).arrays)
        read_s = time.perf_counter() - started
    return found, read_s


def _as_if_cached(batches: Sequence[Arrays], plan: Plan) -> tuple[list[Arrays], Teacher]:
    config = plan.config
    teacher, needs = make_teacher(config, plan.train.labels), teacher_needs(config.distillation)
    assert teacher is not None
    assert needs is not None
    maker = maker_as_cached(config, teacher, batches[:1])
    columns, sizes = columns_for(needs), maker.sizes
    rows = [maker.rows(as_the_teacher_sees(arrays)) for arrays in batches]
    cached = [with_record(*pair, sizes, columns) for pair in zip(batches, rows, strict=True)]
    directions, decoder = flat_directions(sizes.channels), teacher.decoder if needs.decoder else None
    return cached, CachedTeacher(sizes, directions, decoder, bases=maker.bases)
