"""What programs say: sentences for a terminal, or with QSKD_LOG=json one JSON object a line, for whatever collects logs.

Every JSON line carries who speaks: run, MLflow run id, rank, Ray job and node, process. Workers' lines are in Ray's log
files of their node (`ray logs`, the dashboard); the driver's are the job's own (`ray job logs`).
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import sys
from typing import Any

from qskd.printable import escaped, printable
from qskd.redaction import redacted

log = logging.getLogger("qskd")
FORMAT = "QSKD_LOG"  # environment variable: text (the default) or json
_speaker: dict[str, Any] = {}


def as_json() -> bool:
    return os.environ.get(FORMAT, "").lower() == "json"


class TextLines(logging.Formatter):
    """For a terminal: names of others' files in a message can't give it orders."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class ToStandardError(logging.StreamHandler):
    """To what is standard error when a line comes: while a bar is drawn, that is what puts lines above it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


class WithoutSecrets(logging.Filter):
    """Takes users and passwords of URIs out of a record: its message, and its exception's traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if (clean := redacted(message)) != message:
            record.msg, record.args = clean, None
        if record.exc_info and not record.exc_text:
            record.exc_text = redacted(_plain.formatException(record.exc_info))
        return True


_plain = logging.Formatter()


def _hide_secrets() -> None:
    for handler in {*log.handlers, *logging.getLogger().handlers}:
        if not any(isinstance(each, WithoutSecrets) for each in handler.filters):
            handler.addFilter(WithoutSecrets())


class JsonLines(logging.Formatter):
    """time (UTC), level, logger, message, who speaks, what the caller added as `fields`, and an exception's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_speaker,
            "pid": record.process,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = record.exc_text or self.formatException(record.exc_info)
        return json.dumps({name: _written(each) for name, each in line.items()}, default=str)


def _written(value: Any) -> Any:
    """A number that is none (a loss that broke) as text: JSON has no word for it, and who collects logs would drop the line."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return redacted(value) if isinstance(value, str) else value


def start_logs(**speaker: Any) -> None:
    """Set this process's logging up; `speaker` (run, run_id, rank, ...) is added to every JSON line from now on.

    Text goes to standard error from WARNING on, JSON from INFO on: nobody reads it line by line.
    """
    _speaker.update({name: value for name, value in (_ray_ids() | speaker).items() if value not in ("", None)})
    if not as_json():
        handler = ToStandardError()
        handler.setFormatter(TextLines("%(levelname)s %(message)s"))
        logging.basicConfig(handlers=[handler], level=logging.WARNING)
        _hide_secrets()
        return
    if any(isinstance(handler.formatter, JsonLines) for handler in log.handlers):
        return
    handler = ToStandardError()
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # Ray Train has a handler of its own on the root logger: each line would be there twice
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    _hide_secrets()


def _ray_ids() -> dict[str, str]:
    ray = sys.modules.get("ray")  # a program that has not imported Ray is in no cluster
    if ray is None or not ray.is_initialized():
        return {}
    context = ray.get_runtime_context()
    return {"job": context.get_job_id(), "node": context.get_node_id()}


def tell(*texts: str, sep: str = " ") -> None:
    """What a verb has to say at its end, on standard output."""
    print(escaped(redacted(sep.join(texts))), flush=True)


def say(text: str, quiet: bool = False, **fields: Any) -> None:
    """A line of progress: printed as it is (not when `quiet`), or in JSON with its numbers as fields of their own."""
    if as_json():
        log.info(text, extra={"fields": fields})
    elif not quiet:
        print(printable(redacted(text)), flush=True)
