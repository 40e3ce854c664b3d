"""Secrets in URIs: found where a URI is given, so that it is refused, and taken out of all that is said.

Recipes, MLflow, logs and messages would all keep them, and messages are pasted into bug reports.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

__all__ = ["STORE_REMEDY", "TRACKING_REMEDY", "redacted", "redacted_uri", "secret_in", "without_home"]
STORE_REMEDY = (
    "take it out of the URI; export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use the machine's own role "
    "(docs/cluster.md, Storage)"
)
TRACKING_REMEDY = (
    "take it out of the URI; export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, PGUSER and "
    "PGPASSWORD for PostgreSQL; in front of another database put a server (mlflow server) that knows its password"
)

# Up to the last @ before the path. The second form is of a password with an unescaped slash; a port is no password.
_USER = re.compile(r"://(?:[^/\s]*@|[^/\s@:]+:(?!\d+(?:[/\s]|$))[^\s@]*@)")
# What libraries read as a URI too: one slash or three, backslashes.
_ODD_USER = re.compile(r":(?:/|///|\\+)[^/\\\s@:]+:[^@\s]*@")
_PASSWORD = re.compile(r"://(?:[^/\s@:]*:[^/\s]*@|[^/\s@:]+:(?!\d+(?:[/\s]|$))[^\s@]*@)")
_WORDS = r"secret|passw|pwd|token|credential|signature|access[_-]?key|account[_-]?key|api[_-]?key|private[_-]?key"
_EXACT = "sig|key|user|username|pass|auth|sas|jwt|bearer|passphrase|code|odbc_connect"
_QUERY = re.compile(rf"([?&;#](?:[\w.%-]*(?:{_WORDS})[\w.%-]*|{_EXACT})=)[^&\s'\"]+", re.IGNORECASE)
# Where a name before the @ is a part of the address: a container, or the account on a machine that a key opens.
_NAME_IS_ADDRESS = re.compile(r"(?:^|::)(?:abfss?|hdfs|sftp|ssh|ftp|smb)://", re.IGNORECASE)


def redacted(text: str) -> str:
    """Without the users, passwords and secret query values of the URIs in it."""
    if ":/" not in text and ":\\" not in text:
        return text
    return _QUERY.sub(r"\1***", _ODD_USER.sub("://***@", _USER.sub("://***@", text)))


def redacted_uri(uri: str) -> str:
    """The same of a text that is one URI; its scheme alone where a secret is left, as one that was percent-encoded."""
    shown = redacted(uri)
    return f"{uri.partition(':')[0]}://***" if secret_in(shown.replace("***@", "").replace("=***", "=")) else shown


def secret_in(uri: str) -> str:
    """In words what of a URI must not be kept, e.g. "a URI with a password in it"; empty when there is nothing.

    A user's name alone counts too, but for schemes that need it as a part of the address.
    """
    if ":/" not in uri and ":\\" not in uri:
        return ""
    decoded = unquote(unquote(uri))
    if _PASSWORD.search(uri) or _ODD_USER.search(uri) or _PASSWORD.search(decoded):
        return "a URI with a password in it"
    if _USER.search(uri) and not _NAME_IS_ADDRESS.search(uri):
        return "a URI with a user in it"
    return "a URI with a secret in its query" if _QUERY.search(uri) or _QUERY.search(decoded) else ""


def without_home(text: str) -> str:
    """Paths as seen from the working folder or the home, which a public card has no business naming. Of other paths nothing is
    taken that reads alike: /mnt/data/x stays where the working folder is /data, and s3://x where it is /."""
    for folder, instead in ((Path.cwd(), ""), (Path.home(), "~/")):
        if folder != folder.parent:
            text = re.sub(rf"(?:(?<=://)|(?<![\w.~/-])){re.escape(str(folder))}/", instead, text)
    return text
