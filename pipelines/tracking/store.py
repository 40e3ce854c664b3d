"""Where MLflow's runs are kept, and how to look at them."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shlex
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from qskd.config import Config
from qskd.errors import QskdError
from qskd.redaction import TRACKING_REMEDY, redacted_uri, secret_in

_HOST = r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\])?(?::\d+)?"
_HARMLESS = r"(?:ssl\w*|charset|driver|\w*timeout|application_name|target_session_attrs|host|port|encrypt|trustservercertificate)"
_ADDRESS = re.compile(
    rf"sqlite(?:\+\w+)?:///[^?#]*|https?://{_HOST}(?:/[\w./~-]*)?|databricks(?:-uc)?(?:://[\w.-]+)?|uc(?::[\w.-]+)?|"
    rf"(?:postgresql|postgres|mysql|mssql)(?:\+\w+)?://{_HOST}(?:,{_HOST})*/[\w.-]*"
    rf"(?:\?{_HARMLESS}=[\w./+ -]*(?:&{_HARMLESS}=[\w./+ -]*)*)?",
    re.IGNORECASE,
)


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
        raise QskdError(where, f"{redacted_uri(uri)}: {secret}", "a URI without credentials", TRACKING_REMEDY)
    if ":" in uri and not uri.startswith("file:") and not _ADDRESS.fullmatch(uri):
        # Not shown: who knows what is in it.
        raise QskdError(
            where,
            f"a URI of {uri.partition(':')[0]}, {len(uri)} characters, of a form that may hide credentials",
            "sqlite:///FILE, http(s)://HOST[:PORT][/PATH], databricks://PROFILE, or DATABASE://HOST[:PORT]/NAME, whose query "
            "has nothing but names of encryption, timeouts and drivers",
            TRACKING_REMEDY,
        )
    return uri


_MUST_BE_QUOTED = {"%": "%25", "?": "%3F", "#": "%23"}
_SQLITE = re.compile(r"^sqlite(?:\+\w+)?:///([^?]+)")


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store, as SQLAlchemy reads its URI: percent-encoded; None for other stores."""
    match = _SQLITE.match(uri)
    return Path(unquote(match[1])) if match else None


def sqlite_uri(file: str | Path) -> str:
    """The URI of a file that is a sqlite store. One with letters that a URI must quote names the driver too: MLflow makes the
    folder that `sqlite:///` is followed by, without decoding it, beside the right one."""
    quoted = "".join(_MUST_BE_QUOTED.get(letter, letter) for letter in str(file))
    return f"sqlite:///{quoted}" if quoted == str(file) else f"sqlite+pysqlite:///{quoted}"


def relative_store(config: Config | None = None) -> str:
    """The sqlite file that runs are kept in, where it is named from the working folder; empty otherwise."""
    file = sqlite_file(_named_uri(config))
    return "" if file is None or file.is_absolute() else str(file)


def tracking_uri(config: Config | None = None) -> str:
    """The URI of the recipe, else MLFLOW_TRACKING_URI, else sqlite in the working folder."""
    relative = relative_store(config)  # the controller, which writes to it, may work elsewhere
    named = _named_uri(config)
    if not relative:
        return named
    whole, driver = sqlite_uri(Path.cwd() / relative), named.partition(":")[0]
    return f"{driver}:{whole.partition(':')[2]}" if "+" in driver else whole


TIMEOUT, RETRIES = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# Seconds for an answer. MLflow would wait 120, and ask seven times again; an artefact's comes once the server has stored it.
QUICK_S, FILES_S = "10", "120"


@contextlib.contextmanager
def time_for_files() -> Iterator[None]:
    """Meanwhile a server may take longer to answer, unless the user says how long."""
    ours = os.environ.get(TIMEOUT) == QUICK_S
    if ours:
        os.environ[TIMEOUT] = FILES_S
    try:
        yield
    finally:
        if ours:
            os.environ[TIMEOUT] = QUICK_S


def _client(uri: str) -> Any:
    os.environ.setdefault(TIMEOUT, QUICK_S)
    os.environ.setdefault(RETRIES, "1")
    import mlflow

    for chatty in ("alembic", "mlflow.store.db.utils", "mlflow.utils.environment"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if uri.startswith("file:") or (not re.match(r"^[a-z+]+:", uri)):
        raise QskdError(
            "tracking.uri", f"{uri!r}, a folder", "a database or server", "use sqlite:///FILE or http://HOST"
        )
    with _alone_on(uri):
        check_database(uri)
        client = mlflow.MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)  # makes a new database's tables
    return client


def check_database(uri: str) -> None:
    """QskdError where a sqlite store's file is there and is not MLflow's, which would add its tables. Read only."""
    path = sqlite_file(uri)
    if path is None or not os.path.lexists(path):
        return
    lock = Path(f"{path}.lock")
    try:
        if not path.is_file():
            found = "no file" if not path.is_symlink() else "a link to nothing"
        elif not path.stat().st_size:  # as sqlite leaves one that was killed; the lock says that it was ours
            found = "" if lock.is_file() else "an empty file that MLflow did not make"
        else:
            tables = _tables(path)
            found = "" if not tables or {"experiments", "runs"} <= tables else "a database that is not MLflow's"
    except (OSError, sqlite3.Error) as error:
        found = f"no database of sqlite ({error})"
    if found:
        raise QskdError("tracking.uri", f"{path}: {found}", "MLflow's own file, or a new one", "name another file")


def _tables(path: Path) -> set[str]:
    """Of a sqlite file, which is not written to. A process that was killed while it wrote leaves a journal, which whoever opens the
    file next takes back; one that may not write can't, and looks at the file as it is."""
    for how in ("mode=ro", "mode=ro&immutable=1"):
        try:
            with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True, timeout=60)) as base:
                return {name for (name,) in base.execute("select name from sqlite_master where type = 'table'")}
        except sqlite3.OperationalError as error:
            if "immutable" in how or not error.sqlite_errorname.startswith("SQLITE_READONLY"):
                raise
    raise AssertionError("one of them returns or raises")


@contextlib.contextmanager
def _alone_on(uri: str) -> Iterator[None]:
    """One process at a time on a sqlite store: two that make its tables at once break each other."""
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    if not os.path.lexists(f"{file}.lock"):  # with one, another process may be about to make the tables
        check_database(uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{file}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def experiment_of(client: Any, name: str, uri: str, tags_of: Callable[[str], Mapping[str, str]]) -> str:
    """The id of the experiment, which is made where there is none, with the tags of its id. QskdError where it was deleted: MLflow
    keeps its name."""
    found = client.get_experiment_by_name(name)
    if found is None:
        # MLflow would put a sqlite store's artefacts beside the working folder of whoever asks first; beside the database is
        # where every later reader finds them.
        file = sqlite_file(uri)
        location = (file.resolve().parent / "mlartifacts" / name).as_uri() if file else None
        try:
            made = str(client.create_experiment(name, artifact_location=location))
            for tag, value in tags_of(made).items():
                client.set_experiment_tag(made, tag, value)
            return made
        except Exception:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise deleted(name, str(found.experiment_id), uri)
    return str(found.experiment_id)


def deleted(experiment: str, number: str, uri: str) -> QskdError:
    """Of an experiment that was deleted in MLflow."""
    return QskdError(
        f"tracking.experiment={experiment}",
        f"this experiment (id {number}) was deleted in MLflow at {uri}, which keeps its name",
        "one that is there, or a name that is new",
        f"restore it: `{shlex.join(['env', f'MLFLOW_TRACKING_URI={uri}', 'mlflow', 'experiments', 'restore', '-x', number])}`; "
        "or keep runs in another: --set tracking.experiment=OTHER",
    )


def how_to_look(uri: str) -> str:
    """The command, to be pasted into a shell, or the address that shows the runs."""
    try:
        without_secrets(uri, "tracking.uri")
    except QskdError:
        uri = f"{uri.partition(':')[0]}://***"
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
