"""COCO AP of any detector (`qskd evaluate`).

python -m pipelines.evaluate runs/NAME/student shards/val
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.command import DryRun, Methods, Model, Set, local_path, run
from pipelines.run.logs import tell


def command(
    model: Model,
    data: Annotated[str, typer.Argument(help="Shard folder made by `qskd prepare`.")],
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
    backend: Annotated[str, typer.Option(help="auto, hotcoco, faster_coco_eval or pycocotools.")] = "auto",
    max_detections: Annotated[
        int,
        typer.Option(
            min=11, max=100_000, help="Detections of an image that are kept and counted; COCO's AP counts 100."
        ),
    ] = 100,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="All classes in the table; otherwise the worst thirty.")
    ] = False,
    known_by: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="The detector of before: AP of the classes that it knows, of the new ones, and how much was forgotten.",
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(parser=local_path, metavar="FOLDER", help="Keep JSON, CSV and pictures there."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """COCO AP of any detector, distilled or not."""
    from rich.console import Console

    from pipelines.inspection import evaluate as program
    from pipelines.inspection.kept import check_kept, keep
    from pipelines.inspection.known import classes_known_by, forgetting_lines, forgetting_table, with_forgetting
    from pipelines.inspection.tables import class_table, metrics_line, remarks
    from qskd.config.recipe import load
    from qskd.evaluation.average_precision import choose_backend

    config = load(recipe, set or ())
    program.check_overrides(set or ())
    choose_backend(backend)  # type: ignore[arg-type]
    if out is not None:
        check_kept(out)
    if known_by:
        classes_known_by(known_by, data)
    asked = (config.teacher.resize, config.teacher.class_map, batch_size, workers, threads)
    where = config.compute.device, config.compute.evaluation_precision
    if dry_run:
        tell(program.foresee(model, data, *asked, *where))
        return
    result = program.evaluate(model, data, *asked, backend, where[0], max_detections, where[1])  # type: ignore[arg-type]
    if known_by:
        options = {"batch_size": batch_size, "workers": workers, "threads": threads, "backend": backend}
        options |= {"device": where[0], "max_detections": max_detections, "precision": where[1]}
        result = with_forgetting(result, known_by, data, options)
    tell(metrics_line(result))
    console = Console()
    console.print(class_table(result, per_class, console.width))
    tell(*remarks(result), sep="\n")
    if result.forgetting is not None:
        console.print(forgetting_table(result.forgetting))
        tell(*forgetting_lines(result.forgetting), sep="\n")
    if out is not None:
        tell(f"→ {out}: {', '.join(keep(result, out))}")


if __name__ == "__main__":
    run(command, "evaluate")
