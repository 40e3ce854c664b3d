"""Draw a detector's boxes on images (`qskd predict`).

python -m pipelines.predict runs/NAME/student photo.jpg
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.command import DryRun, Model, local_path, run
from pipelines.run.logs import tell


def command(
    model: Model,
    images: Annotated[list[Path], typer.Argument(parser=local_path, help="Image files.")],
    out: Annotated[
        Path | None,
        typer.Option(
            parser=local_path, metavar="PATH", help="Picture to write, for one image. Otherwise IMAGE.boxes.png."
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Lowest score that is drawn.")] = 0.5,
    dry_run: DryRun = False,
) -> None:
    """Draw a detector's boxes on images."""
    from pipelines.inspection import predict as program
    from qskd.storage.files import check_uri

    if dry_run:
        check_uri(model)
        tell("\n".join(f"{model} on {path} → {target}" for path, target in program.targets(images, out)))
        return
    for path, found in program.predict(model, images, out, threshold):
        tell(f"{path}: {len(found.scores)} object(s)")


if __name__ == "__main__":
    run(command, "predict")
