"""A cluster of one machine: a head without CPUs for work, and nodes, each a raylet of its own, on loopback.

Everything that is killed here is a child of a process that was started here, or carries this cluster's mark in its
environment: other clusters of the machine are not touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.chaos.plan import DASHBOARD, ROOT
from pipelines.cluster.loopback import SWITCH

RAY = [sys.executable, "-m", "benchmarks.chaos.node"]
MARK = "QSKD_CHAOS_CLUSTER"  # in the environment of all of a cluster's processes
NODE_CPUS = 4
START_TRIES = 5
STORE_BYTES = 200 * 2**20


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it; nothing when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()  # Ray pads its titles
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return ""


def kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def marked(mark: str) -> list[psutil.Process]:
    """The living processes of a cluster, wherever they hang."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def _is_agent(process: psutil.Process) -> bool:
    return title(process) in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


class Node:
    """`ray start --block` and all it starts."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.command, self.environment, self.log = command, environment, log
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as said:
            return subprocess.Popen(
                self.command, env=self.environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_until_up(self) -> None:
        """Also started again, when it was too slow for Ray."""
        for _ in range(START_TRIES):
            while self.process.poll() is None:
                if "Ray runtime started" in self.log.read_text():
                    return
                time.sleep(0.1)
            if "timed out during startup" not in self.log.read_text():
                break
            self.process = self._start()
        raise RuntimeError(f"a node did not start ({self.process.returncode}): {self.log.read_text()[-2000:]}")

    def family(self) -> list[psutil.Process]:
        return family(self.process.pid)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> int:
        """All at once, as a machine that loses its power; how many processes."""
        struck = self.family()
        kill(struck)
        self.process.wait()
        return len(struck)


class Cluster:
    """`environment` is what a driver on its head needs. dashboard: with Ray's, hence its State API."""

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str],
        nodes: int,
        node_cpus: int = NODE_CPUS,
        dashboard: bool = False,
    ) -> None:
        self.folder, self.wanted, self.node_cpus = folder, nodes, node_cpus
        folder.mkdir(parents=True)
        (self.gcs_port,) = free_ports(1)
        self.environment = environment | {
            MARK: str(folder),
            DASHBOARD: str(int(dashboard)),
            "RAY_TMPDIR": str(folder),
            "PYTHONPATH": str(ROOT),
            "RAY_prestart_worker_first_driver": "0",  # not six idle interpreters for two cores
        }
        self.count = 0
        self.nodes: list[Node] = []
        options = ["--head", f"--port={self.gcs_port}", "--num-cpus=0", "--no-monitor"]
        options += [f"--include-dashboard={str(dashboard).lower()}", f"--dashboard-port={free_ports(1)[0]}"]
        self.head = self._node(options)
        try:
            self.head.wait_until_up()
            for _ in range(nodes):  # one after the other: each is in haste
                self.nodes.append(self._node(self._joining()))
                self.nodes[-1].wait_until_up()
        except BaseException:
            self.end()
            raise
        self.environment["RAY_ADDRESS"] = f"127.0.0.1:{self.gcs_port}"

    def _joining(self) -> list[str]:
        return [f"--address=127.0.0.1:{self.gcs_port}", f"--num-cpus={self.node_cpus}"]

    def _node(self, options: list[str]) -> Node:
        agent, grpc, metrics, runtime = free_ports(4)
        command = [*RAY, "start", "--block", "--disable-usage-stats", f"--metrics-export-port={metrics}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"]
        command += [f"--runtime-env-agent-port={runtime}", f"--object-store-memory={STORE_BYTES}", *options]
        self.count += 1
        return Node(command, self._without_address(), self.folder / f"node{self.count}.log")

    def _without_address(self) -> dict[str, str]:
        return {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}

    @property
    def whole(self) -> bool:
        return self.head.alive and len(self.nodes) == self.wanted and all(node.alive for node in self.nodes)

    def lose_node(self, node: Node) -> int:
        """Kill it, and start a fresh one, as an autoscaler would; how many processes were killed."""
        struck = self.take_away(node)
        self.join()
        return struck

    def take_away(self, node: Node) -> int:
        """Kill it; how many processes were killed."""
        self.nodes.remove(node)
        return node.kill()

    def join(self) -> None:
        """One more node, up in some seconds."""
        fresh = self._node(self._joining())
        self.nodes.append(fresh)
        threading.Thread(target=fresh.wait_until_up, daemon=True).start()

    def lose_head(self) -> int:
        """GCS, the head's raylet and all on it. The nodes are left to find out for themselves."""
        return self.head.kill()

    def workers(self) -> list[psutil.Process]:
        """The processes in which tasks and actors of the nodes and the head run, idle ones included."""
        everyone = [process for node in (self.head, *self.nodes) for process in node.family()]
        return [process for process in everyone if title(process).startswith("ray::") and not _is_agent(process)]

    def end(self) -> None:
        """Stop all that is left, and delete its folder."""
        kill([process for node in (self.head, *self.nodes) for process in node.family()])
        kill(marked(str(self.folder)))
        for node in (self.head, *self.nodes):
            node.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def base_environment(scratch: Path, token: Path, more: dict[str, str]) -> dict[str, str]:
    """Of nodes and drivers. scratch: their TMPDIR, so that what they leave there is seen."""
    environment = os.environ | more | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(scratch), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    # Where Python is told to keep no bytecode, each of Ray's processes would compile all that it imports.
    environment["PYTHONPYCACHEPREFIX"] = str(scratch.with_name("bytecode"))
    for name in ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE", SWITCH):
        environment.pop(name, None)
    return environment
