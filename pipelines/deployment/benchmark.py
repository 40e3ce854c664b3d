"""Detectors side by side: parameters, FLOPs, milliseconds and memory by batch size, on this device (`qskd benchmark`). No Ray.

python -m pipelines.benchmark TEACHER runs/quickstart/qskd/student --onnx
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipelines.deployment.export import square
from qskd.deploy.export import export_onnx, open_session
from qskd.deploy.memory import peak_memory
from qskd.deploy.speed import Cost, Runner, Size, Timing, compare_speed, cost_of, onnx_runner, torch_runner, usual_size
from qskd.detectors import Detector, load_detector, read_preprocessing
from qskd.detectors.cost import busy_note
from qskd.errors import QskdError
from qskd.printable import one_line
from qskd.storage.places import fetched
from qskd.storage.scratch import scratch_folder

TORCH, ONNX = "PyTorch", "onnxruntime"


@dataclass(frozen=True)
class BenchmarkOptions:
    """batches: images at a time. size: side of square images; None: each model's own. onnx: onnxruntime beside PyTorch.
    memory: peak memory too, each model in a process of its own. limit_s: of timing, for each batch size."""

    batches: tuple[int, ...] = (1, 2, 4, 8)
    size: int | None = None
    device: str = "auto"
    precision: str = "float32"
    threads: int = 1
    onnx: bool = False
    memory: bool = True
    rounds: int = 20
    limit_s: float = 30.0

    def torch_device(self) -> torch.device:
        if self.device != "auto":
            if self.device == "cuda" and not torch.cuda.is_available():
                raise QskdError("--device", "cuda, and torch sees no CUDA device", "cpu or auto")
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Row:
    """One model in one runtime. memory: batch size -> bytes; empty where it was not measured."""

    name: str
    runtime: str
    timings: list[Timing]
    memory: dict[int, int]


@dataclass(frozen=True)
class Benchmark:
    """What was found. facts: device, threads, precision in words."""

    facts: str
    models: dict[str, tuple[str, Size, Cost]]  # name -> family, size of its input, cost
    rows: list[Row]
    busy: str = ""  # `qskd.detectors.cost.busy_note`, when timing ended


def names_of(models: Sequence[str]) -> dict[str, str]:
    """A short name for each model: as much of the end of its path as tells it from the others."""
    if len(set(models)) < len(models):
        raise QskdError("qskd benchmark", "a model named twice", "different ones")
    parts = {model: Path(model).parts for model in models}
    for length in range(1, max(map(len, parts.values())) + 1):
        names = {"/".join(part[-length:]): model for model, part in parts.items()}
        if len(names) == len(models):
            return names
    return {model: model for model in models}


def input_size(model: str, given: int | None) -> Size:
    return Size(given, given) if given else usual_size(read_preprocessing(model).resize)


def graph_of(model: str, detector: Detector, options: BenchmarkOptions, scratch: Path) -> tuple[Path, Size]:
    """An ONNX file for any batch: the exported folder's own where it is that, else one made for this occasion."""
    size = square(model, options.size).resize.size
    own = Path(model) / "model.onnx"
    if own.is_file() and open_session(own).get_inputs()[0].shape == ["batch", 3, size, size]:
        return own, Size(size, size)
    file = scratch / f"{len(list(scratch.iterdir()))}.onnx"
    export_onnx(detector, file, size, batch=None)
    return file, Size(size, size)


def foresee(models: Sequence[str], options: BenchmarkOptions) -> str:
    """What `--dry-run` prints."""
    runtimes = f"{TORCH} and {ONNX}" if options.onnx else TORCH
    lines = []
    for name, model in names_of(models).items():
        with fetched(model) as folder:
            lines.append(f"{name}: {model}, images of {input_size(folder, options.size)}")
    batches = ", ".join(map(str, options.batches))
    return "\n".join(
        [*lines, f"{runtimes} on {options.torch_device()}, batches of {batches}, {options.threads} thread(s)"]
    )


def benchmark(models: Sequence[str], options: BenchmarkOptions) -> Benchmark:
    """Measure Hub names, folders or URIs. Counts are taken first, then all models take turns, then each has a process to
    itself for its memory."""
    device = options.torch_device()
    torch.set_num_threads(options.threads)
    named = names_of(models)
    runners: dict[tuple[str, str], Runner] = {}
    counted: dict[str, tuple[str, Size, Cost]] = {}
    sources: dict[tuple[str, str], tuple[Any, Size]] = {}
    with ExitStack() as copies:
        scratch = copies.enter_context(scratch_folder("benchmark"))
        for name, uri in named.items():
            model = copies.enter_context(fetched(uri))
            detector, size = load_detector(model), input_size(model, options.size)
            counted[name] = (detector.family, size, cost_of(detector, size))
            if options.onnx:
                file, side = graph_of(model, detector, options, scratch)
                runners[name, ONNX] = onnx_runner(open_session(file, options.threads, device), side)
                sources[name, ONNX] = (file, side)
            runners[name, TORCH] = torch_runner(detector, size, device, options.precision)
            sources[name, TORCH] = (model, size)
        order = sorted(runners, key=lambda key: key[1] != TORCH)  # ratios are to the first model in PyTorch
        labels = {f"{name} {runtime}": (name, runtime) for name, runtime in order}
        timed = compare_speed(
            {label: runners[key] for label, key in labels.items()},
            options.batches,
            options.rounds,
            device,
            options.limit_s,
        )
        busy = busy_note() if device.type == "cpu" else ""
        rows = []
        for label, (name, runtime) in labels.items():
            source, size = sources[name, runtime]
            memory: dict[int, int] = {}
            if options.memory and not (runtime == ONNX and device.type == "cuda"):  # onnxruntime does not tell
                how = (options.threads, str(device), options.precision)
                memory = peak_memory(source, size.height, size.width, options.batches, *how)
            rows.append(Row(name, runtime, timed[label], memory))
    facts = f"{device}, {options.precision}, {options.threads} thread(s)"
    if device.type == "cpu":
        facts += f" of {os.cpu_count()} cores"
    return Benchmark(facts, counted, rows, busy)


def show(found: Benchmark, console: Console | None = None) -> None:
    """Two tables: what does not depend on the machine, and what does."""
    console = console or Console()
    costs = Table(title="parameters, and operations of one image (a multiply-add is two)")
    for column in ("model", "family", "input", "parameters", "GFLOPs"):
        costs.add_column(column, justify="right" if column in ("parameters", "GFLOPs") else "left", overflow="fold")
    for name, (family, size, cost) in found.models.items():
        costs.add_row(Text(one_line(name)), family, str(size), f"{cost.parameters / 1e6:.2f} M", f"{cost.gflops:.3g}")
    console.print(costs)
    first = found.rows[0]
    times = Table(
        title=f"{found.facts}; medians; ratio: of time to {escape(one_line(first.name))}'s in {first.runtime}"
    )
    for column in ("model", "runtime", "batch", "ms/image", "images/s", "ratio", "peak MB"):
        times.add_column(column, justify="left" if column in ("model", "runtime") else "right", overflow="fold")
    for row in found.rows:
        for timing in row.timings:
            memory = row.memory.get(timing.batch)
            cells = [f"{timing.ms_per_image:.2f}", f"{timing.images_per_s:.1f}", f"{timing.ratio:.2f}"]
            peak = "–" if memory is None else f"{memory / 1e6:.0f}"
            head = Text(one_line(row.name)), row.runtime, str(timing.batch)
            times.add_row(*head, *cells, peak, end_section=timing is row.timings[-1])
    console.print(times)
    if not all(row.memory for row in found.rows):
        console.print("–: not measured")
    if found.busy:
        console.print(found.busy)
