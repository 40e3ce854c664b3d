"""The whole path on built-in data, in minutes on two cores (`qskd quickstart`).

Makes a dataset, shards it, takes the small teacher that comes with the package and caches its outputs, trains the same
student twice at once - with QSKD and without a teacher, on the same batches - and puts the three in one table. Only the taught
one starts from the teacher's layers: the other stands for having no teacher at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import pipelines
from pipelines.caching.driver import run as cache
from pipelines.cluster.start import start_ray
from pipelines.inspection.evaluate import evaluate
from pipelines.prepare import prepare
from pipelines.reporting.board import progress
from pipelines.reporting.cards import complete
from pipelines.reporting.watch import TrainingWatch
from pipelines.run.folder import Folder
from pipelines.run.resolve import ResolvedConfig, resolve
from pipelines.tracking.store import how_to_look, sqlite_uri
from pipelines.training.driver import RunResult, read_result
from pipelines.training.plan import make_plan
from qskd.config.recipe import load
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.detectors import load_detector, read_preprocessing
from qskd.detectors.cost import gflops, latency_ms, parameters
from qskd.errors import QskdError
from qskd.evaluation.shown import is_measured, score_text
from qskd.printable import escaped

ASSETS = Path(pipelines.__file__).parent / "assets"
TEACHER = ASSETS / "shapes_teacher"
BACKBONE = ASSETS / "shapes_backbone"  # both students' start, as ImageNet weights are elsewhere
RECIPE = ASSETS / "quickstart.yaml"
# Crowded, half hidden, in eight pairs of look-alike classes: there are hard negatives to learn from.
TRAIN = ShapesConfig(
    images=6000,
    classes="hard",
    min_objects=2,
    max_objects=7,
    min_object=10,
    max_object=26,
    crowding=0.5,
    occlusion=0.5,
    clutter=0.4,
)
VAL = TRAIN.model_copy(update={"images": 500, "first_image": 1_000_000})
TEST = TRAIN.model_copy(update={"images": 1000, "first_image": 2_000_000})  # for `benchmarks.evidence` alone
VERBS = {"baseline": "train", "qskd": "distill"}  # of each student, by its name
CLOSING_S = 20  # for a training that was told to stop


def make_data(folder: Path) -> None:
    """folder/data/{train,val}: the JPEG files and JSON, and the shards made of them. What is there is kept."""
    for name, config in (("train", TRAIN), ("val", VAL)):
        shards = folder / "data" / name
        if not (shards / "manifest.json").exists():
            annotations, images = make_shapes(config, folder / "data" / f"{name}-coco")
            prepare(annotations, images, str(shards))


def recipe(folder: Path, name: str) -> ResolvedConfig:
    """The configuration of the student that is called `name` in VERBS."""
    verb = VERBS[name]
    where = {
        "name": name,
        "output": folder,
        "data.train": f"{folder}/data/train",
        "data.val": f"{folder}/data/val",
        "student.backbone.init": BACKBONE,
        "teacher.path": TEACHER,
        "teacher.cache.path": f"{folder}/data/train.teacher",
        "tracking.uri": sqlite_uri(f"{folder}/mlflow.db"),
        "tracking.experiment": "quickstart",
    }
    # In quotation marks: an override is YAML, to which " #" in a path begins a comment.
    overrides = [f"{field}={json.dumps(str(value), ensure_ascii=False)}" for field, value in where.items()]
    overrides += ["student.inherit=false"] if verb == "train" else []
    return resolve(load(RECIPE, overrides), verb)


@dataclass(frozen=True)
class Row:
    """One model of the table. Costs: millions of parameters, GFLOPs and ms for one image."""

    name: str
    metrics: Mapping[str, float]
    parameters_m: float
    gflops: float
    ms: float


def measure(name: str, folder: str | Path, metrics: Mapping[str, float]) -> Row:
    """The cost of a detector at its own resolution, batch 1, on this machine's CPU with one thread."""
    torch.set_num_threads(1)
    detector, size = load_detector(folder).eval(), read_preprocessing(folder).resize.size
    pixels, mask = torch.zeros(1, 3, size, size), torch.ones(1, size, size, dtype=torch.bool)
    with torch.inference_mode():
        timing = latency_ms(lambda: detector.model(pixels, pixel_mask=mask), warmup=10, repeats=100)
        return Row(name, metrics, parameters(detector) / 1e6, gflops(detector, pixels, mask), timing["median"])


def show(rows: list[Row], console: Console) -> None:
    table = Table(title=f"{VAL.images} held-out images")
    for column in ("", "AP", "AP50", "AP75", "parameters", "GFLOPs", "ms/image"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        scores = [score_text(row.metrics.get(name)) for name in ("AP", "AP50", "AP75")]
        table.add_row(row.name, *scores, f"{row.parameters_m:.2f} M", f"{row.gflops:.3f}", f"{row.ms:.1f}")
    console.print(table)


def train_both(folder: Path, restart: bool) -> dict[str, RunResult]:
    """Both students at once, each in a process of its own, joined to one Ray."""
    start_ray()
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    commands = {
        name: [sys.executable, "-m", "pipelines.demo.student", str(folder), name, *(["--restart"] if restart else [])]
        for name in VERBS
    }
    # Sessions of their own: Ctrl-C would reach them too, and the SIGTERM below would be a second signal, which ends at once.
    # What they say comes through here, that it does not get into the middle of the bars.
    processes = {
        name: subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
        )
        for name, command in commands.items()
    }
    relays = [
        threading.Thread(target=_relay, args=(source, of), daemon=True)
        for process in processes.values()
        for source, of in ((process.stdout, "stdout"), (process.stderr, "stderr"))
    ]
    for relay in relays:
        relay.start()
    try:
        with contextlib.ExitStack() as everything:
            shown = {name: everything.enter_context(contextlib.ExitStack()) for name in VERBS}
            for name, own in shown.items():
                config = recipe(folder, name)
                schedule = make_plan(config, VERBS[name]).stream.schedule
                row = own.enter_context(progress(name, schedule.total_steps, "step"))
                row.stage("starting")
                own.enter_context(TrainingWatch(row, Folder(config), schedule, another=True))
            _wait(processes, shown)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():  # each closes its MLflow run, while Ray is there
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CLOSING_S)
            process.kill()
        for relay in relays:
            relay.join(1.0)
    return {name: read_result(Folder(recipe(folder, name))) for name in VERBS}


def _relay(source: Any, stream: str) -> None:
    """Pass on what a process says, to what is standard output or error when it says so."""
    for line in source:
        print(line, end="", file=getattr(sys, stream), flush=True)


def _wait(processes: Mapping[str, subprocess.Popen[str]], shown: Mapping[str, contextlib.ExitStack]) -> None:
    """Until all have ended well; QskdError as soon as one has not. shown: closed as soon as its process has ended."""
    while True:
        codes = {name: process.poll() for name, process in processes.items()}
        failed = [name for name, code in codes.items() if code]
        if failed:
            raise QskdError("quickstart", f"training failed: {', '.join(failed)}", remedy="the messages above say why")
        for name, code in codes.items():
            if code == 0:
                shown[name].close()
        if None not in codes.values():
            return
        time.sleep(0.2)


def quickstart(folder: Path, dry_run: bool = False, restart: bool = False) -> None:
    """Everything; see the module's head."""
    console, started, folder = Console(), time.perf_counter(), folder.resolve()
    shown = escape(escaped(str(folder)))  # what looks like rich's markup in a path is none
    if dry_run:
        views = recipe(folder, "qskd").data.views.count
        console.print(
            f"would make {TRAIN.images} + {VAL.images} images and shards in {shown}/data, run the teacher on {views} view(s)"
            " of each, then train, both at once:",
            soft_wrap=True,
        )
        for name in VERBS:
            console.print(f"  {name}: {recipe(folder, name).training.epochs} epochs → {shown}/{name}")
        return
    console.print(
        f"[bold]1/5[/] {TRAIN.images} + {VAL.images} images of shapes, and their shards → {shown}/data", soft_wrap=True
    )
    make_data(folder)
    console.print("[bold]2/5[/] the teacher's outputs, once for all training that follows")
    cached = recipe(folder, "qskd")
    cores = min(2, os.cpu_count() or 1)
    cache(cached.model_copy(update={"compute": cached.compute.model_copy(update={"workers": cores})}))
    console.print(
        f"[bold]3/5[/] two students, one taught by {TEACHER.name} (QSKD), one not (baseline), side by side",
        soft_wrap=True,
    )
    plan = make_plan(recipe(folder, "qskd"), "distill")
    console.print(f"    {plan.stream.schedule.total_steps} steps each")
    results = train_both(folder, restart)
    ray.shutdown()  # its processes would disturb the timing
    console.print("[bold]4/5[/] the teacher on the held-out images")
    teacher = evaluate(str(TEACHER), f"{folder}/data/val", workers=0, threads=2)
    console.print("[bold]5/5[/] parameters, FLOPs and latency")
    rows = [
        measure("teacher", TEACHER, teacher.metrics),
        measure("student, no teacher", results["baseline"].student, results["baseline"].metrics),
        measure("student, QSKD", results["qskd"].student, results["qskd"].metrics),
    ]
    show(rows, console)
    complete(results["qskd"].student, teacher.metrics, results["baseline"].metrics)
    aps = {"teacher": teacher.metrics["AP"], **{name: result.metrics["AP"] for name, result in results.items()}}
    if all(map(is_measured, aps.values())):
        gap, gain = aps["teacher"] - aps["baseline"], aps["qskd"] - aps["baseline"]
        console.print(
            f"QSKD, begun from the teacher's layers: {gain:+.3f} AP over the student without a teacher, "
            f"{gain / gap:.0%} of the gap; one seed.",
            soft_wrap=True,
        )
    look = how_to_look(recipe(folder, "qskd").tracking.uri)
    console.print(f"student: {shown}/qskd/student (a plain Hugging Face folder)", soft_wrap=True)
    console.print(f"runs, curves and pictures: {escape(escaped(look))}", soft_wrap=True)
    console.print(f"{time.perf_counter() - started:.0f} s in all")
