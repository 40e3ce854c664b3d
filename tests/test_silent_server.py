"""An MLflow server that takes connections and does not answer, as one behind a hung proxy, costs a training seconds."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.tracking import pause
from pipelines.tracking.pause import FIRST_S, LONGEST_S, Pause, pause_of
from pipelines.tracking.store import FILES_S, QUICK_S, RETRIES, TIMEOUT, _client, time_for_files
from pipelines.tracking.tracker import Tracker

ROWS = [(1, {"loss/total": 1.0})]


class Silent:
    """Its address, and the connections that it took."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.taken: list[Any] = []
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        try:
            while True:
                self.taken.append(self.listener.accept())
        except OSError:
            return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Silent]:
    monkeypatch.setenv(TIMEOUT, "1")
    monkeypatch.setenv(RETRIES, "0")
    silent = Silent()
    yield silent
    silent.listener.close()
    for connection, _ in silent.taken:
        connection.close()


def asked_again(silent: Silent, tracker: Tracker) -> bool:
    """Whether another report reaches the server; it is not taken either way."""
    before = len(silent.taken)
    assert not tracker.metrics(ROWS)
    return len(silent.taken) > before


def test_a_silent_server_is_waited_for_once_and_then_left_alone_for_a_while(
    server: Silent, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, trial = Tracker(server.uri, "a"), Tracker(server.uri, "b")
    assert asked_again(server, tracker)
    assert "MLflow is not asked for 60 s" in caplog.text
    began = time.monotonic()
    for each in (tracker, trial, tracker):  # a sweep's trials share the server
        assert not asked_again(server, each)
        each.tag("qskd.state", "running")
        assert not each.finish()
    with pytest.raises(Exception, match="is not asked for another"):
        tracker.fill_in([(1, *ROWS[0])], now=False)
    assert time.monotonic() - began < 0.5
    assert tracker.complained
    assert trial.complained
    before = len(server.taken)
    with pytest.raises(Exception, match="timed out"):  # the last word, at a run's end
        tracker.fill_in([(1, *ROWS[0])])
    assert len(server.taken) > before


def test_the_pause_grows_to_ten_minutes_and_ends_with_an_answer(server: Silent) -> None:
    tracker, silence = Tracker(server.uri, "a"), pause_of(server.uri)
    lengths = []
    for _ in range(3):
        assert asked_again(server, tracker)
        lengths.append(silence.length_s)
        silence.since -= silence.length_s  # it is over
    assert lengths == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S]
    silence.length_s, silence.since = LONGEST_S, silence.since - LONGEST_S
    assert asked_again(server, tracker)
    assert silence.length_s == LONGEST_S
    silence.since -= FIRST_S + 1
    before = len(server.taken)
    assert not tracker.finish("KILLED")  # nothing else will say so
    assert len(server.taken) > before
    with silence.asked():
        pass
    assert not silence.left_s()


def test_what_is_refused_at_once_begins_no_pause() -> None:
    silence = Pause()
    with pytest.raises(ValueError, match="refused"), silence.asked():
        raise ValueError("refused")
    assert not silence.left_s()


@pytest.mark.parametrize("said", ["", "33"])
def test_a_server_has_ten_seconds_and_two_minutes_for_a_file_unless_the_user_says_otherwise(
    said: str, server: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (TIMEOUT, RETRIES):
        monkeypatch.setenv(name, said) if said else monkeypatch.delenv(name)
    with pytest.raises(Exception, match="folder"):
        _client("file:/tmp/none")
    assert (os.environ[TIMEOUT], os.environ[RETRIES]) == ((said, said) if said else (QUICK_S, "1"))
    with time_for_files():
        assert os.environ[TIMEOUT] == (said or FILES_S)
    assert os.environ[TIMEOUT] == (said or QUICK_S)


@pytest.fixture(autouse=True)
def no_pauses_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pause, "_pauses", {})
