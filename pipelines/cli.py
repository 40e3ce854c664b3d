"""The `qskd` command: one verb a program. Each but `shapes` is also `python -m pipelines.NAME` (cache: `cache_teacher`)."""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

import pipelines.cluster.start  # noqa: F401  (sets Ray's environment before anything imports Ray)
from pipelines import cli_deploy, cli_look
from pipelines.cli_options import DryRun, Recipe, Restart, Set, local_path
from pipelines.run.logs import start_logs, tell
from pipelines.run.stopping import ended_by_signals
from qskd import __version__
from qskd.config.recipe import load, to_yaml
from qskd.errors import QskdError, told_without_traceback

app = typer.Typer(
    help="Compress DETR object detectors by query-selection knowledge distillation, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SkipBroken = Annotated[
    str, typer.Option(help="stop: name the first broken sample and stop. skip: leave it out, and record it.")
]


def _train(kind: str, recipe: str | None, overrides: list[str] | None, dry_run: bool, restart: bool) -> None:
    from pipelines.tracking.store import how_to_look, tracking_uri
    from pipelines.training import driver as distill

    config = load(recipe, overrides or ())
    if dry_run:
        config = distill.prepare_config(config, kind)
        distill.check_folder(config, restart)
        plan = distill.make_plan(config, kind, dry=True)
        same = [*([recipe] if recipe else []), *(word for field in overrides or () for word in ("--set", field))]
        tell(to_yaml(config), plan.describe(shlex.join(["qskd", "cache", *same])), sep="\n")
        return
    result = distill.run(config, kind, restart)
    tell(f"student: {result.student}")
    print("  ".join(f"{name} {result.metrics[name]:.3f}" for name in ("AP", "AP50", "AP75")))
    tell(f"look at the run: {how_to_look(tracking_uri(config))}")


@app.command()
def distill(recipe: Recipe = None, set: Set = None, dry_run: DryRun = False, restart: Restart = False) -> None:
    """Distil a student from a teacher with QSKD. The same command again goes on where it was stopped."""
    _train("distill", recipe, set, dry_run, restart)


@app.command()
def train(recipe: Recipe = None, set: Set = None, dry_run: DryRun = False, restart: Restart = False) -> None:
    """Train a detector without a teacher: baselines, and teachers. The same command again goes on where it was stopped."""
    _train("train", recipe, set, dry_run, restart)


@app.command()
def cache(
    recipe: Recipe = None,
    set: Set = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a cache of other teacher outputs.")] = False,
    check: Annotated[
        int, typer.Option("--verify", min=0, help="Compute this many random rows again and compare; caches nothing.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what there is and what the rest will cost.")
    ] = False,
) -> None:
    """Run the teacher once over the data and keep its outputs, for every `qskd distill` of the same recipe."""
    from pipelines.caching import driver as program

    config = load(recipe, set or ())
    if dry_run:
        tell(program.foresee(config, overwrite))
    elif check:
        errors = program.verify(config, check)
        print(*(f"{name:<28} {value:.3g}" for name, value in errors.items()), sep="\n")
        program.complain(config, errors)
    else:
        program.run(config, overwrite)


@app.command()
def tune(
    recipe: Recipe = None,
    set: Set = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="What may vary: student_architecture, query_groups, loss_weights, or a .py file, whose code is run; "
            "repeatable."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Trainings, the recipe's own included.")] = 20,
    algorithm: Annotated[str, typer.Option(help="tpe, random, or pbt (for loss_weights).")] = "tpe",
    objective: Annotated[
        list[str] | None, typer.Option(help="AP; or AP and one of latency_ms, parameters_m, by a second --objective.")
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
    restart: Restart = False,
) -> None:
    """Search student architectures, GIoU boundaries and loss weights. The same command again goes on where it was stopped."""
    from pipelines.tuning import driver as program
    from pipelines.tuning.search.request import SearchRequest

    search = SearchRequest(tuple(space or ()), trials, algorithm, tuple(objective or ("AP",)), asha, grace_epochs)
    request = program.TuneRequest(search, trial_epochs, at_most_parameters, at_once)
    config = load(recipe, set or ())
    if dry_run:
        tell(program.foresee(config, request, restart))
    else:
        program.run(config, request, restart)


@app.command()
def prepare(
    annotations: Annotated[Path, typer.Argument(parser=local_path, help="COCO JSON (instances), on a local disk.")],
    images: Annotated[
        Path,
        typer.Argument(parser=local_path, help="Local folder that the JSON's file names are relative to."),
    ],
    destination: Annotated[str, typer.Argument(help="Shard folder to write: a path or a URI.")],
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Images in a shard.")] = 512,
    on_error: SkipBroken = "stop",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards made from another source.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Turn COCO JSON and a folder of images into Parquet shards."""
    from pipelines import prepare as program
    from qskd.datasets.coco import read_coco

    if on_error not in ("stop", "skip"):
        raise QskdError("--on-error", on_error, "stop or skip")
    if dry_run:
        dataset = read_coco(annotations, images, on_error)  # type: ignore[arg-type]
        shards = -(-len(dataset) // rows_per_shard)
        tell(f"{len(dataset)} images, {len(dataset.categories)} categories → {shards} shard(s) in {destination}")
        return
    manifest = program.prepare(annotations, images, destination, rows_per_shard, on_error, overwrite)  # type: ignore[arg-type]
    tell(program.describe(manifest, destination))


app.command()(cli_look.evaluate)
app.command()(cli_look.predict)
app.command()(cli_look.explain)


@app.command()
def doctor(
    tracking_uri: Annotated[str, typer.Option(help="MLflow server to ask; otherwise MLFLOW_TRACKING_URI.")] = "",
    storage: Annotated[str, typer.Option(help="Folder or URI to write to, read from and delete from.")] = "",
    cluster: Annotated[bool, typer.Option("--cluster", help="Look at every node of the Ray cluster instead.")] = False,
) -> None:
    """What this machine offers: devices, decoders, evaluators, versions; whether tracking and storage answer."""
    if cluster:
        from pipelines.health.nodes import cluster_doctor

        raise typer.Exit(cluster_doctor(storage))
    from pipelines.health.machine import doctor as program

    raise typer.Exit(program(tracking_uri, storage))


@app.command()
def shapes(
    folder: Annotated[Path, typer.Argument(help="Where annotations.json and images/ go.")],
    images: Annotated[int, typer.Option(min=1)] = 12_000,
    first_image: Annotated[int, typer.Option(min=0, help="Images are numbered; take other ones for validation.")] = 0,
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="A=B", help="A field of qskd.datasets.shapes.ShapesConfig.")
    ] = None,
) -> None:
    """Make the built-in synthetic dataset: COCO JSON and JPEG files."""
    from qskd.config.recipe import parse_override
    from qskd.datasets.shapes import ShapesConfig, make_shapes

    fields = {path[0]: value for path, value in map(parse_override, set or ())}
    try:
        config = ShapesConfig(images=images, first_image=first_image, **fields)
    except ValueError as error:
        raise QskdError("qskd shapes", str(error), ", ".join(ShapesConfig.model_fields)) from None
    annotations, _ = make_shapes(config, folder)
    tell(f"{annotations}: {images} images")


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option(help="Where data, runs and mlflow.db go.")] = Path("runs/quickstart"),
    dry_run: DryRun = False,
    restart: Restart = False,
) -> None:
    """Distil a small detector on built-in data beside its baseline, and compare: two to four minutes on two cores."""
    from pipelines.demo import quickstart as program

    program.quickstart(folder, dry_run, restart)


app.command()(cli_deploy.export)
app.command()(cli_deploy.benchmark)


@app.callback(invoke_without_command=True)
def _about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run a command line; a QskdError is told without a traceback, with exit code 1."""
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be UTF-8, and printing it must not end the program
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    start_logs()
    with told_without_traceback(), ended_by_signals():
        app(arguments)


def main_of(verb: str) -> None:
    """`python -m pipelines.VERB ...` is `qskd VERB ...`."""
    main([verb, *sys.argv[1:]])


if __name__ == "__main__":
    main()
