"""Write a detector as a folder to deploy (`qskd export`).

python -m pipelines.export runs/NAME/student --out exported
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.command import DryRun, Model, Size, local_path, one_of, run
from pipelines.run.logs import tell


def command(
    model: Model,
    out: Annotated[Path, typer.Option(parser=local_path, metavar="PATH", help="Folder to write.")],
    size: Size = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Images at a time, of a graph of fixed batch.")] = 1,
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
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads to time with.")] = 1,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an earlier export, qskd's own files alone; what else is in its folder stays."
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
        exporter=one_of("--exporter", exporter, "torchscript", "dynamo"),
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


if __name__ == "__main__":
    run(command, "export")
