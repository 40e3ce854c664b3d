"""Run the teacher once over the data and keep its outputs (`qskd cache`).

python -m pipelines.cache_teacher student.yaml
"""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.command import Methods, Recipe, Set, run


def command(
    recipe: Recipe = None,
    set: Set = None,
    methods: Methods = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a cache of other teacher outputs.")] = False,
    check: Annotated[
        int, typer.Option("--verify", min=0, help="Compute this many random rows again and compare; caches nothing.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what there is and what the rest will cost.")
    ] = False,
) -> None:
    """Run the teacher once over the data and keep its outputs, for every `qskd distill` of the same recipe."""
    from pipelines.caching import driver, verify
    from pipelines.run.logs import tell
    from qskd.config.recipe import load

    config = load(recipe, set or ())
    if dry_run:
        tell(driver.foresee(config, overwrite))
    elif check:
        errors = verify.verify(config, check)
        print(*(f"{name:<28} {value:.3g}" for name, value in errors.items()), sep="\n")
        verify.complain(config, errors)
    else:
        driver.run(config, overwrite)


if __name__ == "__main__":
    run(command, "cache")
