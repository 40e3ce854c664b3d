"""Starting Ray on this machine, or joining the cluster that this process belongs to."""

from __future__ import annotations

import gc
import logging
import os
import sys

from pipelines.cluster.address import check_address, cluster_address, could_not_join
from pipelines.cluster.environment import VERBOSE, _for_workers, joined
from pipelines.cluster.logins import warn_of_logins_left_behind
from pipelines.cluster.loopback import choose_loopback, make_token
from pipelines.cluster.noise import keep_back_noise
from pipelines.run.stopping import sigterm_kept
from qskd.errors import QskdError
from qskd.printable import one_line

LOGICAL_CPUS_MIN = 8  # loaders, workers and controllers each hold a logical CPU; too few would hang in silence


def give_back_memory() -> None:
    """What this process tried out on a GPU and holds no longer, before other processes take that GPU: torch would keep the memory
    for itself. What remains is CUDA's own, some hundred MB. Networks refer to themselves, so that only the collector frees them."""
    torch = sys.modules.get("torch")
    if torch is not None:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def start_ray(ask_of_logins: bool = True) -> None:
    """Join the cluster this process belongs to (RAY_ADDRESS, or a job of it), else start Ray on this machine alone; and give back
    what GPU memory this process no longer needs. QskdError where RAY_ADDRESS names none that answers.
    ask_of_logins: warn of those that the cluster joined does not have."""
    import ray

    from qskd.datasets.packing import cores

    give_back_memory()
    if ray.is_initialized():
        return
    keep_back_noise()
    quiet = {"log_to_driver": VERBOSE, "logging_level": logging.INFO if VERBOSE else logging.ERROR}
    if joined():
        check_address()
        try:
            with sigterm_kept():
                ray.init(runtime_env={"env_vars": _for_workers()}, **quiet)
        except (ConnectionError, ImportError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            if cluster_address():
                raise could_not_join(error) from error
            raise
        if ask_of_logins:
            warn_of_logins_left_behind()
        return
    choose_loopback()
    make_token()
    # No runtime_env: processes inherit this one's variables, and with one Ray would start none ahead (seconds each).
    # "local": Ray would else look for a cluster on this machine, and take one that was ended badly for it.
    try:
        with sigterm_kept():
            ray.init(address="local", num_cpus=max(cores(), LOGICAL_CPUS_MIN), include_dashboard=VERBOSE, **quiet)
    except Exception as error:  # a plain Exception is among what Ray raises
        raise QskdError(
            "Ray on this machine",
            f"did not start: {one_line(str(error))[:500]}",
            f"a local Ray with room for its processes ({cores()} core(s) here, load {os.getloadavg()[0]:.1f})",
            "try again when the machine is less busy; `qskd doctor` says what is missing; QSKD_VERBOSE=1 shows what Ray says",
        ) from error


def quiet_ray_data() -> None:
    """Keep Ray Data from narrating its executions in this process (unless QSKD_VERBOSE is set)."""
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    if not VERBOSE:
        for handler in logging.getLogger("ray.data").handlers:
            # Its log files keep everything. A handler that someone else put there (pytest does) is theirs to set.
            if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith("ray."):
                handler.setLevel(logging.ERROR)
