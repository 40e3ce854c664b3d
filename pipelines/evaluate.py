"""COCO AP of any detector (`qskd evaluate`).

python -m pipelines.evaluate runs/NAME/student shards/val
"""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.command import DryRun, Methods, Model, Set, run
from pipelines.run.logs import tell


def command(
    model: Model,
    data: Annotated[str, typer.Argument(help="Shard folder made by `qskd prepare`.")],
    recipe: Annotated[
        str | None, typer.Option(help="YAML recipe; its teacher.resize, teacher.class_map and compute.device count.")
    ] = None,
    set: Set = None,
    methods: Methods = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096)] = 16,
    workers: Annotated[
        int, typer.Option(min=0, help="Most detector processes, over the cluster; 0: here, no Ray.")
    ] = 1,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads of each.")] = 1,
    backend: Annotated[str, typer.Option(help="auto, hotcoco, faster_coco_eval or pycocotools.")] = "auto",
    max_detections: Annotated[
        int,
        typer.Option(
            min=11, max=100_000, help="Detections of an image that are kept and counted; COCO's AP counts 100."
        ),
    ] = 100,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also print each class's AP.")] = False,
    dry_run: DryRun = False,
) -> None:
    """COCO AP of any detector, distilled or not."""
    from pipelines.inspection import evaluate as program
    from qskd.config.recipe import load
    from qskd.datasets.manifest import load_manifest
    from qskd.detectors import read_preprocessing
    from qskd.evaluation.shown import score_text, scores_text
    from qskd.printable import one_line
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
        max_detections,
    )
    named = {name.replace("AR100", f"AR{max_detections}"): value for name, value in result.metrics.items()}
    tell(scores_text(named, list(named), 4))
    if per_class:
        tell("\n".join(f"{score_text(value, 4)}  {one_line(name)}" for name, value in result.per_class.items()))


if __name__ == "__main__":
    run(command, "evaluate")
