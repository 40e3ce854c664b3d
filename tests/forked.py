"""What forks the workers of this process's Rays (quick/fork_server.py), and all processes of those Rays."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

SERVER = Path(__file__).parent / "quick" / "fork_server.py"
_servers: list[int] = []


@contextmanager
def fork_server() -> Iterator[str]:
    """Its name, which a Ray has to find in QSKD_FORK_SERVER when it is begun. "", with which workers start as usual, elsewhere
    than on Linux."""
    if sys.platform != "linux":
        yield ""
        return
    name = f"qskd-{secrets.token_hex(16)}"
    ends, held = os.pipe()  # the server ends with this process, however that ends
    begun = subprocess.run(
        [sys.executable, str(SERVER), name], stdin=ends, stdout=subprocess.PIPE, text=True, check=True
    )
    os.close(ends)
    _servers.append(int(begun.stdout))
    yield name
    os.close(held)


def processes_of_ray() -> list[psutil.Process]:
    """This test's own, of programs that it began too; another test's Ray may run beside it."""
    parents = [psutil.Process(), *(psutil.Process(each) for each in _servers if psutil.pid_exists(each))]
    return [child for parent in parents for child in parent.children(recursive=True)]
