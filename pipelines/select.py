"""Choose the images that are worth labelling or training on (`qskd select`).

python -m pipelines.select shards/photos chosen.json --budget 1000 --by uncertainty --recipe student.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.command import DryRun, Methods, Set, local_path, one_of, run
from pipelines.run.logs import tell


def command(
    shards: Annotated[str, typer.Argument(help="Shard folder to choose from, labelled or not; a path or a URI.")],
    out: Annotated[Path, typer.Argument(parser=local_path, help="JSON to write, for data.selection.")],
    budget: Annotated[int, typer.Option(min=1, help="How many images to choose.")],
    by: Annotated[
        str,
        typer.Option(
            help="random; classes: with objects spread over the classes as in all; uncertainty: of which the teacher says much "
            "and is in two minds, balanced over classes; gradients: that together teach what all do, with weights."
        ),
    ] = "random",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="YAML recipe whose cache has the teacher's outputs of these shards; not for random, nor for classes if labelled."
        ),
    ] = None,
    set: Set = None,
    methods: Methods = None,
    seed: Annotated[int, typer.Option(min=0, help="Of chance, in random and gradients.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another selection of `qskd select`.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Choose images of a shard folder: a file that data.selection names, a table and a picture of what is in it."""
    from pipelines.selecting import job
    from qskd.config.recipe import load

    method = one_of("--by", by, "random", "classes", "uncertainty", "gradients")
    job.check_fields(recipe, set)
    config = load(recipe, set or ()) if recipe else None
    asked = job.Request(shards, out, budget, method, seed, config, overwrite)
    if dry_run:
        manifest = job.check(asked)
        if config is not None:
            job.plan_of(config, shards, manifest)
        tell(f"{budget} of {manifest.num_images} images of {shards}, by {by} → {out}, {asked.picture}")
        return
    tell(*job.run(asked), sep="\n")


if __name__ == "__main__":
    run(command, "select")
