"""Logins that are set where a program was started and not on the cluster that it joined: they are not taken along."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

log = logging.getLogger("qskd")
# By which stores, the Hub and MLflow know who asks, or where they are.
LOGINS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_CONFIG_FILE"),
    *("AWS_SHARED_CREDENTIALS_FILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_DEFAULT_REGION", "AWS_REGION"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_ACCOUNT"),
    *("AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_TENANT_ID"),
    *("AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET", "HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"),
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
)
REMEDY = (
    "set them where the nodes are started (`ray start`, cluster.yaml, a pod's secret), and not in a runtime_env, which the "
    "dashboard shows"
)
_MOST_ASKED, _ANSWER_S = 8, 10.0  # nodes; a busy one is not waited for


def logins_here() -> tuple[str, ...]:
    """The names of those that this process has, never a value."""
    return tuple(name for name in LOGINS if os.environ.get(name))


def warn_of_logins_left_behind() -> None:
    """For a driver that has joined a cluster: name what is set here and not in the workers of its nodes, which have their nodes'
    variables. Nothing is asked where nothing is set."""
    if here := logins_here():
        warn_of_lacking(here, _ask_nodes(here))


def warn_of_lacking(here: Sequence[str], nodes: Mapping[str, Sequence[str]]) -> None:
    """nodes: address -> those of the names that are set there."""
    lacking = {name: [address for address, there in nodes.items() if name not in there] for name in here}
    if names := [name for name, addresses in lacking.items() if addresses]:
        where = ", ".join(sorted({address for name in names for address in lacking[name]}))
        log.warning(
            "%s: set here, and not for workers on %s, which a store, the Hub or MLflow may refuse or not find; %s",
            ", ".join(names),
            where,
            REMEDY,
        )


def _ask_nodes(names: Sequence[str]) -> dict[str, list[str]]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look(names: Sequence[str]) -> list[str]:  # sent as it is: a node need not have this file
        import os

        return [name for name in names if os.environ.get(name)]

    task: Any = ray.remote(look)
    asked = {}
    for node in [node for node in ray.nodes() if node["Alive"]][:_MOST_ASKED]:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[task.options(num_cpus=0, scheduling_strategy=there).remote(names)] = node["NodeManagerAddress"]
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
    for each in silent:
        ray.cancel(each)
    found: dict[str, list[str]] = {}
    for each in answered:
        try:
            found[asked[each]] = ray.get(each)
        except ray.exceptions.RayError:  # the node went meanwhile
            continue
    return found
