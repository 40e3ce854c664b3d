"""`ray start` for a machine that others work on too: with patience, and without what no run here asks for.

python -m benchmarks.chaos.node start --head ...

Ray gives a node 30 s to register, and its raylet 15 s to a dashboard agent that may import for longer when there are more
programs than cores. So the node is waited for, and Ray takes this for an installation without ray[default]: no dashboard,
small agents, no Ray Client (`cluster.Node` tries again where even that was too slow). GCS, raylets, workers and object stores are Ray's as they are.
"""

from __future__ import annotations

import time
from typing import Any

import ray._private.services as services
import ray._private.utils as utils
from ray.scripts.scripts import main

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


def _not_wanted() -> str:
    return "not wanted here"


if __name__ == "__main__":
    services.get_node = _ask_patiently
    utils.get_dashboard_dependency_error = utils.get_ray_client_dependency_error = _not_wanted
    main()
