"""What forks the workers of the tests' Rays (quick/fork_server.py): one for all processes of pytest. And all processes of a test's
Rays."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

SERVER = Path(__file__).parent / "quick" / "fork_server.py"
PLACE = "QSKD_TESTS_FORK_SERVER"  # its name and process id: pytest's workers are told them by their environment


@contextmanager
def fork_server() -> Iterator[None]:
    """Its name is `server_name`'s, here and in each process that begins meanwhile. On Linux; elsewhere there is none."""
    if sys.platform != "linux":
        yield
        return
    name = f"qskd-{secrets.token_hex(16)}"
    ends, held = os.pipe()  # the server ends with this process, however that ends
    begun = subprocess.run(
        [sys.executable, str(SERVER), name], stdin=ends, stdout=subprocess.PIPE, text=True, check=True
    )
    os.close(ends)
    os.environ[PLACE] = f"{name} {int(begun.stdout)}"
    yield
    del os.environ[PLACE]
    os.close(held)


def server_name() -> str:
    """What a Ray has to find in QSKD_FORK_SERVER when it is begun; "", with which workers start as usual, where there is none."""
    return os.environ.get(PLACE, "").partition(" ")[0]


def command_of(process: psutil.Process) -> list[str]:
    """Its words; none of one that has ended since it was listed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def processes_of_ray(root: psutil.Process | None = None) -> list[psutil.Process]:
    """All that this process, or another, has begun, and what was forked for the Rays among them: another test's Ray may run beside
    them, and have its workers forked by the same server."""
    own = (root or psutil.Process()).children(recursive=True)
    _, _, server = os.environ.get(PLACE, "").partition(" ")
    if not server or not psutil.pid_exists(int(server)):
        return own
    titles = {f"rays {process.pid}" for process in own}  # a raylet's, among others
    for process in psutil.Process(int(server)).children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            if Path(f"/proc/{process.pid}/comm").read_text().strip() in titles:
                own += process.children(recursive=True)
    return own
