"""A Ray of this machine alone listens on loopback, and its token is for the user's eyes alone.

Ray decides by a node's address: the processes of a node at 127.0.0.1 listen there, all others on every interface. It takes
127.0.0.1 only where clusters are switched off, by a variable that works on Linux too. `pipelines.cluster.rendezvous` has the rest.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def choose_loopback() -> None:
    """For the Ray that this process starts next, for its processes, and for programs that this one starts to join it."""
    import ray

    os.environ[SWITCH] = "0"
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # read when Ray was imported, which may be long ago


def on_loopback() -> bool:
    """Whether this process's Ray is one of this machine alone."""
    import ray

    return bool(ray.util.get_node_ip_address().startswith("127."))


def make_token() -> None:
    """A token for Ray where there is none, that nobody else may read: Ray would leave that to the umask."""
    path = Path.home() / ".ray" / "auth_token"
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if given or path.exists() or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    handle = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            os.fchmod(handle, 0o600)  # also where a killed program of the same number left one
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another program was faster: its token counts
            os.link(whole, path)
    finally:
        whole.unlink()
