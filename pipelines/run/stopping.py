"""Ctrl-C and SIGTERM end a program alike: what it began is closed, one line says so, and the exit code names the signal."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_S = 1.0  # `timeout` and `kill` of a group send the same signal twice, to the process and to its group
_received: list[tuple[int, float]] = []  # the first signal, and when
_taken = False
FIRST_S = 2.0  # for what comes first: `ray job stop` kills after 3 s where the head was not told otherwise
_first: list[Callable[[], None]] = []


def _note(number: int) -> None:
    _received.append((number, time.monotonic()))


def _on_signal(number: int, frame: FrameType | None) -> None:
    """A KeyboardInterrupt, wherever the program is. A second signal ends the process at once."""
    if _received:
        if time.monotonic() - _received[0][1] > SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    _note(number)
    for each in _first:
        # In a thread: what it needs may be held by the line that the signal interrupted.
        thread = threading.Thread(target=each, daemon=True)
        thread.start()
        thread.join(FIRST_S)
    if number == signal.SIGTERM and callable(on_ctrl_c) and on_ctrl_c is not _on_signal:
        on_ctrl_c(signal.SIGINT, frame)  # Ray Tune's: it ends the trials, and then its own loop
    else:
        raise KeyboardInterrupt


@contextlib.contextmanager
def first_at_a_signal(act: Callable[[], None]) -> Iterator[None]:
    """Meanwhile, the first signal calls this before the program begins to end."""
    _first.append(act)
    try:
        yield
    finally:
        _first.remove(act)


@contextlib.contextmanager
def sigterm_kept() -> Iterator[None]:
    """Around `ray.init`, which puts handlers of its own there: first one that raises SystemExit, then one in C++ that prints a
    stack dump and dies."""
    try:
        yield
    except SystemExit:
        if not _taken:
            raise
        _note(signal.SIGTERM)
        raise KeyboardInterrupt from None
    finally:
        if _taken:
            signal.signal(signal.SIGTERM, _on_signal)


def was_stopped(error: BaseException) -> bool:
    """Whether a signal, rather than a fault, ended what raised this."""
    return bool(_received) or isinstance(error, KeyboardInterrupt)


BEGIN_ANEW = ("prepare", "evaluate", "predict", "select", "explain", "export", "benchmark", "doctor", "shapes")  # verbs


AFRESH = {
    "--restart": {"distill", "train", "tune", "quickstart"},
    "--overwrite": {"cache", "cache_teacher"},
}  # of which verbs


def this_command(to_go_on: bool = False) -> str:
    """What to type to run this program again; to_go_on: without what would delete what it has made."""
    spec = sys.modules["__main__"].__spec__  # of `python -m`
    program = [sys.executable, *(["-m", spec.name] if spec else sys.argv[:1])]
    left_out = _afresh() if to_go_on else []
    words = [word for word in sys.argv[1:] if word not in left_out]
    return shlex.join([*(["qskd"] if Path(sys.argv[0]).name == "qskd" else program), *words])


def _named() -> set[str]:
    """Words of which one is this program's verb."""
    spec = sys.modules["__main__"].__spec__
    return {*sys.argv[1:2], (spec.name if spec else sys.argv[0]).rpartition(".")[2]}


def _afresh() -> list[str]:
    """The options with which this program, begun again, would delete what it has made."""
    return [option for option, verbs in AFRESH.items() if option in sys.argv[1:] and verbs & _named()]


def _goes_on() -> bool:
    """Whether this program, begun again, goes on where it was, as all do that keep something before their end."""
    return _named().isdisjoint(BEGIN_ANEW)


@contextlib.contextmanager
def ended_by_signals(quiet: bool = False) -> Iterator[None]:
    """For a program's outermost level, in its main thread. Stopped by a signal it says so (unless quiet) and exits with 128 and
    the signal's number, as a shell counts: 130 for Ctrl-C, 143 for SIGTERM."""
    global _taken
    before = {each: signal.signal(each, _on_signal) for each in SIGNALS}
    _taken, done = True, False
    try:
        yield
        done = True
    except BaseException as error:
        ctrl_c = 128 + signal.SIGINT  # Typer's, when it meets a KeyboardInterrupt that came another way
        if not was_stopped(error) and not (isinstance(error, SystemExit) and error.code == ctrl_c):
            done = True
            raise
        number = _received[0][0] if _received else signal.SIGINT
        if not quiet:
            from pipelines.run.logs import say

            without = f" without {' and '.join(_afresh())}" if _afresh() else ""
            goes_on = f"nothing that is finished is lost, and the same command{without} goes on with it"
            told = goes_on if _goes_on() else "the same command begins anew"
            again = this_command(to_go_on=_goes_on())
            say(f"\nstopped by {'SIGTERM' if number == signal.SIGTERM else 'Ctrl-C'}; {told}: {again}")
        raise SystemExit(128 + number) from None
    finally:
        if done:  # else the process ends, and a second signal is still a second one
            _taken = False
            _received.clear()
            for each, handler in before.items():
                signal.signal(each, handler)
