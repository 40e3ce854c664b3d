"""Whether the services a run leans on, MLflow tracking and storage, answer: two of the checks of `qskd doctor`."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import sqlite3
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pyarrow import fs

from pipelines.tracking.answers import silence
from pipelines.tracking.store import check_database, deleted, sqlite_file, without_secrets
from qskd.config import Config
from qskd.errors import QskdError
from qskd.redaction import redacted
from qskd.storage.places import open_at_once
from qskd.storage.stores import is_local
from qskd.untrusted import parse_json

_SERVER_TIMEOUT_S = 3.0
_HEALTH, _API = "/health", "/api/2.0/mlflow/experiments/search?max_results=1"
_BY_NAME = "/api/2.0/mlflow/experiments/get-by-name?experiment_name="
_PROBE = ".qskd-doctor-"
_STORAGE_TIMEOUT_S = 30.0  # object stores retry by themselves, some for minutes


@dataclass(frozen=True)
class Check:
    """One line of the table. note: works, but knowing it helps. problem: something will fail until it is remedied."""

    name: str
    status: Literal["ok", "note", "problem"]
    found: str
    remedy: str = ""


def guarded(name: str, step: Callable[[], Check]) -> Check:
    try:
        return step()
    except Exception as error:  # a doctor that falls ill helps nobody: the other checks go on
        return Check(name, "problem", short(error), "read the message; if it makes no sense, report it with this table")


def short(error: BaseException) -> str:
    text = redacted(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}"


def check_tracking(uri: str) -> Check:
    name, shown = "MLflow tracking", redacted(uri)
    try:
        without_secrets(uri, "tracking.uri")
        check_database(uri)
    except QskdError as error:
        return Check(name, "problem", f"{error.found}, which a run refuses", error.remedy)
    if uri.startswith(("http://", "https://")):
        return _tracking_server(uri)
    if (file := sqlite_file(uri)) is not None:
        return _tracking_file(file, uri)
    if problem := silence(uri):
        return Check(name, "problem", f"{shown} does not answer: {problem}", "start it, or correct the address")
    if uri.startswith("file:") or not re.match(r"^[a-z][a-z0-9+-]*:", uri):
        remedy = "use sqlite:///FILE or http://HOST:PORT"
        return Check(name, "problem", f"{shown} is a folder; runs are kept in a database or on a server", remedy)
    return Check(name, "note", f"{shown}: this kind of store is not checked")


def _ask_server(uri: str, path: str, most: int = 64) -> str:
    """The beginning of what an MLflow server answers to a GET of this path, with the login that MLflow's client takes from
    the environment."""
    parts = urllib.parse.urlsplit(uri)
    request = urllib.request.Request(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}{path}")
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    if user and password:
        login = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=_SERVER_TIMEOUT_S) as answer:
        return str(answer.read(most).decode(errors="replace").strip())


def _deleted_on(uri: str) -> str:
    """The id of the default experiment, where a server keeps it as deleted."""
    try:
        answer = parse_json(_ask_server(uri, f"{_BY_NAME}{Config().tracking.experiment}", 2**16), "MLflow")
        found = answer["experiment"]
        return str(found["experiment_id"]) if found["lifecycle_stage"] == "deleted" else ""
    except (QskdError, OSError, KeyError, TypeError):  # there is none of the name
        return ""


def _tracking_server(uri: str) -> Check:
    name, shown, path = "MLflow tracking", redacted(uri), _HEALTH
    try:
        body = _ask_server(uri, path)
        if body != "OK":
            return Check(name, "note", f"{shown}{path} says {body!r}, not OK", "is this an MLflow server?")
        path = _API  # any name reaches /health, but not what runs are written through
        _ask_server(uri, path)
        if gone := _deleted_on(uri):
            return _gone(gone, uri)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            if path == _API and error.code == 403:
                remedy = f"name this host to it (mlflow server --allowed-hosts); or, where it has logins: {remedy}"
                return Check(name, "problem", f"{shown} is healthy and refuses all else (HTTP 403)", remedy)
            return Check(name, "note", f"{shown} answers and lets no one in (HTTP {error.code})", remedy)
        return Check(name, "problem", f"{shown}{path} answers HTTP {error.code}", "is this an MLflow server?")
    except (OSError, ValueError, http.client.HTTPException) as error:
        remedy = "start it (mlflow server --host 127.0.0.1 --port 5000), or correct tracking.uri / MLFLOW_TRACKING_URI"
        return Check(name, "problem", f"{shown} does not answer: {short(error)}", remedy)
    return Check(name, "ok", f"{shown} answers")


def _gone(number: str, uri: str) -> Check:
    """Of the experiment that runs are kept in unless their recipe names another."""
    error = deleted(Config().tracking.experiment, number, uri)
    return Check("MLflow tracking", "problem", f"{error.where}: {error.found}", error.remedy)


def _deleted_in(connection: sqlite3.Connection) -> str:
    """As `_deleted_on`, of a database; one without MLflow's tables has none yet."""
    asked = "select experiment_id from experiments where name = ? and lifecycle_stage = 'deleted'"
    try:
        found = connection.execute(asked, (Config().tracking.experiment,)).fetchone()
    except sqlite3.OperationalError:
        return ""
    return str(found[0]) if found else ""


def _tracking_file(path: Path, uri: str) -> Check:
    name, path = "MLflow tracking", path.absolute()
    remedy = "choose a file in a folder you can write to: tracking.uri=sqlite:///FILE"
    try:
        if not path.exists():
            there = next(folder for folder in path.parents if folder.exists())  # a run makes what is missing below it
            with tempfile.TemporaryFile(dir=there):
                return Check(name, "ok", f"sqlite, will be made at {path}")
        connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=1)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            gone = _deleted_in(connection)
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        return Check(name, "problem", f"{path} can't be written to: {short(error)}", remedy)
    return _gone(gone, uri) if gone else Check(name, "ok", f"sqlite at {path}")


def check_storage(storage: str, token: str = "") -> Check:
    """A small file is written, read back and deleted, with a time limit: a store without network may never answer. token: of
    `token_left`, on another machine, which has to be seen from here."""
    answers: list[Check] = []
    probe = threading.Thread(
        target=lambda: answers.append(guarded("storage", lambda: _probe(storage, token))), daemon=True
    )
    probe.start()
    probe.join(_STORAGE_TIMEOUT_S)
    remedy = "check the network, the bucket's name and the credentials (e.g. AWS_PROFILE)"
    slow = Check("storage", "problem", f"{redacted(storage)} does not answer in {_STORAGE_TIMEOUT_S:.0f} s", remedy)
    return answers[0] if answers else slow


@contextlib.contextmanager
def token_left(storage: str) -> Iterator[str]:
    """A file in the folder until the block ends, for the nodes of a cluster to look for; its path in the file system. Call it
    where `check_storage` has found nothing wrong."""
    filesystem, folder = _place(storage)
    token = f"{folder}/{_PROBE}{uuid.uuid4().hex}"
    with filesystem.open_output_stream(token) as stream:
        stream.write(b"looked for by other nodes")
    try:
        yield token
    finally:
        filesystem.delete_file(token)


def _place(storage: str) -> tuple[fs.FileSystem, str]:
    """The file system, and where in it a file is tried: the folder is not made for that, so of a local one that is not there the
    nearest above that is."""
    filesystem, root = open_at_once(storage)
    if is_local(filesystem):
        root = str(next(place for place in (Path(root), *Path(root).parents) if place.exists()))
    return filesystem, root.rstrip("/")


def _probe(storage: str, token: str = "") -> Check:
    shown, written = redacted(storage), uuid.uuid4().bytes
    remedy = "choose another output (a folder or URI that can be written to), or get the rights to this one"
    try:
        filesystem, folder = _place(storage)
        probe = f"{folder}/{_PROBE}{written.hex()}"
        with filesystem.open_output_stream(probe) as stream:
            stream.write(written)
        try:
            with filesystem.open_input_stream(probe) as stream:
                read = stream.read()
        finally:
            filesystem.delete_file(probe)
        is_shared = not token or filesystem.get_file_info(token).type == fs.FileType.File
    except QskdError as error:
        return Check("storage", "problem", f"{error.where}: {error.found}", error.remedy or remedy)
    except Exception as error:  # each filesystem has its own
        return Check("storage", "problem", f"{shown}: {short(error)}", remedy)
    if read != written:
        return Check("storage", "problem", f"{shown} gave back other bytes than were written", remedy)
    if not is_shared:
        found = f"{shown} is another place here than at the driver: a file that it has just written there is not seen"
        return Check("storage", "problem", found, "a URI (s3://BUCKET/runs), or a path on a disk that all nodes share")
    root = open_at_once(storage)[1]
    made = "" if folder == root.rstrip("/") else f" (will be made in {folder or '/'})"
    return Check("storage", "ok", f"{shown}{made}: written, read back, deleted")
