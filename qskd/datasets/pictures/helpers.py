"""Processes that work beside this one, each on what it is sent, one thing after the other.

They are programs of their own, not forked and not of multiprocessing: that is safe among threads and inside Ray, it does not run
the caller's script again, and a helper imports little. They talk through pipes, in pickles that only the two of them see. A helper
ends when its pipe does: none outlives this process for long, however this one ends. Ctrl-C does not reach them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from qskd.errors import QskdError

T = TypeVar("T")
_BEGIN = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from qskd.datasets.pictures.helpers import serve; serve()"
)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Helpers:
    """`count` processes. shared: what each gets first. Raises OSError where the system starts none.

    with Helpers(4, reader) as helpers:
        answer = helpers.ask(function, argument).result()  # function(reader, argument)
    """

    def __init__(self, count: int, shared: object) -> None:
        self.count, self._own = count, threading.local()
        self._processes: list[_Helper] = []
        self._free: list[_Helper] = []
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="qskd-helper")
        self._begin = pickle.dumps(sys.path) + pickle.dumps(shared)
        try:
            for _ in range(count):
                self._processes.append(_Helper())
        except OSError:
            self._end(kill=True)
            raise
        self._free = list(self._processes)

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._end(kill=kind is not None)

    def ask(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """function(shared, *arguments) in whichever helper is free first; of a module, so that a name says it. What it raises is
        raised again by the future's `result`."""
        return self._threads.submit(self._ask, function, arguments)

    def _ask(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        helper: _Helper | None = getattr(self._own, "helper", None)
        if helper is None:  # each thread has one of its own
            helper = self._own.helper = self._free.pop()
            helper.first = self._begin
        try:
            done, answer = helper.answer(function, arguments)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = helper.process.wait()
            ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise QskdError(
                "a helper process",
                ended,
                "one that works until it is told to end",
                "is there memory for one on each core? On one core no helper is used: `taskset -c 0 qskd ...`",
            ) from None
        if not done:
            raise answer
        return answer

    def _end(self, kill: bool) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for helper in self._processes:
            if kill:
                helper.process.kill()
        self._threads.shutdown()
        for helper in self._processes:
            helper.end()


class _Helper:
    """One process, and the pipes to and from it. first: what it is still to be sent before all else."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BEGIN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | _ONE_THREAD,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._to, self._back, self.first = self.process.stdin, self.process.stdout, b""

    def answer(self, *asked: Any) -> Any:
        self._to.write(self.first + pickle.dumps(asked))
        self._to.flush()
        self.first = b""
        return pickle.load(self._back)

    def end(self) -> None:
        for pipe in (self._to, self._back):
            with contextlib.suppress(OSError):  # something was still to be written to one that is dead
                pipe.close()
        self.process.wait()


def serve() -> None:
    """A helper's life."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints here is no answer
    with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):  # the other side is gone
        shared = pickle.load(source)
        while True:
            function, arguments = pickle.load(source)
            try:
                answer = pickle.dumps((True, function(shared, *arguments)))
            except (QskdError, OSError) as error:
                answer = pickle.dumps((False, error))
            except Exception:
                answer = pickle.dumps((False, RuntimeError(traceback.format_exc())))
            sink.write(answer)
            sink.flush()
    os._exit(0)  # without flushing to who is gone
