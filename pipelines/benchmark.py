"""Parameters, FLOPs, milliseconds and memory of detectors (`qskd benchmark`).

python -m pipelines.benchmark teacher runs/NAME/student
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.command import DryRun, Size, local_path, one_of, run
from pipelines.run.logs import tell


def command(
    models: Annotated[
        list[str],
        typer.Argument(help="Hub names, folders or URIs of detectors or runs; the others are compared with the first."),
    ],
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Images at a time; may be repeated. [default: 1 2 4 8]")
    ] = None,
    size: Size = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16 (autocast).")] = "float32",
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads.")] = 1,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also time onnxruntime.")] = False,
    exported: Annotated[
        bool, typer.Option("--exported", help="Also every file that `qskd export` wrote into the folders.")
    ] = False,
    evaluate: Annotated[
        str | None, typer.Option(metavar="SHARDS", help="Labelled shards to measure AP on, in every runtime.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            metavar="PATH",
            help="Picture to write: AP of every exported file against its time and its size. With --exported and --evaluate.",
        ),
    ] = None,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, each model in a process of its own.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of timing.")] = 20,
    limit_s: Annotated[
        float, typer.Option("--limit", min=0.0, help="Seconds of timing for each batch size; three rounds at least.")
    ] = 30.0,
    dry_run: DryRun = False,
) -> None:
    """Parameters, FLOPs, milliseconds and memory of detectors, timed in turn so that their ratios hold; AP and size of exports."""
    from pipelines.deployment import benchmark as program
    from pipelines.deployment.found import show

    options = program.BenchmarkOptions(
        batches=tuple(sorted(set(batch or (1, 2, 4, 8)))),
        size=size,
        device=one_of("--device", device, "auto", "cpu", "cuda"),
        precision=one_of("--precision", precision, "float32", "bfloat16"),
        threads=threads,
        onnx=onnx,
        exported=exported,
        evaluate=evaluate,
        out=out,
        memory=memory,
        rounds=rounds,
        limit_s=limit_s,
    )
    if dry_run:
        tell(program.foresee(models, options))
        return
    show(program.benchmark(models, options))


if __name__ == "__main__":
    run(command, "benchmark")
