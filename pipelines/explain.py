"""Picture what a distillation does with an image (`qskd explain`).

python -m pipelines.explain runs/NAME photo.jpg
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.command import DryRun, Methods, Set, local_path, run
from pipelines.run.logs import tell


def command(
    recipe_or_run: Annotated[
        str, typer.Argument(help="YAML recipe, or the folder of a run (OUTPUT/NAME); a path or a URI.")
    ],
    images: Annotated[list[str], typer.Argument(help="Image files; or ids or file names of the recipe's data.")],
    annotations: Annotated[
        Path | None, typer.Option(parser=local_path, metavar="PATH", help="COCO JSON that describes the image files.")
    ] = None,
    before: Annotated[
        str,
        typer.Option(
            help="Folder of another student or run to compare with. Otherwise the student before its training."
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            parser=local_path, metavar="PATH", help="Picture to write, for one image. Otherwise IMAGE.explained.png."
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Lowest score that is drawn.")] = 0.3,
    view: Annotated[
        int | None, typer.Option(min=0, help="Show this view (crop, flip) of the recipe's instead of the whole image.")
    ] = None,
    set: Set = None,
    methods: Methods = None,
    dry_run: DryRun = False,
) -> None:
    """Picture what a distillation does with an image: objects, teacher, its selected queries, AGFD's mask, the student.

    An image that no one annotated takes the teacher's own confident detections for its objects, and the picture says so.
    """
    from pipelines.inspection import explain as program
    from qskd.printable import shown_path
    from qskd.teacher.several.members import teachers_named

    source = program.read_source(recipe_or_run, set or ())
    if dry_run:
        tell(f"student: {source.student or 'none yet'}; teacher: {teachers_named(source.config) or 'none'}")
        tell("\n".join(f"{shown_path(image)} → {shown_path(target)}" for image, target in program.targets(images, out)))
        return
    for path, shown in program.write_explanations(source, images, annotations, before, out, threshold, view):
        tell(f"{shown_path(shown.name)}: {program.summary(shown)} → {shown_path(path)}")


if __name__ == "__main__":
    run(command, "explain")
