"""Detectors side by side: parameters, FLOPs, milliseconds and memory by batch size, on this device (`qskd benchmark`). No Ray.

python -m pipelines.benchmark TEACHER runs/quickstart/qskd/student --onnx
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipelines.deployment.export import square
from pipelines.deployment.variants import evaluate_runs
from qskd.datasets.manifest import check_labelled, load_manifest
from qskd.deploy.export import export_onnx, open_session
from qskd.deploy.memory import peak_memory
from qskd.deploy.runtimes import Run, has_bfloat16, open_variant, run_of, run_of_torch
from qskd.deploy.speed import (
    Cost,
    Runner,
    Size,
    Timing,
    compare_speed,
    cost_of,
    onnx_runner,
    run_runner,
    torch_runner,
    usual_size,
)
from qskd.deploy.variants import FLOAT32, OPENVINO_BFLOAT16, Variant, there
from qskd.detectors import Detector, load_detector, read_preprocessing
from qskd.detectors.cost import busy_note
from qskd.errors import QskdError
from qskd.evaluation.shown import score_text
from qskd.printable import one_line
from qskd.storage.places import fetched
from qskd.storage.scratch import scratch_folder

TORCH, ONNX = "PyTorch", "onnxruntime"


@dataclass(frozen=True)
class BenchmarkOptions:
    """batches: images at a time. size: side of square images; None: each model's own. onnx: onnxruntime beside PyTorch.
    exported: every file that `qskd export` wrote, a graph of a fixed batch at that batch alone. evaluate: labelled shards that
    AP is measured on, or None. memory: peak memory too, each model in a process of its own. limit_s: of timing, for each batch
    size."""

    batches: tuple[int, ...] = (1, 2, 4, 8)
    size: int | None = None
    device: str = "auto"
    precision: str = "float32"
    threads: int = 1
    onnx: bool = False
    exported: bool = False
    evaluate: str | None = None
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
    """One model in one runtime. memory: batch size -> bytes; empty where it was not measured. bytes: on disk, 0 where there is no
    file. metrics: of `qskd.evaluation`, empty where not measured."""

    name: str
    runtime: str
    timings: list[Timing]
    memory: dict[int, int]
    bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """One model in one runtime, to be measured. source: a folder or a graph's file. batch: the only one that it takes, or None."""

    runner: Runner
    source: str | Path
    size: Size
    batch: int | None = None
    variant: Variant | None = None
    run: Run | None = None


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
    runtimes = f"{TORCH} and the files of each export" if options.exported else runtimes
    check(options)
    lines = []
    for name, model in names_of(models).items():
        with fetched(model) as folder:
            if options.exported:
                exported_variants(folder)
            lines.append(f"{name}: {model}, images of {input_size(folder, options.size)}")
    batches = ", ".join(map(str, options.batches))
    said = f"{runtimes} on {options.torch_device()}, batches of {batches}, {options.threads} thread(s)"
    return "\n".join([*lines, said, *([f"AP of each on {options.evaluate}"] if options.evaluate is not None else [])])


def check(options: BenchmarkOptions) -> None:
    """Complain before anything is loaded."""
    if options.exported and options.onnx:
        raise QskdError("--onnx", "given with --exported, which times each file of an export", "one of them")
    if options.evaluate is not None:
        check_labelled(options.evaluate, load_manifest(options.evaluate))


def exported_variants(folder: str | Path) -> list[Variant]:
    """Of an exported folder. QskdError where it is none."""
    found = there(Path(folder))
    if FLOAT32 not in found:
        raise QskdError(
            str(folder), f"no {FLOAT32.file}", "a folder of `qskd export`", "export it, or leave --exported away"
        )
    return [one for one in found if one != OPENVINO_BFLOAT16 or has_bfloat16()]


def exported_subjects(model: str, options: BenchmarkOptions) -> dict[str, Subject]:
    """By runtime, those of an exported folder's files. QskdError where it has none, or they are of another size."""
    folder, found = Path(model), dict[str, Subject]()
    variants = exported_variants(folder)
    first, _, _, side = open_session(folder / FLOAT32.file).get_inputs()[0].shape
    if options.size not in (None, side):
        raise QskdError("--size", f"{options.size}", f"{side}, which the graphs of {model} take", "leave --size away")
    for variant in variants:
        run = open_variant(variant, folder, options.threads)
        batch = first if isinstance(first, int) else None
        found[variant.name] = Subject(
            run_runner(run, side), folder / variant.file, Size(side, side), batch, variant, run
        )
    return found


def _subjects(
    model: str, detector: Detector, options: BenchmarkOptions, scratch: Path, device: torch.device
) -> dict[str, Subject]:
    """By runtime, PyTorch first."""
    size = input_size(model, options.size)
    found = {TORCH: Subject(torch_runner(detector, size, device, options.precision), model, size)}
    if options.exported:
        return found | exported_subjects(model, options)
    if options.onnx:
        file, side = graph_of(model, detector, options, scratch)
        session = open_session(file, options.threads, device)
        found[ONNX] = Subject(onnx_runner(session, side), file, side, run=run_of(session))
    return found


def _timed(subjects: Mapping[str, Subject], options: BenchmarkOptions, device: torch.device) -> dict[str, list[Timing]]:
    """By label, batch size by batch size: those that take it. Ratios are to the first, which takes all."""
    found: dict[str, list[Timing]] = {label: [] for label in subjects}
    for batch in sorted({*options.batches, *(one.batch for one in subjects.values() if one.batch is not None)}):
        able = {label: one.runner for label, one in subjects.items() if one.batch in (None, batch)}
        timed = compare_speed(able, (batch,), options.rounds, device, options.limit_s)
        for label, timings in timed.items():
            found[label] += timings
    return found


def _memory(
    subject: Subject, batches: Sequence[int], options: BenchmarkOptions, device: torch.device
) -> dict[int, int]:
    graph = str(subject.source).endswith((".onnx", ".xml"))
    if not options.memory or (graph and device.type == "cuda"):  # onnxruntime does not tell
        return {}
    if subject.variant == OPENVINO_BFLOAT16:  # the same file as float32's
        return {}
    how = (options.threads, str(device), options.precision)
    return peak_memory(subject.source, subject.size.height, subject.size.width, batches, *how)


def _accuracy(
    model: str, uri: str, detector: Detector, subjects: Mapping[str, Subject], options: BenchmarkOptions
) -> Mapping[str, Mapping[str, float]]:
    """By runtime; nothing where nobody asked."""
    if options.evaluate is None:
        return {}
    runs = {TORCH: run_of_torch(detector), **{name: one.run for name, one in subjects.items() if one.run is not None}}
    batch = next((one.batch for one in subjects.values() if one.batch is not None), None)
    seen_as = square(model, options.size)
    found, _ = evaluate_runs(detector.to("cpu"), runs, options.evaluate, uri, seen_as, batch, Console())
    return {name: one.metrics for name, one in found.items()}


def _bytes(subject: Subject) -> int:
    """Of the model on disk; 0 for a Hub name or a graph that was made for the occasion."""
    if subject.variant is not None:
        return subject.variant.bytes_in(Path(subject.source).parent)
    folder = Path(subject.source)
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors")) if folder.is_dir() else 0


def benchmark(models: Sequence[str], options: BenchmarkOptions) -> Benchmark:
    """Measure Hub names, folders or URIs. Counts are taken first, then all models take turns, then each has a process to
    itself for its memory."""
    check(options)
    device = options.torch_device()
    torch.set_num_threads(options.threads)
    named = names_of(models)
    counted: dict[str, tuple[str, Size, Cost]] = {}
    subjects: dict[tuple[str, str], Subject] = {}
    metrics: dict[tuple[str, str], Mapping[str, float]] = {}
    with ExitStack() as copies:
        scratch = copies.enter_context(scratch_folder("benchmark"))
        for name, uri in named.items():
            model = copies.enter_context(fetched(uri))
            detector, size = load_detector(model), input_size(model, options.size)
            counted[name] = (detector.family, size, cost_of(detector, size))
            own = _subjects(model, detector, options, scratch, device)
            subjects |= {(name, runtime): one for runtime, one in own.items()}
            measured = _accuracy(model, uri, detector, own, options)
            metrics |= {(name, runtime): one for runtime, one in measured.items()}
            detector.to(device)
        order = sorted(subjects, key=lambda key: key[1] != TORCH)  # ratios are to the first model in PyTorch
        labels = {f"{name} {runtime}": (name, runtime) for name, runtime in order}
        timed = _timed({label: subjects[key] for label, key in labels.items()}, options, device)
        busy = busy_note() if device.type == "cpu" else ""
        rows = []
        for label, key in labels.items():
            subject, batches = subjects[key], [timing.batch for timing in timed[label]]
            memory = _memory(subject, batches, options, device)
            rows.append(Row(*key, timed[label], memory, _bytes(subject), metrics.get(key, {})))
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
    if any(row.metrics for row in found.rows) or len({row.runtime for row in found.rows} - {TORCH, ONNX}):
        files = Table(title="size on disk, and COCO AP where it was measured")
        for column in ("model", "runtime", "MB", "AP", "AP50", "AP75"):
            files.add_column(column, justify="left" if column in ("model", "runtime") else "right", overflow="fold")
        for row in found.rows:
            scores = [score_text(row.metrics.get(name)) if row.metrics else "–" for name in ("AP", "AP50", "AP75")]
            megabytes = f"{row.bytes / 1e6:.2f}" if row.bytes else "–"
            files.add_row(Text(one_line(row.name)), row.runtime, megabytes, *scores)
        console.print(files)
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
