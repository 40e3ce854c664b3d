"""Starting or joining Ray: the one place that sets its environment."""

from __future__ import annotations

import json
import logging
import os

log = logging.getLogger("qskd")
VERBOSE = bool(os.environ.get("QSKD_VERBOSE"))  # everything that Ray and its workers say

# Set before Ray is imported anywhere. Reports are polled for every 2 s by default, which a small detector's epoch feels.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_AUTH_MODE", "token")
if not VERBOSE:
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started")

# What workers are to have of this process's environment. A job's own runtime_env says the rest (runtime_env.yaml).
FORWARDED = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "OMP_NUM_THREADS", "QSKD_LOG", "QSKD_STORE_PATIENCE_S")
LOGICAL_CPUS_MIN = 8  # loaders, workers and controllers each hold a logical CPU; too few would hang in silence


def start_ray() -> None:
    """Join the cluster this process belongs to (RAY_ADDRESS, or a job of it), else start Ray on this machine alone."""
    import ray

    if ray.is_initialized():
        return
    quiet = {"log_to_driver": VERBOSE, "logging_level": logging.INFO if VERBOSE else logging.ERROR}
    runtime_env = {"env_vars": _for_workers()}
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"):
        ray.init(runtime_env=runtime_env, **quiet)
        return
    cores = os.cpu_count() or 1
    ray.init(num_cpus=max(cores, LOGICAL_CPUS_MIN), include_dashboard=VERBOSE, runtime_env=runtime_env, **quiet)


def _for_workers() -> dict[str, str]:
    """Ray refuses a job whose runtime_env and `ray.init` both set a variable, even to the same value."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: os.environ[name] for name in FORWARDED if name in os.environ and name not in given}


def in_a_job() -> bool:
    """Whether `ray job submit` started this program: its working folder is then a copy that every worker has too."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def say_if_on_cpus(device: str) -> None:
    """`auto` takes the GPUs that are there, and a cluster that starts them from zero has none yet."""
    import ray

    if device == "auto" and in_a_job() and not ray.cluster_resources().get("GPU"):
        log.warning(
            "no GPU is in the cluster now: CPUs do the work. compute.device=cuda asks for GPUs, and waits until an "
            "autoscaler has brought them; compute.device=cpu silences this"
        )


def quiet_ray_data() -> None:
    """Keep Ray Data from narrating its executions in this process (unless QSKD_VERBOSE is set)."""
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    if not VERBOSE:
        for handler in logging.getLogger("ray.data").handlers:
            if isinstance(handler, logging.StreamHandler):  # its log files keep everything
                handler.setLevel(logging.ERROR)
