"""What processes at work say of themselves about once a second, for whoever shows it: how far they are, what they are doing.

It goes through the key-value store of Ray's head: the last word of each speaker, nothing else. An actor would be a process
more for each run. What is lost here is a bar's movement; reports and checkpoints take other ways.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import Any

log = logging.getLogger("qskd")
NAMESPACE = b"qskd-progress"
EVERY_S, IDLE_S = 1.0, 60.0
SEPARATOR = "#"  # between what is at work (a run's folder) and who speaks


def _store() -> Any:
    """Ray's key-value store; None in a process that has no Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    from ray.experimental import internal_kv

    return internal_kv


class Pulse:
    """One speaker. `tell` costs a process at work nothing: a thread of its own posts what was told last.

    subject: what is at work, a run's folder most often; empty: nothing is posted. speaker: apart from others at the same.
    """

    def __init__(self, subject: str, speaker: str) -> None:
        self.key = f"{subject}{SEPARATOR}{speaker}" if subject else ""
        self.facts: dict[str, Any] = {}
        self.changed, self.lock = threading.Event(), threading.Lock()
        self.thread: threading.Thread | None = None

    def tell(self, **facts: Any) -> None:
        """Replaces what was told before. Numbers may be tensors: they are read when they are posted."""
        self.facts = facts
        if not self.key:
            return
        with self.lock:
            self.changed.set()
            if self.thread is None:
                self.thread = threading.Thread(target=self._post, daemon=True)
                self.thread.start()

    def _post(self) -> None:
        while True:
            while self.changed.wait(IDLE_S):
                self.changed.clear()
                try:
                    store = _store()
                    if store is not None:
                        value = json.dumps(self.facts, default=float).encode()
                        store._internal_kv_put(self.key, value, namespace=NAMESPACE)
                except Exception as error:  # it is only a bar: the work goes on
                    log.debug("progress was not posted: %s", error)
                time.sleep(EVERY_S)
            with self.lock:  # a process that trains one trial after the other keeps no thread of each
                if not self.changed.is_set():
                    self.thread = None
                    return


def heard(subject: str, below: bool = False) -> dict[str, dict[str, Any]]:
    """The last words of all speakers at a subject, by speaker; with `below`, of those at subjects whose path begins with this
    one's, by the rest of the path. Empty where there is no Ray, or where it does not answer."""
    start = subject + ("/" if below else SEPARATOR)
    found: dict[str, dict[str, Any]] = {}
    try:
        store = _store()
        for key in store._internal_kv_list(start, namespace=NAMESPACE) if store else ():
            value = store._internal_kv_get(key, namespace=NAMESPACE)
            if value:
                found[key.decode()[len(start) :]] = json.loads(value)
    except Exception as error:
        log.debug("progress was not heard: %s", error)
    return found


def forget(subject: str, speaker: str = "") -> None:
    """Take away what was said of a subject by a speaker, or by all and below it too: a cluster outlives its runs."""
    try:
        store = _store()
        everything = (subject + SEPARATOR, subject + "/")
        for start in (subject + SEPARATOR + speaker,) if speaker else everything:
            if store:
                store._internal_kv_del(start, del_by_prefix=True, namespace=NAMESPACE)
    except Exception as error:
        log.debug("progress was not forgotten: %s", error)
