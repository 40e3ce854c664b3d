"""Starting or joining Ray: the one place that sets its environment."""

from __future__ import annotations

import logging
import os

VERBOSE = bool(os.environ.get("QSKD_VERBOSE"))  # everything that Ray and its workers say

# Set before Ray is imported anywhere. Reports are polled for every 2 s by default, which a small detector's epoch feels.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_AUTH_MODE", "token")
if not VERBOSE:
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started")

LOGICAL_CPUS_MIN = 8  # loaders, workers and controllers each hold a logical CPU; too few would hang in silence


def start_ray() -> None:
    """Join the cluster this process belongs to (RAY_ADDRESS, or a job of it), else start Ray on this machine alone."""
    import ray

    if ray.is_initialized():
        return
    quiet = {"log_to_driver": VERBOSE, "logging_level": logging.INFO if VERBOSE else logging.ERROR}
    forwarded = {
        name: os.environ[name]
        for name in ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "OMP_NUM_THREADS")
        if name in os.environ
    }
    runtime_env = {"env_vars": forwarded}
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"):
        ray.init(runtime_env=runtime_env, **quiet)
        return
    cores = os.cpu_count() or 1
    ray.init(num_cpus=max(cores, LOGICAL_CPUS_MIN), include_dashboard=VERBOSE, runtime_env=runtime_env, **quiet)


def quiet_ray_data() -> None:
    """Keep Ray Data from narrating its executions in this process (unless QSKD_VERBOSE is set)."""
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    if not VERBOSE:
        for handler in logging.getLogger("ray.data").handlers:
            # Its log files keep everything. A handler that someone else put there (pytest does) is theirs to set.
            if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith("ray."):
                handler.setLevel(logging.ERROR)
