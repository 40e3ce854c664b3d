"""Label pictures by a detector's detections, as COCO JSON that `qskd prepare` reads (`qskd label`).

python -m pipelines.label teacher photos/ photos.json --like shards/val
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.command import Classes, DryRun, Methods, Model, Set, local_path, names_in, one_of, run
from pipelines.run.logs import tell


def command(
    model: Model,
    images: Annotated[
        Path,
        typer.Argument(parser=local_path, help="Folder of pictures, or a text file that lists some, one a line."),
    ],
    out: Annotated[Path, typer.Argument(parser=local_path, help="COCO JSON to write.")],
    like: Annotated[
        str,
        typer.Option(
            metavar="SHARDS",
            help="Labelled shard folder: its categories (and teacher.class_map) name the labels, and each class's threshold is "
            "that of its best F1 there. Better not the teacher's training images. Otherwise the detector's own classes.",
        ),
    ] = "",
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Lowest score, for every class. Otherwise by --like, or 0.5.", show_default=False
        ),
    ] = None,
    onto: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            metavar="JSON",
            help="COCO JSON of these pictures (IMAGES: their folder): its objects stay, and the detector labels the classes that "
            "it has no object of, where they overlap none (CL-DETR's rule): docs/new_classes.md.",
        ),
    ] = None,
    on_error: Annotated[
        str, typer.Option(help="stop at a broken or repeated picture, or skip: leave it out and say so.")
    ] = "stop",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="YAML recipe; its teacher.resize, teacher.class_map, compute.device and compute.evaluation_precision count."
        ),
    ] = None,
    set: Set = None,
    methods: Methods = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096)] = 16,
    workers: Annotated[
        int, typer.Option(min=0, help="Most detector processes, over the cluster; 0: here, no Ray.")
    ] = 1,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads of each.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file of other labels of `qskd label`.")
    ] = False,
    classes: Classes = None,
    dry_run: DryRun = False,
) -> None:
    """Label pictures by a detector's detections: COCO JSON, with scores. The same command again goes on where it was stopped."""
    from pipelines.inspection.evaluate import check_overrides
    from pipelines.labelling import job
    from qskd.config.recipe import load

    config = load(recipe, set or ())
    check_overrides(set or ())
    asked = job.Request(
        *(model, images, out, like, threshold, one_of("--on-error", on_error, "stop", "skip")),
        **job.as_recipe(config),
        batch_size=batch_size,
        workers=workers,
        threads=threads,
        overwrite=overwrite,
        onto=onto,
        classes=names_in(classes),
    )
    if dry_run:
        plan = job.make_plan(asked)
        tell(plan.describe() + ("\nfinished already" if job.is_finished(plan) else ""))
        return
    tell(*job.run(asked).lines(), sep="\n")


if __name__ == "__main__":
    run(command, "label")
