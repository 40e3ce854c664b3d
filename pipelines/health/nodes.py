"""Whether the nodes of a Ray cluster agree: `qskd doctor --cluster`. One process a node looks around, the driver compares.

ray job submit ... -- python -m pipelines.doctor --cluster --storage s3://bucket/runs
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pipelines
from pipelines.cluster.logins import REMEDY as LOGINS_REMEDY
from pipelines.cluster.logins import logins_here
from pipelines.health.services import check_storage, token_left
from qskd.errors import QskdError

PACKAGES = ("torch", "ray", "transformers", "pyarrow", "numpy", "qskd")
CLOCK_LIMIT_S = 2.0  # logs of several nodes can't be laid side by side beyond; object stores refuse some minutes
NODE_TIMEOUT_S = 180.0
GPU_TOOL_S = 30.0
_GIB = 2**30


@dataclass(frozen=True)
class NodeFacts:
    """What one node said of itself. code: start of a checksum of the qskd and pipelines it imports. gpus: as the driver's
    tool lists them. cuda: of torch's build, empty for a CPU build (looked at where there are GPUs only). storage: empty when
    it answered, else what is wrong and what to do. logins: names of variables."""

    name: str
    python: str
    versions: dict[str, str]
    code: str
    gpus: tuple[str, ...] = ()
    cuda: str = ""
    storage: str = ""
    scratch_free_bytes: int = 0
    logins: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeReport:
    """A node as Ray knows it, and what it said; facts: None when it did not answer, `failure` says why. clock_offset_s: how
    much its clock is ahead of the driver's, known to plus or minus clock_error_s."""

    node_id: str
    address: str
    resources: dict[str, float] = field(default_factory=dict)
    head: bool = False
    facts: NodeFacts | None = None
    clock_offset_s: float = 0.0
    clock_error_s: float = 0.0
    failure: str = ""

    @property
    def shown(self) -> str:
        return f"{self.address} {self.node_id[:6]}{' (head)' if self.head else ''}"


def look_around(storage: str, token: str = "") -> NodeFacts:
    """This process's node. storage: a whole path or a URI to try, or empty. token: a file that the driver left there."""
    gpus = _gpus()
    cuda = ""
    if gpus:
        import torch

        cuda = torch.version.cuda or ""
    answer = check_storage(storage, token) if storage else None
    told = "" if answer is None or answer.status != "problem" else f"{answer.found} → {answer.remedy}"
    return NodeFacts(
        name=socket.gethostname(),
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        code=_code_checksum(),
        gpus=gpus,
        cuda=cuda,
        storage=told,
        scratch_free_bytes=shutil.disk_usage(os.environ.get("TMPDIR", "/tmp")).free,
        logins=logins_here(),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _code_checksum() -> str:
    """Of this house's own modules, wherever they are imported from: versions alone do not tell two clones apart."""
    digest, root = hashlib.sha256(), Path(pipelines.__file__).resolve().parents[1]
    for path in sorted(path for folder in ("qskd", "pipelines") for path in (root / folder).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _gpus() -> tuple[str, ...]:
    """Names by NVIDIA's tool. torch can't be asked: Ray hides GPUs from a process that has not been given one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=GPU_TOOL_S, check=False)
    except (OSError, subprocess.TimeoutExpired):  # a GPU that is ill lets it hang; `problems` says that none was listed
        return ()
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip()) if not answer.returncode else ()


def problems(driver: NodeFacts, reports: Sequence[NodeReport]) -> list[str]:
    """Everything in which a node differs from the driver, or will fail; each names the node and what to do."""
    found = [f"the driver: storage: {driver.storage}"] if driver.storage else []
    for report in reports:
        facts, who = report.facts, report.shown
        if facts is None:
            found.append(f"{who}: {report.failure or 'did not answer'} → look at its logs: ray logs, or the dashboard")
            continue
        ours, theirs = {"python": driver.python, **driver.versions}, {"python": facts.python, **facts.versions}
        for name, version in ours.items():
            # CPU and GPU nodes may have different builds (2.13.0+cpu, 2.13.0+cu130) of one version.
            if theirs.get(name, "missing").partition("+")[0] != version.partition("+")[0]:
                remedy = "the same image and constraints.txt on every node"
                found.append(f"{who}: {name} {theirs.get(name, 'missing')}, the driver has {version} → {remedy}")
        if facts.code != driver.code:
            remedy = "install the same qskd on every node, or submit with --working-dir of one clone"
            found.append(f"{who}: other code of qskd ({facts.code}, the driver's is {driver.code}) → {remedy}")
        known = int(report.resources.get("GPU", 0))
        if known != len(facts.gpus):
            remedy = "start it with --num-gpus, or look at its driver and container runtime"
            found.append(f"{who}: Ray counts {known} GPU(s), the driver's tool {len(facts.gpus)} → {remedy}")
        if facts.gpus and not facts.cuda:
            remedy = "install the CUDA build"
            found.append(
                f"{who}: {len(facts.gpus)} GPU(s), but a torch {facts.versions.get('torch')} without CUDA → {remedy}"
            )
        if facts.storage:
            found.append(f"{who}: storage: {facts.storage}")
        if lacking := [name for name in driver.logins if name not in facts.logins]:
            found.append(f"{who}: {', '.join(lacking)} not set, as at the driver → {LOGINS_REMEDY}")
        if abs(report.clock_offset_s) - report.clock_error_s > CLOCK_LIMIT_S:
            found.append(f"{who}: its clock is {report.clock_offset_s:+.1f} s off the driver's → run NTP on every node")
    if not any(report.resources.get("CPU", 0) for report in reports):
        found.append("no node has a CPU for work → add nodes; an autoscaler adds them when a job asks")
    return found


def ask_nodes(storage: str, token: str = "") -> list[NodeReport]:
    """Join the cluster, look at every living node from a process on it. QskdError when there is no cluster to join."""
    import ray

    from pipelines.cluster.start import start_ray

    os.environ.setdefault("RAY_ADDRESS", "auto")  # never start one: it would be this machine alone
    try:
        start_ray(ask_of_logins=False)  # `problems` says it
    except (QskdError, ConnectionError, RuntimeError) as error:
        said = f"{error.where}: {error.found}" if isinstance(error, QskdError) else str(error)
        raise QskdError(
            "qskd doctor --cluster",
            f"no Ray cluster can be joined: {' '.join(said.split())[:300]}",
            "a cluster of which this machine is a node, or RAY_ADDRESS",
            "ray job submit --address http://HEAD:8265 -- python -m pipelines.doctor --cluster; or RAY_ADDRESS=HOST:PORT",
        ) from None
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = [(node, *_watcher(node["NodeID"], storage, token)) for node in nodes]
    return [_report(*entry) for entry in asked]


def _watcher(node_id: str, storage: str, token: str) -> tuple[Any, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Watcher:
        def look(self, storage: str, token: str) -> NodeFacts:
            return look_around(storage, token)

        def clock(self) -> float:
            return time.time()

    # No CPU asked for: the head, which has none to give, is looked at too.
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor = ray.remote(Watcher).options(num_cpus=0, scheduling_strategy=there).remote()
    return actor, actor.look.remote(storage, token)


def _report(node: dict[str, Any], actor: Any, answer: Any) -> NodeReport:
    import ray

    resources = {name: node["Resources"].get(name, 0.0) for name in ("CPU", "GPU", "memory", "object_store_memory")}
    head = "node:__internal_head__" in node["Resources"]
    try:
        facts = ray.get(answer, timeout=NODE_TIMEOUT_S)
        trips = []
        for _ in range(5):  # the quickest trip says most: half of it is what the offset is uncertain by
            sent, started = time.time(), time.perf_counter()
            theirs = ray.get(actor.clock.remote(), timeout=30)
            took = time.perf_counter() - started
            trips.append((took / 2, theirs - sent - took / 2))
        error_s, offset_s = min(trips)
        return NodeReport(node["NodeID"], node["NodeManagerAddress"], resources, head, facts, offset_s, error_s)
    except Exception as error:  # one node's trouble is a line of the table
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return NodeReport(node["NodeID"], node["NodeManagerAddress"], resources, head, failure=text)
    finally:
        ray.kill(actor)


def cluster_doctor(storage: str = "", console: Any = None) -> int:
    """Print a table of the nodes and what does not fit. Returns 1 if something does not, else 0."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(width=None if os.isatty(1) else 160)
    storage = storage if "://" in storage or not storage else os.path.abspath(os.path.expanduser(storage))
    driver = look_around(storage)
    with token_left(storage) if storage and not driver.storage else contextlib.nullcontext("") as token:
        reports = ask_nodes(storage, token)
    columns = [
        "node",
        "python",
        "torch",
        "ray",
        "transformers",
        "qskd",
        "code",
        "CPU",
        "GPU",
        "memory",
        "clock",
        "storage",
    ]
    table = Table(*columns, box=None, padding=(0, 1))
    for report in reports:
        facts, resources = report.facts, report.resources
        if facts is None:
            table.add_row(report.shown, *["?"] * (len(columns) - 1))
            continue
        versions = [facts.versions[name] for name in ("torch", "ray", "transformers", "qskd")]
        gpus = f"{int(resources['GPU'])}{' ' + facts.gpus[0] if facts.gpus else ''}"
        stored = "not asked" if not storage else "problem" if facts.storage else "ok"
        clock = f"{report.clock_offset_s:+.3f} ±{report.clock_error_s:.3f} s"
        memory = f"{resources['memory'] / _GIB:.1f} GiB"
        machine = [f"{resources['CPU']:g}", gpus, memory, clock, stored]
        table.add_row(report.shown, facts.python, *versions, facts.code, *machine)
    console.print(table)
    found = problems(driver, reports)
    for line in found:
        console.print(f"problem: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n{len(reports)} node(s), {len(found) or 'no'} problem{'s' * (len(found) != 1)}")
    return 1 if found else 0
