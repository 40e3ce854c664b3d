"""Whether MLflow's server or database answers at all: asked before its client is, which tries again for minutes."""

from __future__ import annotations

import http.client
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request

from pipelines.health.reachable import answer_within, reachable
from qskd.errors import QskdError

ANSWER_S = 8.0  # a command with a dead store fails within 15 s of its start
_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}
_DATABASE = re.compile(rf"(?P<kind>{'|'.join(_PORTS)})(?:\+\w+)?://(?P<hosts>[^/?]+)", re.IGNORECASE)


def check_answers(uri: str) -> None:
    """QskdError where nothing answers at the address of MLflow's server or database. What an answer says is not looked at: a
    login is the client's business. A sqlite file, and a Databricks profile, has no address."""
    if problem := silence(uri):
        raise QskdError(
            f"MLflow at {uri}",
            problem,
            "a tracking server or database that answers",
            "start it (mlflow server --host 127.0.0.1 --port 5000), or correct tracking.uri / MLFLOW_TRACKING_URI; without either, "
            "runs are kept in mlflow.db in the working folder; `qskd doctor` checks it",
        )


def silence(uri: str) -> str:
    """Why nothing answers there, in words; empty when something does."""
    if uri.lower().startswith(("http://", "https://")):
        return answer_within(ANSWER_S + 0.5, lambda: _server(uri), f"no answer within {ANSWER_S:g} s")
    if match := _DATABASE.match(uri):
        port, problems = _PORTS[match["kind"].lower()], []
        for host in match["hosts"].rpartition("@")[2].split(","):
            parts = urllib.parse.urlsplit(f"//{host}")
            if not parts.hostname:  # a socket of this machine's, named in the query
                return ""
            problems.append(reachable(parts.hostname, parts.port or port, ANSWER_S / 2))
        return "" if "" in problems else "; ".join(problems)
    return ""


def _server(uri: str) -> str:
    # urllib goes through the proxies of the environment, as MLflow's client does.
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_S):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # MLflow may know the certificate
            return ""
        if isinstance(reason, TimeoutError):
            return f"no answer within {ANSWER_S:g} s"
        said = str(getattr(reason, "strerror", None) or reason).lower()
        return f"does not answer as a server of the web does: {type(reason).__name__}: {said}"
