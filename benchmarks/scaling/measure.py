"""One and two workers through the pipeline, the same in bare processes, and the parts: sides in turn, rounds of ratios."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.local_cache import make_cache
from benchmarks.scaling.bare import side_by_side
from benchmarks.scaling.model import Costs
from benchmarks.scaling.probes import block_seconds, loader_image_seconds, probe
from benchmarks.timing import load_note, machine
from pipelines.cluster.start import start_ray
from pipelines.demo.quickstart import BACKBONE, RECIPE, TEACHER, TRAIN
from pipelines.prepare import prepare
from pipelines.tracking.tracker import Tracker
from pipelines.training import driver as distill
from qskd.config import Config
from qskd.config.recipe import load, to_yaml
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import make_shapes
from qskd.from_recipe import make_teacher
from qskd.teacher.identity import cache_identity, teacher_preprocessing

BATCH = 16  # of each worker
IMAGES = 640  # 40 steps of one worker, 20 of two
WARM_UP_STEPS = 80  # two epochs of one worker, four of two: views are then in the readers' memory
STEPS_PER_REPORT = 250  # in the model: of the quickstart, about; the runs here report far more often


@dataclass
class Record:
    """What a measurement found. *_s: mean seconds of a step, one entry a round. pipeline: by number of workers; bare: by
    number of processes side by side. probes: by number of workers; block_s: by number of workers."""

    facts: list[str] = field(default_factory=list)
    pipeline_s: dict[str, list[float]] = field(default_factory=dict)
    waited_s: dict[str, list[float]] = field(default_factory=dict)
    bare_s: dict[str, list[float]] = field(default_factory=dict)
    samples_s: dict[str, list[float]] = field(default_factory=dict)
    probes: dict[str, dict[str, float]] = field(default_factory=dict)
    block_s: dict[str, float] = field(default_factory=dict)
    loader_decoded_s: float = 0.0
    loader_kept_s: float = 0.0
    run_steps: int = 0

    def costs(self) -> Costs:
        """For the model: medians over rounds. Two measured sizes of all-reduce give latency and speed."""
        two = self.probes["2"]
        latency_s = two["small_s"] / 2  # two messages, one after the other
        alone, crowded = (tuple(self.samples_s[name]) for name in ("1", "2"))
        reports = [self.probes[name]["report_s"] for name in ("1", "2")]
        return Costs(
            compute_s=alone,
            crowded_s=crowded,
            overhead_s=max(0.0, statistics.median(self.pipeline_s["1"]) - statistics.fmean(alone)),
            gradient_bytes=two["gradient_bytes"],
            latency_s=latency_s,
            bytes_per_s=two["large_bytes"] / max(1e-9, two["large_s"] - two["small_s"]),
            images=BATCH,
            loader_image_s=self.loader_kept_s,
            readers=1.0,
            block_s=self.block_s["64"],
            run_steps=self.run_steps,
            cpus=1.0,
            report_s=reports[0],
            report_worker_s=max(0.0, reports[1] - reports[0]),
            report_steps=STEPS_PER_REPORT,
        )


def recipe(folder: Path, name: str, workers: int, steps: int) -> Config:
    overrides = [
        f"name={name}",
        f"output={folder}/runs",
        f"data.train={folder}/train",
        f"data.val={folder}/val",
        f"student.backbone.init={BACKBONE}",
        f"teacher.path={TEACHER}",
        f"teacher.cache.path={folder}/cache",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        f"training.batch_size={BATCH * workers}",
        f"training.epochs={max(1, steps * BATCH * workers // IMAGES)}",
        "training.evaluate_every_epochs=100000",
        f"compute.workers={workers}",
        "compute.device=cpu",
    ]
    return load(RECIPE, overrides)


def make_data(folder: Path) -> None:
    for name, images, first in (("train", IMAGES, 0), ("val", 16, 1_000_000)):
        shapes = TRAIN.model_copy(update={"images": images, "first_image": first})
        prepare(*make_shapes(shapes, folder / f"{name}-coco"), str(folder / name), quiet=True)
    config = recipe(folder, "cache", 1, 1)
    train = load_manifest(config.data.train)
    teacher = make_teacher(config, train.labels)
    assert teacher is not None
    make_cache(config, teacher, teacher_preprocessing(config).resize, dict(cache_identity(config, train)))


def weighted_mean(series: Sequence[tuple[int, float]], after: int) -> float:
    """Of rows (step, mean since the row before) that begin after a step, each counting as often as it has steps."""
    total, count, last = 0.0, 0, 0
    for step, value in series:
        if last >= after:
            total, count = total + (step - last) * value, count + step - last
        last = step
    if not count:
        raise ValueError(f"no row begins after step {after}")
    return total / count


def pipeline_times(folder: Path, name: str, workers: int, steps: int) -> tuple[float, float]:
    """Mean seconds of a step and of the wait for its batch, from the run's own metrics."""
    config = recipe(folder, name, workers, steps)
    done = distill.run(config, "distill")
    tracker = Tracker(config.tracking.uri, done.run_id)
    step_s, waited_s = (
        weighted_mean(tracker.series(f"speed/{metric}"), WARM_UP_STEPS) for metric in ("step_s", "loader_wait_s")
    )
    return step_s, waited_s


def measure(rounds: int, steps: int, bare_seconds: float, blocks: int) -> Record:
    """steps: of each run of the pipeline. bare_seconds: of each bare measurement. blocks: of each of Ray Data's."""
    import ray

    record = Record(facts=[machine("ray"), load_note()])
    with tempfile.TemporaryDirectory(prefix="qskd-scaling-") as scratch:
        folder = Path(scratch)
        make_data(folder)
        bare = folder / "bare.yaml"
        bare.write_text(to_yaml(recipe(folder, "bare", 1, steps)))
        plan = distill.make_plan(distill.resolve(recipe(folder, "plan", 1, steps), "distill"), "distill")
        record.run_steps = plan.stream.range_length(2)
        record.loader_decoded_s, record.loader_kept_s = loader_image_seconds(plan, IMAGES)
        for number in range(rounds):
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                times = side_by_side(bare, count, bare_seconds)
                record.samples_s.setdefault(str(count), []).extend(times)
                record.bare_s.setdefault(str(count), []).append(statistics.fmean(times))
        start_ray()
        for number in range(rounds):
            for workers in (1, 2) if number % 2 == 0 else (2, 1):
                step_s, waited_s = pipeline_times(folder, f"{workers}-workers-{number}", workers, steps)
                record.pipeline_s.setdefault(str(workers), []).append(step_s)
                record.waited_s.setdefault(str(workers), []).append(waited_s)
        for workers in (1, 2):
            record.probes[str(workers)] = probe(plan, workers, folder)
        for count in (1, 8, 64):
            record.block_s[str(count)] = block_seconds(plan.stream, count, blocks)
        ray.shutdown()
    record.facts.append(
        f"the quickstart's student, its teacher's outputs cached; batch {BATCH} for each worker, one thread each, one "
        f"reader each; {steps} steps a run, the first {WARM_UP_STEPS} left out; {os.cpu_count()} cores"
    )
    return record


def as_tree(record: Record) -> dict[str, Any]:
    return dict(record.__dict__)
