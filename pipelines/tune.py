"""Search students, GIoU boundaries and loss weights (`qskd tune`).

python -m pipelines.tune student.yaml --set name=sweep --space query_selection
"""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.command import AllFields, Methods, Recipe, Restart, Set, check_all_fields, run


def command(
    recipe: Recipe = None,
    set: Set = None,
    methods: Methods = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="What may vary: student_architecture, query_selection, loss_weights, quantization, or a .py file, whose code is "
            "run; repeatable."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Trainings, the recipe's own included.")] = 20,
    algorithm: Annotated[str, typer.Option(help="tpe, random, or pbt (for loss_weights).")] = "tpe",
    objective: Annotated[
        list[str] | None,
        typer.Option(help="AP; or AP and one of latency_ms, parameters_m, size_mb, by a second --objective."),
    ] = None,
    asha: Annotated[
        bool | None, typer.Option("--asha/--no-asha", help="Stop the hopeless early. Default: where it helps.")
    ] = None,
    grace_epochs: Annotated[int, typer.Option(help="Epochs that every trial gets; 0: a ninth of them.")] = 0,
    trial_epochs: Annotated[int, typer.Option(min=0, help="Epochs of a trial; 0: as many as the recipe has.")] = 0,
    at_most_parameters: Annotated[
        str, typer.Option(metavar="MILLIONS|recipe", help="Larger students are refused before they are trained.")
    ] = "",
    at_once: Annotated[int, typer.Option(min=0, help="Most trials at a time; 0: as many as the cluster holds.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print trials, epochs, hours and bytes, with and without the cache.")
    ] = False,
    all_fields: AllFields = False,
    restart: Restart = False,
) -> None:
    """Search student architectures, GIoU boundaries and loss weights. The same command again goes on where it was stopped."""
    check_all_fields(all_fields=all_fields, dry_run=dry_run)
    from pipelines.run.logs import tell
    from pipelines.tuning import driver
    from pipelines.tuning.search.request import SearchRequest
    from qskd.config.recipe import load, shown_fields

    search = SearchRequest(tuple(space or ()), trials, algorithm, tuple(objective or ("AP",)), asha, grace_epochs)
    request = driver.TuneRequest(search, trial_epochs, at_most_parameters, at_once)
    config = load(recipe, set or ())
    if dry_run:
        tell(shown_fields(config, everything=all_fields), driver.foresee(config, request, restart), sep="\n")
    else:
        driver.run(config, request, restart)


if __name__ == "__main__":
    run(command, "tune")
