"""Run the teacher once over the data and keep its outputs (`qskd cache`).

python -m pipelines.cache_teacher student.yaml
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from pipelines.command import AllFields, Methods, Recipe, Set, check_all_fields, run
from qskd.errors import QskdError


def command(
    recipe: Recipe = None,
    set: Set = None,
    methods: Methods = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a cache of other teacher outputs.")] = False,
    check: Annotated[
        int, typer.Option("--verify", min=0, help="Compute this many random rows again and compare; caches nothing.")
    ] = 0,
    check_derived: Annotated[
        int,
        typer.Option(
            "--verify-derived",
            min=0,
            help="Ask the teacher about this many images, their mirror images and (if the recipe crops) crops; caches nothing.",
        ),
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what there is and what the rest will cost.")
    ] = False,
    all_fields: AllFields = False,
) -> None:
    """Run the teacher once over the data and keep its outputs, for every `qskd distill` of the same recipe."""
    check_all_fields(all_fields=all_fields, dry_run=dry_run)
    _check_alone({"--dry-run": dry_run, "--verify": check, "--verify-derived": check_derived}, overwrite=overwrite)
    from pipelines.caching import derived, driver, verify
    from pipelines.run.logs import tell
    from qskd.config.recipe import load, shown_fields

    config = load(recipe, set or ())
    if dry_run:
        tell(shown_fields(config, everything=all_fields), driver.foresee(config, overwrite), sep="\n")
    elif check:
        errors = verify.verify(config, check)
        print(*(f"{name:<28} {value:.3g}" for name, value in errors.items()), sep="\n")
        verify.complain(config, errors)
    elif check_derived:
        found = derived.verify_derived(config, check_derived)
        print(*(f"{name:<28} {value:.3g}" for name, value in found.items()), derived.allowed(config, found), sep="\n")
    else:
        driver.run(config, overwrite)


def _check_alone(asked: Mapping[str, int], *, overwrite: bool) -> None:
    """QskdError for an option that another one would leave without effect. asked: what a command does in place of the work."""
    given = [option for option, value in asked.items() if value]
    if overwrite and given != ["--dry-run"]:
        given = [*given, "--overwrite"]
    if len(given) > 1:
        raise QskdError(" and ".join(given), "each asks for something else", "one of them", "give one command for each")


if __name__ == "__main__":
    run(command, "cache")
