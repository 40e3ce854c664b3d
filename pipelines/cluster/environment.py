"""Ray's environment variables, set before Ray is imported: `pipelines/__init__.py` imports this file first."""

from __future__ import annotations

import json
import os
import sys


def _ask_for_a_token() -> None:
    """Ray's processes ask each other for a token, unless RAY_AUTH_MODE says otherwise. A Ray that the user's program imported
    before us has read its mode already: it would send none to the processes that it starts. One that has begun keeps its mode."""
    ray = sys.modules.get("ray")
    if "RAY_AUTH_MODE" in os.environ or (ray is not None and ray.is_initialized()):
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if ray is not None:
        from ray._raylet import Config  # type: ignore[attr-defined]

        Config.initialize("")  # reads the variables again, as Ray does where it sets this one itself


VERBOSE = bool(os.environ.get("QSKD_VERBOSE"))  # everything that Ray and its workers say
# Set before Ray is imported anywhere. Reports are polled for every 2 s by default, which a small detector's epoch feels.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
_ask_for_a_token()
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a trial of a sweep finds relative paths as any worker does
os.environ.setdefault(
    "TUNE_FORCE_TRIAL_CLEANUP_S", "1"
)  # by default a stopped trial's workers train on for ten minutes
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's newer printer ignores that it is to be silent
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # a sweep's records are our own and MLflow's
if not VERBOSE:
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started")
# What workers are to have of this process's environment. A job's own runtime_env says the rest (runtime_env.yaml).
FORWARDED = (
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
    "RAY_CHDIR_TO_TRIAL_DIR",
    "OMP_NUM_THREADS",
    "QSKD_LOG",
    "QSKD_STORE_PATIENCE_S",
    "HF_HUB_OFFLINE",  # that nothing is asked of the Hub is promised of the whole run
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
)


def _for_workers() -> dict[str, str]:
    """Ray refuses a job whose runtime_env and `ray.init` both set a variable, even to the same value."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: os.environ[name] for name in FORWARDED if name in os.environ and name not in given}


def in_a_job() -> bool:
    """Whether `ray job submit` started this program: its working folder is then a copy that every worker has too."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def joined() -> bool:
    """Whether this process belongs to a cluster that others started."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local") or bool(os.environ.get("RAY_JOB_ID"))
