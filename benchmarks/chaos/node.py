"""`ray start` for a machine that others work on too: with patience, and without what no run here asks for.

python -m benchmarks.chaos.node start --head ...

Ray gives a node 30 s to register, and its raylet 15 s to a dashboard agent that may import for longer when there are more
programs than cores. So the node is waited for; the raylet finds the agent's port, which is given, written down already; and
Ray takes this for an installation without ray[default]: no dashboard, small agents, no Ray Client; with QSKD_CHAOS_DASHBOARD=1
it has them. GCS, raylets, workers and object stores are Ray's as they are.
"""

from __future__ import annotations

import inspect
import os
import time
from pathlib import Path
from typing import Any

import ray._private.services as services
import ray._private.utils as utils
import ray.scripts.scripts as scripts

from benchmarks.chaos.plan import DASHBOARD

PATIENCE_S = 60.0
_ask = services.get_node


def _ask_patiently(*arguments: Any, **keywords: Any) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return _ask(*arguments, **keywords)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise


_start_raylet = services.start_raylet


def _start_raylet_in_peace(*arguments: Any, **keywords: Any) -> Any:
    given = inspect.signature(_start_raylet).bind(*arguments, **keywords).arguments
    port = Path(given["session_dir"], f"dashboard_agent_listen_port_{given['node_id']}")
    port.write_text(str(given["dashboard_agent_listen_port"]))
    return _start_raylet(*arguments, **keywords)


def _not_wanted() -> str:
    return "not wanted here"


if __name__ == "__main__":
    services.get_node = _ask_patiently
    services.start_raylet = _start_raylet_in_peace
    if os.environ.get(DASHBOARD) != "1":
        utils.get_dashboard_dependency_error = scripts.get_ray_client_dependency_error = _not_wanted
    scripts.main()
