"""Write a detector as a folder to deploy (`qskd export`).

python -m pipelines.export runs/NAME/student --out exported
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.command import DryRun, Model, Size, local_path, one_of, run
from pipelines.run.logs import tell
from qskd.errors import QskdError


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
    int8: Annotated[
        bool, typer.Option("--int8", help="Also INT8: model.int8.onnx, calibrated on --calibration, else on --images.")
    ] = False,
    float16: Annotated[bool, typer.Option("--float16", help="Also float16: model.float16.onnx.")] = False,
    openvino: Annotated[
        bool,
        typer.Option("--openvino", help="Also for OpenVINO: openvino_model.xml, and of INT8 where that is asked for."),
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="Shard folder, or image or folder of images (may be repeated), to calibrate INT8 with."
        ),
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(metavar="SHARDS", help="Labelled shards to measure the AP of every file on.")
    ] = None,
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
    from pipelines.deployment.variants import VariantOptions

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
        variants=VariantOptions(
            int8, float16, openvino, tuple(calibration or [str(image) for image in images or ()]), evaluate
        ),
    )
    if calibration and not int8:
        raise QskdError("--calibration", "has no effect without --int8", "both, or neither", "add --int8")
    if dry_run:
        tell(program.foresee(model, out, options))
        return
    program.export(model, out, options)


if __name__ == "__main__":
    run(command, "export")
