"""Where MLflow's runs are kept, and how to look at them."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qskd.config import Config
from qskd.errors import QskdError
from qskd.redaction import TRACKING_REMEDY, redacted, secret_in


def _named_uri(config: Config | None) -> str:
    named = config.tracking.uri if config else ""
    return without_secrets(named, "tracking.uri") or environment_uri() or "sqlite:///mlflow.db"


def environment_uri() -> str:
    """MLFLOW_TRACKING_URI; QskdError where it holds a user or password."""
    return without_secrets(os.environ.get("MLFLOW_TRACKING_URI", ""), "MLFLOW_TRACKING_URI")


def without_secrets(uri: str, where: str) -> str:
    """The URI as it is; QskdError where it holds a user or password, which mlflow.json, MLflow's own pages and messages would
    show. where: the field or variable that holds it."""
    if secret := secret_in(uri):
        raise QskdError(where, f"{uri}: {secret}", "a URI without credentials", TRACKING_REMEDY)
    return uri


def relative_store(config: Config | None = None) -> str:
    """The sqlite file that runs are kept in, where it is named from the working folder; empty otherwise."""
    relative = re.match(r"^sqlite:///(?!/)(.+)$", _named_uri(config))
    return relative[1] if relative else ""


def tracking_uri(config: Config | None = None) -> str:
    """The URI of the recipe, else MLFLOW_TRACKING_URI, else sqlite in the working folder."""
    relative = relative_store(config)  # the controller, which writes to it, may work elsewhere
    return f"sqlite:///{Path.cwd() / relative}" if relative else _named_uri(config)


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import mlflow

    for chatty in ("alembic", "mlflow.store.db.utils", "mlflow.utils.environment"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if uri.startswith("file:") or (not re.match(r"^[a-z+]+:", uri)):
        raise QskdError(
            "tracking.uri", f"{uri!r}, a folder", "a database or server", "use sqlite:///FILE or http://HOST"
        )
    with _alone_on(uri):
        client = mlflow.MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)  # makes a new database's tables
    return client


@contextlib.contextmanager
def _alone_on(uri: str) -> Iterator[None]:
    """One process at a time on a sqlite store: two that make its tables at once break each other."""
    match = re.match(r"^sqlite:///([^?]+)", uri)
    if not match:
        yield
        return
    Path(match[1]).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{match[1]}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _create_experiment(client: Any, name: str, uri: str) -> str:
    # MLflow would put a sqlite store's artefacts beside the working folder of whoever asks first; beside the database is
    # where every later reader finds them.
    match = re.match(r"^sqlite:///([^?]+)", uri)
    location = (Path(match[1]).resolve().parent / "mlartifacts" / name).as_uri() if match else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except Exception:  # another process was faster
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def how_to_look(uri: str) -> str:
    """The command, or the address, that shows the runs."""
    uri = redacted(uri)
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
