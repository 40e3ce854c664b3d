"""The verbs of the `qskd` command for finished detectors: `export` and `benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli_options import DryRun, Model, local_path
from pipelines.run.logs import tell
from qskd.errors import QskdError

Size = Annotated[
    int | None, typer.Option("--size", min=1, help="Side of square images, in pixels; otherwise the checkpoint's own.")
]


def _one_of(option: str, value: str, *known: str) -> Any:
    if value not in known:
        raise QskdError(option, value, " or ".join(known))
    return value


def export(
    model: Model,
    out: Annotated[Path, typer.Option(parser=local_path, metavar="PATH", help="Folder to write.")],
    size: Size = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time, of a graph of fixed batch.")] = 1,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="A graph for any number of images.")] = False,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            parser=local_path,
            metavar="PATH",
            help="Image or folder of images to check with, besides noise; may be repeated.",
        ),
    ] = None,
    onnx: Annotated[bool, typer.Option(help="Without: the Hugging Face folder only.")] = True,
    exporter: Annotated[
        str, typer.Option(help="torchscript or dynamo; docs/export.md has what each can do.")
    ] = "torchscript",
    tolerance: Annotated[float, typer.Option(min=0.0, help="Largest difference of probabilities and boxes.")] = 1e-4,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of timing; 0: none.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads to time with.")] = 1,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace qskd's own files in a folder of its that holds others too; those stay."
        ),
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Write a detector as a folder to deploy: plain Hugging Face and ONNX, checked against PyTorch, with a model card."""
    from pipelines.deployment import export as program

    options = program.ExportOptions(
        size=size,
        batch_size=batch_size,
        dynamic_batch=dynamic_batch,
        exporter=_one_of("--exporter", exporter, "torchscript", "dynamo"),
        onnx=onnx,
        images=tuple(images or ()),
        tolerance=tolerance,
        rounds=rounds,
        threads=threads,
        overwrite=overwrite,
    )
    if dry_run:
        tell(program.foresee(model, out, options))
        return
    program.export(model, out, options)


def benchmark(
    models: Annotated[
        list[str],
        typer.Argument(help="Hub names, folders or URIs of detectors; the others are compared with the first."),
    ],
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Images at a time; may be repeated. [default: 1 2 4 8]")
    ] = None,
    size: Size = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16 (autocast).")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also time onnxruntime.")] = False,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, each model in a process of its own.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of timing.")] = 20,
    limit_s: Annotated[
        float, typer.Option("--limit", min=0.0, help="Seconds of timing for each batch size; three rounds at least.")
    ] = 30.0,
    dry_run: DryRun = False,
) -> None:
    """Parameters, FLOPs, milliseconds and memory of detectors, timed in turn so that their ratios hold."""
    from pipelines.deployment import benchmark as program

    options = program.BenchmarkOptions(
        batches=tuple(sorted(set(batch or (1, 2, 4, 8)))),
        size=size,
        device=_one_of("--device", device, "auto", "cpu", "cuda"),
        precision=_one_of("--precision", precision, "float32", "bfloat16"),
        threads=threads,
        onnx=onnx,
        memory=memory,
        rounds=rounds,
        limit_s=limit_s,
    )
    if dry_run:
        tell(program.foresee(models, options))
        return
    program.show(program.benchmark(models, options))
