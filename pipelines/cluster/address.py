"""Whether what RAY_ADDRESS names is a Ray cluster that answers: asked before Ray is, which waits for minutes and logs in C++."""

from __future__ import annotations

import os

from pipelines.health.reachable import reachable
from qskd.errors import QskdError

# For a name and a connection, then for an answer: a command fails within 15 s of its start.
CONNECT_S, ANSWER_S = 4.0, 5.0
VARIABLE = "RAY_ADDRESS"
REMEDY = (
    f"`unset {VARIABLE}`: Ray then starts on this machine; or start the cluster (`ray start --head`), or correct the address; "
    "`qskd doctor` checks it"
)


def cluster_address() -> str:
    """RAY_ADDRESS; empty where no cluster of others is meant ("local" is Ray's word for that)."""
    named = os.environ.get(VARIABLE, "").strip()
    return "" if named == "local" else named


def check_address() -> None:
    """QskdError where RAY_ADDRESS names no cluster that answers, within seconds. Nothing is asked where it is not set."""
    named = cluster_address()
    if not named:
        return
    if named.startswith("ray://"):
        raise _error(
            named,
            "an address of Ray Client, which qskd does not use",
            f"on a node of the cluster `export {VARIABLE}=HOST:6379`; from elsewhere `ray job submit --address "
            "http://HOST:8265 -- python -m pipelines.distill RECIPE` (docs/cluster.md)",
        )
    if named.startswith(("http://", "https://")):
        raise _error(
            named,
            "the address of Ray's dashboard, where jobs are submitted",
            f"`ray job submit --address {named} -- python -m pipelines.distill RECIPE` (docs/cluster.md), or `unset {VARIABLE}`: "
            "Ray then starts on this machine",
        )
    if "://" in named:
        return  # a provider's own, which Ray's plug-in of that name knows
    address, shown = (_newest_here(), f"{named}, which means ") if named == "auto" else (named, "")
    if not address:
        raise _error(named, "no Ray cluster runs on this machine")
    if problem := head_problem(address):
        raise _error(named, f"{shown}{address}: {problem}" if shown else problem)


def _error(named: str, found: str, remedy: str = REMEDY) -> QskdError:
    return QskdError(f"{VARIABLE}={named}", found, "HOST:PORT of a running cluster's head (its GCS, port 6379)", remedy)


def could_not_join(error: Exception) -> QskdError:
    """What Ray says of a cluster that answers and can't be joined, as by a program on a machine that is none of its nodes."""
    said = " ".join(str(error).split())[:400]
    return _error(cluster_address(), f"the cluster can't be joined from this machine: {type(error).__name__}: {said}")


def _newest_here() -> str:
    """What Ray takes "auto" for; empty where it finds nothing."""
    from ray._private.services import get_ray_address_from_environment

    try:
        return str(get_ray_address_from_environment("auto", None))
    except ConnectionError:
        return ""


def head_problem(address: str) -> str:
    """What is wrong with HOST:PORT as the address of a cluster's head, in words; empty when one answers there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return "no HOST:PORT"
    problem = reachable(host.strip("[]"), int(port), CONNECT_S)
    return problem or _no_head(address)


def _no_head(address: str) -> str:
    """Ask what answers there whether it is a head's GCS. Without grpc (of ray[default]), or over TLS, it is not asked."""
    try:
        import grpc  # type: ignore[import-untyped]
        from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
        from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
    except ImportError:
        return ""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return ""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=ANSWER_S)
        except grpc.RpcError as error:
            # A head that wants a token says so: it is one.
            if error.code().name in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"):
                return f"what listens there does not answer as a Ray cluster's head does ({error.code().name})"
    return ""
