"""The verbs of the `qskd` command that look at detectors: `evaluate`, `predict` and `explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli_options import DryRun, Model, Set, local_path
from pipelines.run.logs import tell
from qskd.config.recipe import load
from qskd.printable import one_line


def evaluate(
    model: Model,
    data: Annotated[str, typer.Argument(help="Shard folder made by `qskd prepare`.")],
    recipe: Annotated[
        str | None, typer.Option(help="YAML recipe; its teacher.resize, teacher.class_map and compute.device count.")
    ] = None,
    set: Set = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    workers: Annotated[
        int, typer.Option(min=0, help="Most detector processes, over the cluster; 0: here, no Ray.")
    ] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each.")] = 1,
    backend: Annotated[str, typer.Option(help="auto, hotcoco, faster_coco_eval or pycocotools.")] = "auto",
    per_class: Annotated[bool, typer.Option("--per-class", help="Also print each class's AP.")] = False,
    dry_run: DryRun = False,
) -> None:
    """COCO AP of any detector, distilled or not."""
    from pipelines.inspection import evaluate as program
    from qskd.datasets.manifest import load_manifest
    from qskd.detectors import read_preprocessing
    from qskd.storage.files import fetched

    config = load(recipe, set or ())
    program.check_overrides(set or ())
    if dry_run:
        with fetched(model) as folder:
            manifest, seen_as = load_manifest(data), read_preprocessing(folder, config.teacher.resize).resize
        tell(f"{model} on {manifest.num_images} images of {data}, resized: {seen_as}, {workers} process(es)")
        return
    result = program.evaluate(
        model,
        data,
        config.teacher.resize,
        config.teacher.class_map,
        batch_size,
        workers,
        threads,
        backend,  # type: ignore[arg-type]
        config.compute.device,
    )
    tell("  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()))
    if per_class:
        tell("\n".join(f"{value:.4f}  {one_line(name)}" for name, value in result.per_class.items()))


def predict(
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

    if dry_run:
        pairs = program.targets(images, out)
        tell("\n".join(f"{model} on {path} → {target}" for path, target in pairs))
        return
    for path, found in program.predict(model, images, out, threshold):
        tell(f"{path}: {len(found.scores)} object(s)")


def explain(
    recipe_or_run: Annotated[
        str, typer.Argument(help="YAML recipe, or the folder of a run (OUTPUT/NAME); a path or a URI.")
    ],
    images: Annotated[list[str], typer.Argument(help="Image files; or ids or file names of the recipe's data.")],
    annotations: Annotated[
        Path | None, typer.Option(parser=local_path, metavar="PATH", help="COCO JSON that describes the image files.")
    ] = None,
    before: Annotated[
        str, typer.Option(help="Folder of another student to compare with. Otherwise the student before its training.")
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
    dry_run: DryRun = False,
) -> None:
    """Picture what a distillation does with an image: objects, teacher, its selected queries, AGFD's mask, the student.

    An image that no one annotated takes the teacher's own confident detections for its objects, and the picture says so.
    """
    from pipelines.inspection import explain as program

    source = program.read_source(recipe_or_run, set or ())
    if dry_run:
        tell(f"student: {source.student or 'none yet'}; teacher: {source.config.teacher.path or 'none'}")
        tell("\n".join(f"{image} → {target}" for image, target in program.targets(images, out)))
        return
    for path, shown in program.write_explanations(source, images, annotations, before, out, threshold, view):
        tell(f"{shown.name}: {program.summary(shown)} → {path}")
