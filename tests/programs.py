"""A program of ours with a Ray of its own, and the addresses that it and its processes listen on."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
from forked import processes_of_ray, server_name

ROOT = Path(__file__).resolve().parents[1]


def listeners(root: psutil.Process) -> set[tuple[str, str]]:
    """(process, address) of all that listens for TCP, or has a UDP port, among a process and those of its Ray."""
    found = set()
    for process in (root, *processes_of_ray(root)):
        try:
            title = " ".join(process.cmdline()[:3])
            for each in process.net_connections("inet"):
                if each.status == psutil.CONN_LISTEN or each.type == socket.SOCK_DGRAM:
                    found.add((title, each.laddr.ip))
        except psutil.Error:
            continue
    return found


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def begin(recipe: Path, home: Path) -> subprocess.Popen[bytes]:
    """`qskd distill` with a Ray of its own, in a fresh home. What it says is in `out` and `err` beside the recipe."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/quick'}", "HOME": str(home)}
    environment["QSKD_FORK_SERVER"] = server_name()
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        environment.pop(name, None)
    with (recipe.parent / "out").open("wb") as out, (recipe.parent / "err").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.distill", str(recipe)], env=environment, stdout=out, stderr=err
        )
