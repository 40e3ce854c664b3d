"""Draw a detector's boxes on images and videos, and keep what was found (`qskd predict`).

python -m pipelines.predict runs/NAME/student photo.jpg
python -m pipelines.predict runs/NAME/student photos/ clip.mp4 --out found
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.command import Classes, DryRun, Model, local_path, names_in, run
from pipelines.run.logs import tell


def command(
    model: Model,
    images: Annotated[
        list[Path],
        typer.Argument(
            parser=local_path, help="Images, videos, folders of them, or patterns in quotes ('photos/**/*.jpg')."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            metavar="PATH",
            help="Folder for pictures, detections.json (COCO's results) and detections.csv; for one image also a file. "
            "Otherwise IMAGE.boxes.png beside each, and no JSON.",
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Lowest score that is kept.")] = 0.5,
    pictures: Annotated[bool, typer.Option(help="Without: JSON and CSV alone.")] = True,
    every: Annotated[int, typer.Option(min=1, metavar="N", help="Of a video, look at every Nth frame.")] = 1,
    annotations: Annotated[
        Path | None,
        typer.Option(
            parser=local_path, metavar="PATH", help="COCO JSON whose image and category ids the results carry."
        ),
    ] = None,
    classes: Classes = None,
    dry_run: DryRun = False,
) -> None:
    """Draw a detector's boxes on images and videos; keep them as COCO's results and a table."""
    from pipelines.inspection import predict as program
    from pipelines.inspection.results import told, told_of_video
    from qskd.printable import shown_path
    from qskd.storage.places import check_uri

    asked = program.request(model, images, out, threshold, pictures, every, annotations, names_in(classes))
    if dry_run:
        check_uri(model)
        tell(
            "\n".join(
                f"{model} on {shown_path(path)} → {shown_path(target if pictures else out)}"
                for path, target in asked.targets()
            )
        )
        return
    for found, labels in program.predict_all(asked):
        say = told_of_video(found, labels) if found[0].frame is not None else told(found[0], labels)
        where = f" → {shown_path(found[0].picture)}" if found[0].picture else ""
        tell(f"{shown_path(found[0].source)}{where}: {say}")


if __name__ == "__main__":
    run(command, "predict")
