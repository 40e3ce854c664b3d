"""What this machine, or each node of a cluster, offers, or what can be done with a checkpoint (`qskd doctor`).

python -m pipelines.doctor --cluster
python -m pipelines.doctor --model ./teacher
"""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.command import run
from qskd.errors import QskdError


def command(
    tracking_uri: Annotated[str, typer.Option(help="MLflow server to ask; otherwise MLFLOW_TRACKING_URI.")] = "",
    storage: Annotated[
        str,
        typer.Option(
            help="Folder or URI to write to, read from and delete from; with --cluster also whether all nodes see the same."
        ),
    ] = "",
    cluster: Annotated[bool, typer.Option("--cluster", help="Look at every node of the Ray cluster instead.")] = False,
    model: Annotated[
        str, typer.Option(help="Hub name or folder: say what can be done with this checkpoint instead.")
    ] = "",
) -> None:
    """What this machine offers: devices, decoders, evaluators, versions; whether tracking and storage answer."""
    given = {"--model": model, "--cluster": cluster, "--tracking-uri": tracking_uri, "--storage": storage}
    for option, beside in (
        ("--model", ("--cluster", "--tracking-uri", "--storage")),
        ("--cluster", ("--tracking-uri",)),
    ):
        if given[option] and (idle := [name for name in beside if given[name]]):
            found = f"with {option}, which looks at other things: it would have no effect"
            raise QskdError(" and ".join(idle), found, "one question at a time", "ask by a command of its own")
    if model:
        from pipelines.health.checkpoint import checkpoint_doctor

        raise typer.Exit(checkpoint_doctor(model))
    if cluster:
        from pipelines.health.nodes import cluster_doctor

        raise typer.Exit(cluster_doctor(storage))
    from pipelines.health.machine import doctor as program

    raise typer.Exit(program(tracking_uri, storage))


if __name__ == "__main__":
    run(command, "doctor")
