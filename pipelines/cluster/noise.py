"""What Ray's C++ side prints on a program's standard error though nothing is wrong: known lines are kept back, others pass.

Those lines go to file descriptor 2 past all of Python's logging; Ray has no setting that spares its real errors. So the
descriptor becomes a pipe to a small process that drops the lines known to be harmless and passes all others on, at once. A
process, not a thread: what a dying program says last still arrives. Python's own messages do not take that way.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

_HEAD = rb"(?:\x1b\[[0-9;]*m)*\[[^\]]* [EW] \d+ \d+\] (?:\(\w+\) )?"  # [2026-11-28 18:54:53,492 E 15719 15719]
# Files, and what a message from there begins with.
HARMLESS = (
    # Of every actor pool of Ray Data, whose arguments this process keeps for as long as it lives.
    (
        rb"core_worker",
        rb"Actor with class name: '.*' and ID: '\w*' has constructor arguments in the object store and max_restarts",
    ),
    # There is no such agent where Ray runs without its dashboard, as `start_ray` starts it.
    (
        rb"core_worker|core_worker_process|main|gcs_server",
        rb"Failed to establish connection to the (?:event\+)?metrics exporter agent",
    ),
    (
        rb"metric_exporter|open_telemetry_metric_recorder",
        rb"(?:Failed to export metrics to the metrics agent|Export metrics to agent failed)",
    ),
)
_KNOWN = re.compile(_HEAD + b"(?:" + b"|".join(rb"(?:%b)\.cc:\d+: %b" % each for each in HARMLESS) + b")")
_own_stderr = False
_filtering: subprocess.Popen[bytes] | None = None


def own_stderr() -> None:
    """For a program, before it says anything: Python's standard error takes a descriptor of its own, so that descriptor 2,
    where C++ writes, can be filtered later. Without effect where it has been replaced, as a test or a notebook does."""
    from pipelines.cluster.environment import VERBOSE  # here: this file is run alone too

    global _own_stderr
    try:
        if VERBOSE or _own_stderr or not isinstance(sys.stderr, io.TextIOWrapper) or sys.stderr.fileno() != 2:
            return
        sys.stderr.flush()
        mine = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    except (OSError, ValueError):  # closed
        return
    sys.stderr = mine
    _own_stderr = True


def keep_back_noise() -> None:
    """Before Ray starts or is joined, in a program that owns its standard error; once."""
    global _filtering
    if _filtering is not None or not _own_stderr:
        return
    # A session of its own: Ctrl-C would end it before the program that it listens to.
    _filtering = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, _KNOWN.pattern.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert _filtering.stdin is not None
    os.dup2(_filtering.stdin.fileno(), 2)
    _filtering.stdin.close()


def _filter(pattern: bytes) -> None:
    known = re.compile(pattern)
    for line in sys.stdin.buffer:
        if known.match(line) is None:
            os.write(2, line)


if __name__ == "__main__":
    _filter(bytes.fromhex(sys.argv[1]))
