"""Sweeps: what the cache, early stopping and Ray Tune itself make of their time.

python -m benchmarks.sweep cache       # eight trials from the cache over the same eight with the teacher online
python -m benchmarks.sweep asha        # a sweep at full budgets, and what ASHA would have made of it
python -m benchmarks.sweep overhead    # seconds that Tune adds to a trial

All on the quickstart's task (its student, its teacher, images made as its are; --images of them), on whatever cores there are.
cache: random search over all three spaces without early stopping, so that both sides train the same trials; sides take
turns; each round has a seed of its own, for the trials of one seed share initial weights, order, and luck. asha: ASHA decides
by the curves alone and changes nothing in a trial but its end, so the sweep at full budgets has all it would have seen; it is
played again over many orders of arrival. overhead: sweeps of n and of 2 n short trials, one at a time; their difference
over n, less the same trials in a bare loop.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.timing import Difference, Ratio, Report, load_note, machine, ratios
from pipelines.caching import driver as cache_teacher
from pipelines.cluster.start import start_ray
from pipelines.demo.quickstart import BACKBONE, RECIPE, TEACHER, TRAIN, VAL
from pipelines.prepare import prepare
from pipelines.run.resolve import resolve
from pipelines.tuning import driver as tune
from pipelines.tuning.engine import SweepScheduler, make_asha
from pipelines.tuning.records import Records, trial_config
from pipelines.tuning.search.request import SearchRequest, check_request
from pipelines.tuning.trial.job import Job
from pipelines.tuning.trial.row import TrialRow
from pipelines.tuning.trial.run import run_trial
from qskd.config import Config
from qskd.config.recipe import load, to_tree
from qskd.datasets.shapes import make_shapes
from qskd.teacher.manifest import load_cache_manifest

SPACES = ("student_architecture", "query_selection", "loss_weights")
AP_TOLERANCE = 0.02  # the cache rounds; training magnifies it, by chance either way


@contextlib.contextmanager
def data(images: int, val_images: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qskd-sweep-") as scratch:
        folder = Path(scratch)
        for name, made in (("train", TRAIN), ("val", VAL)):
            count = images if name == "train" else val_images
            annotations, pictures = make_shapes(made.model_copy(update={"images": count}), folder / f"{name}-coco")
            prepare(annotations, pictures, str(folder / name), quiet=True)
        start_ray()
        yield folder


def recipe(folder: Path, name: str, epochs: int, cached: bool = True, seed: int = 0) -> Config:
    overrides = [
        f"seed={seed}",
        *(f"name={name}", f"output={folder}/runs", f"data.train={folder}/train", f"data.val={folder}/val"),
        *(f"student.backbone.init={BACKBONE}", f"teacher.path={TEACHER}", "teacher.cache.all_layers=true"),
        *(f"tracking.uri=sqlite:///{folder}/mlflow.db", f"training.epochs={epochs}"),
        f"teacher.cache.path={folder / 'cache' if cached else ''}",
    ]
    return resolve(load(RECIPE, overrides), "distill")


def sweep(config: Config, request: tune.TuneRequest) -> tuple[float, tuple[TrialRow, ...]]:
    """Seconds and rows of a sweep; what it prints only when it fails."""
    said = io.StringIO()
    started = time.perf_counter()
    try:
        with contextlib.redirect_stdout(said):
            rows = tune.run(config, request).rows
    except BaseException:
        print(said.getvalue())
        raise
    failed = [row.reason for row in rows if row.state == "failed"]
    if failed:
        raise SystemExit(f"{len(failed)} trials failed: {failed[0]}")
    return time.perf_counter() - started, rows


def measure_cache(images: int, val_images: int, trials: int, epochs: int, rounds: int) -> Report:
    report = Report("A sweep from the cache over the same sweep with the teacher online")
    request = tune.TuneRequest(SearchRequest(SPACES, trials=trials, algorithm="random", asha=False))
    taken: dict[str, list[float]] = {"cached": [], "online": []}
    found: dict[str, list[TrialRow]] = {"cached": [], "online": []}
    with data(images, val_images) as folder:
        started = time.perf_counter()
        cache_teacher.run(recipe(folder, "cache", epochs), quiet=True)
        making_s = time.perf_counter() - started
        for number in range(rounds):
            for side in list(taken)[:: 1 if number % 2 == 0 else -1]:
                config = recipe(folder, f"{side}-{number}", epochs, cached=side == "cached", seed=number)
                seconds, rows = sweep(config, request)
                taken[side].append(seconds)
                found[side] += rows
    pairs = list(zip(found["cached"], found["online"], strict=True))
    if any(one.overrides != other.overrides for one, other in pairs):
        raise SystemExit("the sides did not train the same trials")
    medians = {side: f"{statistics.median(values):.0f} s" for side, values in taken.items()}
    shown = f"{medians['cached']} / {medians['online']}"
    whole = [seconds + making_s for seconds in taken["cached"]]
    report.facts += [
        *(machine("ray", "optuna"), load_note()),
        f"{trials} trials of {epochs} epoch(s) of {images} images; making the cache once took {making_s:.0f} s more",
    ]
    report.ratios += [
        Ratio("cached / online, wall time", ratios(taken["cached"], taken["online"]), shown, at_most=0.5),
        Ratio("the same, the cache made within it", ratios(whole, taken["online"])),
    ]
    moved = [one.best_ap - other.best_ap for one, other in pairs]
    report.figures += [("AP cached - online, trial by trial", "  ".join(f"{value:+.4f}" for value in moved))]
    report.differences += [Difference("the mean AP of all trials", abs(statistics.fmean(moved)), AP_TOLERANCE)]
    return report


def play(rows: Sequence[TrialRow], order: Sequence[int], make: Callable[[], SweepScheduler]) -> list[TrialRow]:
    """The rows as early stopping would have left them, had the trials come one after another in this order."""
    scheduler, verdicts = make(), {}
    scheduler.conductor = SimpleNamespace(heard=lambda number, report, stop: verdicts.update({number: stop}))
    kept = []
    for number in order:
        row, reached = rows[number], 0
        for epochs, ap in row.curve:
            reached += 1
            text = json.dumps({"epochs": epochs, "metrics": {"AP": ap}, "last": reached == len(row.curve)})
            scheduler.on_trial_result(None, SimpleNamespace(config={"number": number}), {"report": text})
            if verdicts[number]:
                break
        kept.append(replace(row, curve=row.curve[:reached]))
    return kept


def measure_asha(images: int, val_images: int, trials: int, epochs: int, orders: int) -> Report:
    report = Report("ASHA over full budgets")
    asked = SearchRequest(SPACES, trials=trials, algorithm="random", asha=False)
    with data(images, val_images) as folder:
        config = recipe(folder, "full", epochs)
        _, rows = sweep(config, tune.TuneRequest(asked))
        search = check_request(replace(asked, asha=True), config)
        longest = max(row.epochs for row in rows)
        played = []
        for seed in range(orders):
            order = list(range(1, len(rows)))
            random.Random(seed).shuffle(order)
            played.append(
                play(rows, [0, *order], lambda: SweepScheduler(None, make_asha(search, longest), []))  # type: ignore[arg-type]
            )
    trained = sum(row.epochs for row in rows)
    best = max(row.best_ap for row in rows)
    report.facts += [
        *(machine("ray", "optuna"), load_note()),
        f"{trials} random trials of {epochs} epochs of {images} images; {orders} orders of arrival, the recipe first",
    ]
    report.ratios += [
        Ratio(
            "best AP, ASHA / full",
            tuple(max(row.best_ap for row in kept) / max(best, 1e-9) for kept in played),
            f"full: {best:.3f}",
            at_least=0.99,
        ),
        Ratio(
            "epochs trained, ASHA / full",
            tuple(sum(row.epochs for row in kept) / trained for kept in played),
            f"full: {trained:g}",
            at_most=1 / 3,
        ),
    ]
    return report


def bare_loop(config: Config, trials: int) -> float:
    """Seconds of so many trials of the recipe, each doing what Tune has its trials do: the cache is known to be the recipe's."""
    known = load_cache_manifest(config.teacher.cache.path)
    assert known is not None
    jobs = [
        Job(
            each,
            to_tree(trial_config(config, each)),
            recipe=to_tree(config),
            recipe_latency_ms=1.0,
            known_cache=known.fingerprint,
        )
        for each in range(trials)
    ]
    for job in jobs:
        Records(config).put(TrialRow(job.number, "running"))
    said: list[Mapping[str, Any]] = []
    started = time.perf_counter()
    for job in jobs:
        run_trial(job, said.append)
    taken = time.perf_counter() - started
    if failed := [each["failed"] for each in said if "failed" in each]:  # it is sent, not raised
        raise SystemExit(f"{len(failed)} trials failed: {failed[0]}")
    return taken


def measure_overhead(images: int, val_images: int, trials: int, rounds: int) -> Report:
    """One worker, one thread, one trial at a time on both sides."""
    report = Report("What Ray Tune adds to a trial")
    per_trial: dict[str, list[float]] = {"tune": [], "bare": []}
    starts: list[float] = []
    with data(images, val_images) as folder:
        cache_teacher.run(recipe(folder, "cache", 1), quiet=True)
        for number in range(rounds):
            taken = []
            for count in (trials, 2 * trials):
                asked = SearchRequest(("query_selection",), trials=count, algorithm="random", asha=False)
                config = recipe(folder, f"tune-{number}-{count}", 1)
                taken.append(sweep(config, tune.TuneRequest(asked, at_once=1))[0])
            per_trial["tune"].append((taken[1] - taken[0]) / trials)
            starts.append(2 * taken[0] - taken[1])
            bare = recipe(folder, f"bare-{number}", 1)
            per_trial["bare"].append(bare_loop(bare, trials) / trials)
    added = [one - other for one, other in zip(per_trial["tune"], per_trial["bare"], strict=True)]
    report.facts += [
        *(machine("ray", "optuna"), load_note()),
        f"trials of one epoch of {images} images; sweeps of {trials} and {2 * trials} trials, one at a time; their start-up, "
        f"report and end: {statistics.median(starts):.1f} s",
    ]
    shown = " / ".join(f"{statistics.median(values):.2f} s" for values in per_trial.values())
    report.ratios += [Ratio("a trial under Tune / in a bare loop", ratios(per_trial["tune"], per_trial["bare"]), shown)]
    report.figures += [("added to a trial", f"{statistics.median(added):.2f} s ({min(added):.2f} to {max(added):.2f})")]
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").split("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name, images, trials in (("cache", 3000, 8), ("asha", 2000, 12), ("overhead", 320, 4)):
        part = parts.add_parser(name)
        part.add_argument("--images", type=int, default=images)
        part.add_argument("--val-images", type=int, default=64 if name == "overhead" else 250)
        part.add_argument("--trials", type=int, default=trials)
        if name != "overhead":
            part.add_argument("--epochs", type=int, default=1 if name == "cache" else 9)
        part.add_argument("--orders" if name == "asha" else "--rounds", type=int, default=20 if name == "asha" else 2)
    given = parser.parse_args(arguments)
    import ray

    common = (given.images, given.val_images, given.trials)
    try:
        if given.part == "cache":
            report = measure_cache(*common, given.epochs, given.rounds)
        elif given.part == "asha":
            report = measure_asha(*common, given.epochs, given.orders)
        else:
            report = measure_overhead(*common, given.rounds)
    finally:
        ray.shutdown()
    report.print()
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
