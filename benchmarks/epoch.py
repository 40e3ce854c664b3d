"""A distillation epoch with the teacher in every step over the same epoch from the cache, through the whole pipeline.

python -m benchmarks.epoch

The quickstart's student, teacher and data under Ray Train, one worker with one thread, one loader process: trained online,
from the cache and without a teacher, in turn. Times are the workers' own, of every epoch after the first; evaluation and
start-up don't count. What could be gained at most is (teacher forward + student step) / student step, both measured here
alone, in this process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.timing import Ratio, Report, load_note, machine, ratios
from pipelines.caching import driver as cache_teacher
from pipelines.demo.quickstart import RECIPE, TEACHER
from pipelines.feed.stream import local_stream
from pipelines.prepare import prepare
from pipelines.run.folder import Folder
from pipelines.run.history import read_history
from pipelines.training import driver as distill
from qskd.config import Config
from qskd.config.recipe import load
from qskd.datasets.batch import train_batch
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.detectors import build_student
from qskd.distillation.method import teacher_needs
from qskd.from_recipe import make_teacher
from qskd.training.step import Training

GOAL = 0.95  # of what could be gained at most
SIDES = {"online": "distill", "cached": "distill", "plain": "train"}


def recipe(folder: Path, side: str, number: int, epochs: int) -> Config:
    overrides = [
        f"name={side}-{number}",
        f"output={folder}/runs",
        f"data.train={folder}/train",
        f"data.val={folder}/val",
        "data.views.count=1",
        f"teacher.path={TEACHER}",
        f"teacher.cache.path={folder / 'cache' if side == 'cached' else ''}",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        f"training.epochs={epochs}",
        f"training.evaluate_every_epochs={epochs}",
    ]
    return load(RECIPE, overrides)


def epoch_speed(folder: Path, side: str, number: int, epochs: int) -> float:
    """Images a second, over all epochs after the first."""
    config = recipe(folder, side, number, epochs)
    distill.run(config, SIDES[side])
    return statistics.median(entry["training"]["speed/images_per_s"] for entry in read_history(Folder(config))[1:])


def bare_times(folder: Path, steps: int) -> tuple[float, float]:
    """Seconds of the teacher's forward pass on a batch, and of a plain step on it: medians, in turn, one thread."""
    torch.set_num_threads(1)
    config = recipe(folder, "online", 0, 1)
    labels = load_manifest(config.data.train).labels
    teacher, needs = make_teacher(config, labels), teacher_needs(config.distillation)
    assert teacher is not None
    assert needs is not None
    plain = distill.resolve(config, "train")
    training = Training(plain, build_student(plain.student, labels, 0), None, 10_000, torch.device("cpu"))
    stream = distill.make_plan(plain, "train").stream
    taken: tuple[list[float], list[float]] = ([], [])
    for share, _ in zip(local_stream(stream), range(steps), strict=False):
        batch = train_batch(share.arrays)
        started = time.perf_counter()
        teacher(batch.images, batch.sizes, needs)
        between = time.perf_counter()
        training.train_step(batch)
        taken[0].append(between - started)
        taken[1].append(time.perf_counter() - between)
    return statistics.median(taken[0]), statistics.median(taken[1])


def measure(images: int, epochs: int, rounds: int) -> Report:
    import ray

    report = Report("A distillation epoch: the teacher online over the cache")
    with tempfile.TemporaryDirectory(prefix="qskd-epoch-") as scratch:
        folder = Path(scratch)
        for name, count, first in (("train", images, 0), ("val", 32, 1_000_000)):
            made = make_shapes(ShapesConfig(images=count, first_image=first), folder / f"{name}-coco")
            prepare(*made, str(folder / name), quiet=True)
        cache_teacher.run(recipe(folder, "cached", 0, epochs), quiet=True)
        speeds: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(rounds):
            for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
                speeds[side].append(epoch_speed(folder, side, number, epochs))
        ray.shutdown()
        teacher_s, step_s = bare_times(folder, 20)
        teacher_s, step_s = bare_times(folder, 60)
    most = (teacher_s + step_s) / step_s
    batch = recipe(folder, "online", 0, 1).training.batch_size
    shown = {side: f"{batch / statistics.median(values) * 1000:.0f}" for side, values in speeds.items()}
    report.facts += [
        machine("ray"),
        load_note(),
        f"{images} images, batch {batch}; {epochs - 1} epochs counted; one worker, one thread, one loader process",
        f"alone, in this process: teacher forward {1000 * teacher_s:.0f} ms, plain step {1000 * step_s:.0f} ms a batch: "
        f"at most {most:.2f} times faster",
    ]
    gained, lost = ratios(speeds["cached"], speeds["online"]), ratios(speeds["plain"], speeds["cached"])
    times = {
        pair: " / ".join(f"{shown[side]}" for side in pair) + " ms"
        for pair in (("online", "cached"), ("cached", "plain"))
    }
    report.ratios += [
        Ratio("online / cached, a step's time", gained, times["online", "cached"], at_least=GOAL * most),
        Ratio("cached / plain, a step's time", lost, times["cached", "plain"]),
    ]
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epoch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=960)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args(arguments)
    report = measure(given.images, given.epochs, given.rounds)
    report.print()
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
