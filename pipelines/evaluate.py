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
    per_class: Annotated[bool, typer.Option("--per-class", help="Also print each class's AP.")] = False,
    dry_run: DryRun = False,
) -> None:
    """COCO AP of any detector, distilled or not."""
    from pipelines.inspection import evaluate as program
    from qskd.config.recipe import load
    from qskd.printable import one_line

    config = load(recipe, set or ())
    program.check_overrides(set or ())
    asked = (config.teacher.resize, config.teacher.class_map, batch_size, workers, threads)
    if dry_run:
        tell(program.foresee(model, data, *asked, device=config.compute.device))
        return
    result = program.evaluate(model, data, *asked, backend, config.compute.device)  # type: ignore[arg-type]
    tell("  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()))
    if per_class:
        tell("\n".join(f"{value:.4f}  {one_line(name)}" for name, value in result.per_class.items()))


if __name__ == "__main__":
    run(command, "evaluate")
