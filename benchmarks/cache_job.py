"""The cache job against a bare loop that only runs the teacher.

python -m benchmarks.cache_job [--size quickstart|resnet50]

Both sides see the same images in the same batches with one thread. The bare loop gets pixels that are decoded, resized and
normalised; it keeps nothing. The job reads shards, decodes (in tasks beside the teacher), matches, computes the attention of
the queries it keeps, encodes and writes. Sides take turns: loop, job, loop, job, loop.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.timing import Ratio, Report, load_note, machine
from pipelines.caching.driver import CacheResult, run
from pipelines.demo.quickstart import TEACHER
from pipelines.prepare import prepare
from qskd.config import Config
from qskd.config.recipe import load
from qskd.datasets.loader import BatchLoader
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.datasets.shards import ShardReader
from qskd.detectors import Preprocessing, build_student, save_detector, to_pixels
from qskd.from_recipe import make_teacher
from qskd.teacher.identity import teacher_preprocessing
from qskd.teacher.making import row_batches
from qskd.teacher.online import OnlineTeacher

GOAL = 0.95
Ready = list[tuple[torch.Tensor, torch.Tensor]]


def quickstart(folder: Path, images: int) -> Config:
    """The quickstart's teacher, 64 x 64 pixels, on shapes."""
    annotations, pictures = make_shapes(ShapesConfig(images=images), folder / "shapes")
    prepare(annotations, pictures, str(folder / "data"), rows_per_shard=512, quiet=True)
    return load(None, [f"teacher.path={TEACHER}"])


def resnet50(folder: Path, images: int) -> Config:
    """A Conditional DETR ResNet-50 with 300 queries at 320 pixels: random weights cost what trained ones do."""
    annotations, pictures = make_shapes(ShapesConfig(images=images, size=320), folder / "shapes")
    prepare(annotations, pictures, str(folder / "data"), rows_per_shard=max(16, images // 3), quiet=True)
    backbone = "{layer_type: bottleneck, hidden_sizes: [256, 512, 1024, 2048], depths: [3, 4, 6, 3]}"
    student = load(None, [f"student.backbone={backbone}", "student.resize.size=320"]).student
    labels = ShardReader(str(folder / "data")).manifest.labels
    detector = build_student(student, labels, seed=0).eval()
    save_detector(detector, folder / "teacher", student.resize)
    return load(None, [f"teacher.path={folder / 'teacher'}", "teacher.cache.batch_size=4"])


SIZES = {"quickstart": (quickstart, 3072), "resnet50": (resnet50, 96)}


def ready_batches(config: Config, seen_as: Preprocessing) -> Ready:
    """Everything the teacher will see, as it wants it."""
    reader, views = ShardReader(config.data.train), config.data.views
    loader = BatchLoader(config.data.train, "", views, seen_as.resize)
    ready = []
    for shard in range(len(reader.manifest.shards)):
        for window in row_batches(reader, shard, 0, views, seen_as.resize, config.teacher.cache.batch_size):
            for rows in window:
                arrays = loader.load("train", rows)
                images, sizes = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["sizes"])
                ready.append(to_pixels(images, sizes, seen_as.mean, seen_as.std))
    return ready


def bare_loop(teacher: OnlineTeacher, ready: Ready) -> float:
    """Images a second."""
    started = time.perf_counter()
    with torch.inference_mode():
        for pixels, mask in ready:
            teacher.detector(pixels, mask, with_attention=False)
    return sum(len(pixels) for pixels, _ in ready) / (time.perf_counter() - started)


def measure(size: str, images: int, rounds: int) -> Report:
    import ray

    report = Report(f"The cache job over a bare loop of the teacher ({size}, {images} images)")
    with tempfile.TemporaryDirectory(prefix="qskd-cache-job-") as scratch:
        folder = Path(scratch)
        config = SIZES[size][0](folder, images)
        data = config.data.model_copy(update={"train": str(folder / "data")})
        config = config.model_copy(update={"data": data})
        seen_as = teacher_preprocessing(config)
        teacher = make_teacher(config, ShardReader(config.data.train).manifest.labels)
        assert teacher is not None
        torch.set_num_threads(1)
        ready = ready_batches(config, seen_as)
        bare_loop(teacher, ready[: max(1, len(ready) // 10)])
        loops, jobs = [bare_loop(teacher, ready)], list[CacheResult]()
        for number in range(rounds):
            cache = config.teacher.cache.model_copy(update={"path": str(folder / f"cache-{number}")})
            own = config.model_copy(update={"teacher": config.teacher.model_copy(update={"cache": cache})})
            jobs.append(run(own, quiet=True))
            loops.append(bare_loop(teacher, ready))
        ray.shutdown()
    speeds = [job.images / job.actor_seconds for job in jobs]
    beside = [(before + after) / 2 for before, after in pairwise(loops)]
    report.facts += [machine("ray"), load_note(), "one actor, one thread; decoding beside it on the other core"]
    words = f"{statistics.median(speeds):.1f} / {statistics.median(beside):.1f} images/s"
    ratios = tuple(speed / loop for speed, loop in zip(speeds, beside, strict=True))
    report.ratios.append(Ratio("job at work / bare loop", ratios, words, at_least=GOAL))
    whole = statistics.median(job.seconds for job in jobs)
    report.figures += [
        ("one job from the command to the end, start-up of Ray's processes included", f"{whole:.1f} s"),
        ("of that at work on shards", f"{statistics.median(job.actor_seconds for job in jobs):.1f} s"),
        ("of that waiting for decoded pixels", f"{statistics.median(job.waited_seconds for job in jobs):.1f} s"),
        ("bytes an image", f"{jobs[0].bytes / jobs[0].total:.0f}"),
    ]
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache_job", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="quickstart")
    parser.add_argument("--images", type=int, help="instead of the size's own number")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args(arguments)
    report = measure(given.size, given.images or SIZES[given.size][1], given.rounds)
    report.print()
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
