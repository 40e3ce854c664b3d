"""COCO AP through `evaluate_coco` against plain pycocotools, from the same arrays: time and the twelve numbers.

python -m benchmarks.evaluation

Every side begins with the same `GroundTruth` and `Detections` (arrays, as inference leaves them) and ends with the twelve
numbers, so each pays for its own conversions. Plain pycocotools is run as its users run it: the annotations as a COCO
object with its index, the detections as a list of result dicts through `loadRes`, then evaluate, accumulate, summarize.
No JSON file is written or read on any side, and its printing goes nowhere. A second ratio leaves all its conversions
out (COCO object, result dicts, loadRes) while ours stay in. hotcoco uses all cores, pycocotools one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks import timing
from benchmarks.timing import Difference, Ratio, Report
from qskd.evaluation.average_precision import METRICS, evaluate_coco
from qskd.evaluation.detections import Backend, Detections, GroundTruth

GOAL = 0.05
ROUNDING = 1e-6
FAST: tuple[Backend, ...] = ("hotcoco", "faster_coco_eval")
MEAN_OBJECTS = 7.3  # of COCO's images


def installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def make_problem(images: int, per_image: int = 100, classes: int = 80, seed: int = 0) -> tuple[GroundTruth, Detections]:
    """A middling detector on images like COCO's: object counts with a long tail, 1 % of crowds, small objects in the
    majority, category ids with gaps. For most objects there are a few detections near them; the rest is stray, and scores
    follow how good a detection is, with noise."""
    random = np.random.default_rng(seed)
    counts = np.minimum(np.round(random.lognormal(np.log(MEAN_OBJECTS) - 0.5, 1.0, images)).astype(int), 90)
    number, image_ids = int(counts.sum()), np.sort(random.choice(600_000, images, replace=False))
    category_ids = np.sort(random.choice(np.arange(1, 91), classes, replace=False))
    side = np.exp(random.uniform(np.log(8), np.log(350), (number, 2)))
    low = random.uniform(0, 1, (number, 2)) * np.maximum([640, 480] - side, 1)
    boxes, labels = np.concatenate([low, low + side], axis=1), random.integers(0, classes, number)
    owner = np.repeat(np.arange(images), counts)
    truth = GroundTruth(
        image_ids,
        np.full(images, 480, np.int32),
        np.full(images, 640, np.int32),
        image_ids[owner],
        boxes,
        category_ids[labels],
        side.prod(1) * random.uniform(0.4, 1.0, number),
        random.uniform(size=number) < 0.01,
        [(int(category), f"class {category}") for category in category_ids],
    )
    # Detection number d of an image looks at object d % count while d < 5 * count, and is stray after that.
    place = np.tile(np.arange(per_image), images)
    at, count = np.repeat(np.arange(images), per_image), np.repeat(counts, per_image)
    near = place < 5 * count
    first = np.repeat(np.cumsum(counts) - counts, per_image)
    looked_at = (first + place % np.maximum(count, 1))[near]
    found = np.concatenate([random.uniform(0, 400, (len(at), 2)), np.zeros((len(at), 2))], axis=1)
    found[:, 2:] = found[:, :2] + np.exp(random.uniform(np.log(8), np.log(250), (len(at), 2)))
    spread = np.abs(random.normal(0, 0.25, near.sum()))
    shift = random.normal(size=(near.sum(), 4)) * spread[:, None] * np.tile(side[looked_at], 2)
    found[near] = boxes[looked_at] + shift
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    right = random.uniform(size=near.sum()) < 0.8
    chosen = random.integers(0, classes, len(at))
    chosen[near] = np.where(right, labels[looked_at], chosen[near])
    score = random.uniform(0, 0.4, len(at))
    score[near] += np.clip(0.6 - spread, 0, 1) * random.uniform(0.3, 1.0, near.sum())
    return truth, Detections(
        image_ids[at], found.astype(np.float32), score.astype(np.float32), category_ids[chosen].astype(np.int64)
    )


def plain_pycocotools(truth: GroundTruth, found: Detections) -> tuple[list[float], dict[str, float]]:
    """The twelve numbers, and the seconds of each phase."""
    taken: dict[str, float] = {}
    started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        now = time.perf_counter()
        taken[name], started = now - started, now

    with contextlib.redirect_stdout(io.StringIO()):
        corners = truth.boxes_xyxy.tolist()
        objects = zip(
            truth.object_image_ids.tolist(),
            truth.category_ids.tolist(),
            corners,
            truth.area.tolist(),
            truth.iscrowd.tolist(),
            strict=True,
        )
        known = COCO()
        known.dataset = {
            "info": {},
            "images": [{"id": image, "width": 640, "height": 480} for image in truth.image_ids.tolist()],
            "categories": [{"id": category, "name": name} for category, name in truth.categories],
            "annotations": [
                {"id": i, "image_id": m, "category_id": c, "bbox": [x, y, r - x, b - y], "area": a, "iscrowd": int(w)}
                for i, (m, c, (x, y, r, b), a, w) in enumerate(objects, 1)
            ],
        }
        known.createIndex()
        lap("COCO object")
        columns = (found.image_ids, found.category_ids, found.boxes_xyxy, found.scores)
        results = [
            {"image_id": m, "category_id": c, "bbox": [x, y, r - x, b - y], "score": s}
            for m, c, (x, y, r, b), s in zip(*(column.tolist() for column in columns), strict=True)
        ]
        lap("result dicts")
        detected = known.loadRes(results)
        lap("loadRes")
        run = COCOeval(known, detected, "bbox")
        run.evaluate()
        lap("evaluate")
        run.accumulate()
        lap("accumulate")
        run.summarize()
        lap("summarize")
    return [float(value) for value in run.stats], taken


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run a command line, print and return what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=1, help="so many times each; pycocotools takes two minutes")
    parser.add_argument("--quick", action="store_true", help="100 images: seconds, and no fair measure of speed")
    given = parser.parse_args(arguments)
    truth, found = make_problem(100 if given.quick else given.images)
    backends = [name for name in FAST if installed(name)]
    for name in backends:  # imports and first calls are not what is measured
        evaluate_coco(*make_problem(3), backend=name)

    metrics: dict[str, list[float]] = {}
    phases: list[dict[str, float]] = []

    def ours(name: Backend) -> None:
        metrics[name] = list(evaluate_coco(truth, found, backend=name).metrics.values())

    def plain() -> None:
        metrics["plain"], laps = plain_pycocotools(truth, found)
        phases.append(laps)

    sides: dict[str, Callable[[], None]] = {name: partial(ours, name) for name in backends}
    sides["plain"] = plain
    taken = timing.alternate(sides, given.rounds, warm_up=0)
    median = {name: statistics.median(values) for name, values in taken.items()}
    core = [laps["evaluate"] + laps["accumulate"] + laps["summarize"] for laps in phases]

    report = Report("COCO evaluation: seconds of evaluate_coco over those of plain pycocotools (lower is better)")
    for name in backends:
        goal = GOAL if name == "hotcoco" else None
        figures = f"{median[name]:.2f} s to {median['plain']:.2f} s"
        report.ratios.append(Ratio(f"{name}, all", timing.ratios(taken[name], taken["plain"]), figures, at_most=goal))
        figures = f"{median[name]:.2f} s to {statistics.median(core):.2f} s"
        label = f"{name}, all / pycocotools without its conversions"
        report.ratios.append(Ratio(label, timing.ratios(taken[name], core), figures))
        furthest = max(abs(a - b) for a, b in zip(metrics[name], metrics["plain"], strict=False))
        report.differences.append(Difference(f"the twelve numbers, {name} against pycocotools", furthest, ROUNDING))
    report.figures = [
        (f"pycocotools: {name}", f"{statistics.median(laps[name] for laps in phases):.2f} s") for name in phases[0]
    ]
    numbers = ", ".join(
        f"{name} {value:.3f}" for name, value in zip(METRICS, metrics["plain"], strict=False)
    )  # the twelve
    report.facts = [
        timing.machine("hotcoco", "faster-coco-eval", "pycocotools", "numpy") + f", {timing.load_note()}",
        f"{len(truth.image_ids)} images, {len(truth.object_image_ids)} objects "
        f"({int(truth.iscrowd.sum())} crowds) of {len(truth.categories)} categories, {len(found.scores)} detections",
        numbers,
    ]
    report.print()
    return report


if __name__ == "__main__":
    sys.exit(main().exit_code)
