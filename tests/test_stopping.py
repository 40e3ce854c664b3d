"""Signals end a program in order. What a program with a Ray of its own leaves behind: tests/test_two_workers.py."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.cli import DOORS
from pipelines.cluster import start
from pipelines.cluster.loopback import make_token
from pipelines.run.folder import Folder
from pipelines.run.history import add_report
from pipelines.run.stopping import BEGIN_ANEW, SAME_S, ended_by_signals
from pipelines.training.at_stop import say_where_it_stopped
from pipelines.training.checkpoint_list import LIST
from qskd.config.recipe import load
from qskd.errors import QskdError

ROOT = Path(__file__).resolve().parents[1]
# Says that it is ready, and takes its time to close what it began.
PROGRAM = """
import sys, time
from pipelines.run.stopping import ended_by_signals
with ended_by_signals():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("closing", flush=True)
        time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["qskd", "distill", "a.yaml"], "command goes on with it: qskd distill a.yaml\n"),
        (["qskd", "predict", "m", "a.jpg"], "command begins anew: qskd predict m a.jpg\n"),
        # Typed again as they were, these would delete what they have made.
        (
            ["qskd", "distill", "--restart", "a.yaml"],
            "command without --restart goes on with it: qskd distill a.yaml\n",
        ),
        (["qskd", "tune", "a.yaml", "--restart"], "command without --restart goes on with it: qskd tune a.yaml\n"),
        (
            ["qskd", "cache", "a.yaml", "--overwrite"],
            "command without --overwrite goes on with it: qskd cache a.yaml\n",
        ),
        (["qskd", "label", "m", "a", "b.json", "--overwrite"], "goes on with it: qskd label m a b.json --overwrite\n"),
        (["qskd", "export", "m", "--overwrite"], "command begins anew: qskd export m --overwrite\n"),
    ],
)
def test_a_stopped_program_says_whether_the_same_command_goes_on(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended, ended_by_signals():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert told in capsys.readouterr().out


def test_every_verb_that_keeps_nothing_before_its_end_is_said_to_begin_anew() -> None:
    keeps = {"distill", "train", "cache", "tune", "label", "quickstart"}
    assert set(DOORS) - keeps == set(BEGIN_ANEW)


def test_a_ray_that_does_not_start_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def no(**_: object) -> None:
        raise Exception("The current node timed out during startup")

    monkeypatch.setattr(ray, "init", no)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(start, "joined", lambda: False)
    for name in ("choose_loopback", "make_token", "keep_back_noise"):
        monkeypatch.setattr(start, name, lambda: None)
    with pytest.raises(QskdError, match=r"did not start: The current node timed out[\s\S]*less busy"):
        start.start_ray()


def program(closing_s: float) -> subprocess.Popen[str]:
    """PROGRAM, from when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(closing_s)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_lets_a_program_close_says_one_line_and_is_the_exit_code(number: signal.Signals, name: str) -> None:
    process = program(closing_s=0)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert out.startswith("closing\n")
    (line,) = out.removeprefix("closing\n").split("\n", 2)[1:2]
    assert line.startswith(f"stopped by {name};")
    assert "the same command goes on with it" in line
    assert not err


def test_a_second_sigterm_ends_at_once() -> None:
    process = program(closing_s=60)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "closing\n"
    time.sleep(SAME_S + 0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    process = program(closing_s=SAME_S / 2)  # `timeout` sends it to the process, and then to its group
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "closing\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in out


def test_the_token_that_is_made_is_for_its_user_alone_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    make_token()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    before = os.umask(0o022)
    try:
        make_token()
    finally:
        os.umask(before)
    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert len(token.read_text()) == 64
    said = token.read_text()
    make_token()
    assert token.read_text() == said
    assert list(token.parent.iterdir()) == [token]


@pytest.mark.parametrize(
    ("reported", "listed", "said"),
    [
        ([], 0, "stopped before its first checkpoint: it will begin at step 0 of 90 again"),
        ([6, 12], 12, "stopped at step 12 of 90, its last checkpoint; it will go on there or a little later"),
        ([6], 12, "stopped at step 12 of 90, its last"),  # between Ray's list and the run's own record
        ([6], None, "stopped at step 6 of 90, its last"),  # while Ray writes its list
        ([90], 90, "stopped after its last step, 90 of 90: what is left is to write the student down"),
    ],
)
def test_a_training_that_is_stopped_says_from_which_step_it_will_go_on(
    reported: list[int], listed: int | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(load(None, [f"output={tmp_path}", "name=it"]))
    for step in reported:
        add_report(folder, step, 0, {}, [])
    if listed != 0:
        latest = {"checkpoint_dir_name": "checkpoint_1", "metrics": {"step": listed}}
        folder.write(LIST, json.dumps({"latest_checkpoint_result": latest}) if listed else '{"latest')
    say_where_it_stopped(folder, "it", 90)
    assert f"it: {said}" in capsys.readouterr().out
