"""Detectors side by side: parameters, FLOPs, milliseconds and memory by batch size, on this device (`qskd benchmark`). No Ray.

python -m pipelines.benchmark TEACHER runs/quickstart/qskd/student --onnx
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from pipelines.deployment.export import square
from pipelines.deployment.found import ONNX, TORCH, Benchmark, Row
from pipelines.deployment.tradeoff import draw, nothing_to_draw, points_of
from pipelines.deployment.variants import evaluate_runs
from pipelines.inspection.predict import write_picture
from qskd.config import ONNX as GRAPH
from qskd.config import TEACHERS_ONLY
from qskd.datasets.manifest import check_labelled, load_manifest
from qskd.deploy.export import export_onnx, open_session
from qskd.deploy.memory import peak_memory
from qskd.deploy.qdq import is_quantised
from qskd.deploy.runtimes import BFLOAT16, Run, as_stored, exported_variants, open_variant, run_of, run_of_torch
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
from qskd.deploy.variants import FLOAT32, Variant
from qskd.detectors import FAMILIES, Detector, load_detector, read_config, read_preprocessing
from qskd.detectors.cost import busy_note
from qskd.errors import QskdError
from qskd.families.table import find_family
from qskd.quantization.model import notice_of
from qskd.storage.ownership import check_picture
from qskd.storage.places import fetched
from qskd.storage.scratch import scratch_folder

FAKE = f"{TORCH} rounds in float there, which takes longer than float alone: what its bits cost and save is its files' to say."


@dataclass(frozen=True)
class BenchmarkOptions:
    """batches: images at a time. size: side of square images; None: each model's own. onnx: onnxruntime beside PyTorch.
    exported: every file that `qskd export` wrote, a graph of a fixed batch at that batch alone. evaluate: labelled shards that
    AP is measured on, or None. out: a picture of AP against time and size, or None. memory: peak memory too, each model in a
    process of its own. limit_s: of timing, for each batch size."""

    batches: tuple[int, ...] = (1, 2, 4, 8)
    size: int | None = None
    device: str = "auto"
    precision: str = "float32"
    threads: int = 1
    onnx: bool = False
    exported: bool = False
    evaluate: str | None = None
    out: Path | None = None
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
class Subject:
    """One model in one runtime, to be measured. source: a folder or a graph's file. batch: the only one that it takes, or None."""

    runner: Runner
    source: str | Path
    size: Size
    batch: int | None = None
    variant: Variant | None = None
    run: Run | None = None


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
            check_timed(folder, model, options)
            if options.exported:
                check_exported(folder)
                exported_variants(Path(folder))
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
    if options.out is not None:
        if not options.exported or options.evaluate is None:
            asked = "a picture of AP against time and size of exported files"
            raise QskdError("--out", f"{asked}, without --exported or without --evaluate", "both")
        if options.out.suffix.lower() != ".png":
            raise QskdError(
                "--out", str(options.out), "a name that ends in .png", f"--out {options.out.with_suffix('.png')}"
            )
        check_picture(options.out, [])
        if not load_manifest(options.evaluate).num_objects:
            raise nothing_to_draw()


def check_timed(folder: str, model: str, options: BenchmarkOptions) -> None:
    """QskdError for what can't be timed as asked, before its weights are read. model: as the user named it."""
    kind = read_config(folder).model_type
    if kind not in TEACHERS_ONLY:
        return
    said = f"a {TEACHERS_ONLY[kind]}"
    if kind == GRAPH or find_family(kind, model).asked_in_words:
        raise QskdError(model, f"{said}, which is not timed", f"a detector of {', '.join(FAMILIES)}")
    if options.onnx:
        raise QskdError("--onnx", f"{model}, {said}, which is not exported", "", "leave --onnx away")


def check_exported(folder: str | Path) -> None:
    """QskdError where it is no exported folder."""
    if not (Path(folder) / FLOAT32.file).is_file():
        raise QskdError(
            str(folder), f"no {FLOAT32.file}", "a folder of `qskd export`", "export it, or leave --exported away"
        )


def exported_subjects(model: str, options: BenchmarkOptions) -> dict[str, Subject]:
    """By runtime, those of an exported folder's files. QskdError where it has none, or they are of another size."""
    folder, found = Path(model), dict[str, Subject]()
    check_exported(folder)
    first, _, _, side = open_session(folder / FLOAT32.file).get_inputs()[0].shape
    if options.size not in (None, side):
        raise QskdError("--size", f"{options.size}", f"{side}, which the graphs of {model} take", "leave --size away")
    for variant in exported_variants(folder):
        run = open_variant(variant, folder, options.threads)
        batch = first if isinstance(first, int) else None
        name = variant.name if variant.name not in found else f"{variant.name}, {variant.file}"
        found[name] = Subject(run_runner(run, side), folder / variant.file, Size(side, side), batch, variant, run)
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
        stored = as_stored(replace(FLOAT32, file=file.name), file.parent)
        name = ONNX if stored.computes == FLOAT32.computes else stored.name
        found[name] = Subject(onnx_runner(session, side), file, side, run=run_of(session))
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
    if subject.variant is not None and subject.variant.computes == BFLOAT16:  # the same file as float32's
        return {}
    how = (options.threads, str(device), options.precision)
    return peak_memory(subject.source, subject.size.height, subject.size.width, batches, *how)


def _accuracy(
    model: str, uri: str, detector: Detector, subjects: Mapping[str, Subject], options: BenchmarkOptions
) -> Mapping[str, Mapping[str, float]]:
    """By runtime; nothing where nobody asked."""
    if options.evaluate is None:
        return {}
    runs = {
        TORCH: run_of_torch(detector, options.precision),
        **{name: one.run for name, one in subjects.items() if one.run is not None},
    }
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
    notes = []
    with ExitStack() as copies:
        scratch = copies.enter_context(scratch_folder("benchmark"))
        for name, uri in named.items():
            model = copies.enter_context(fetched(uri))
            check_timed(model, uri, options)
            detector, size = load_detector(model), input_size(model, options.size)
            if is_quantised(detector.model):
                notes.append(f"{name} is {notice_of(detector.model)}. {FAKE}")
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
            rows.append(Row(*key, timed[label], memory, _bytes(subject), metrics.get(key, {}), subject.variant))
    precision = f"{TORCH} in {options.precision}" if options.exported else options.precision
    facts = f"{device}, {precision}, {options.threads} thread(s)"
    if device.type == "cpu":
        facts += f" of {os.cpu_count()} cores"
    found = Benchmark(facts, counted, rows, busy, tuple(notes))
    if options.out is not None:
        how = f"{options.threads} thread(s){', busy machine' if busy else ''}"
        write_picture(draw(points_of(found), how), options.out, [])
    return found
