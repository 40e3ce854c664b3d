"""What this machine, or each node of a cluster, offers (`qskd doctor`).

python -m pipelines.doctor --cluster
"""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.command import run


def command(
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


if __name__ == "__main__":
    run(command, "doctor")
