"""One display of what a program is doing: a bar that fits its terminal, lines for grep elsewhere, never two that fight."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pipelines.reporting import board
from pipelines.reporting.bars import Bars
from pipelines.reporting.board import progress, stage
from pipelines.reporting.pace import Pace
from pipelines.reporting.pulse import forget, heard
from pipelines.reporting.watch import TrainingWatch, time_left
from pipelines.reporting.words import Shown, line_text
from pipelines.run.folder import Folder
from pipelines.run.history import add_report
from pipelines.tuning.records import Records
from pipelines.tuning.trial.row import TrialRow
from pipelines.tuning.watch import SweepWatch
from qskd.config.recipe import load
from qskd.datasets.order.schedule import Schedule
from qskd.errors import QskdError

ROOT = Path(__file__).resolve().parents[1]
NUMBERS: dict[str, float | str] = {"loss": 3.897, "images_per_s": 199.3, "AP": 0.231, "AP50": 0.368}
SCHEDULE = Schedule((1600,), (300,), seed=0, epochs=3, batch_size=16, window_images=64)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: now[0])
    monkeypatch.delenv("QSKD_LOG", raising=False)
    return now


def test_the_line_of_a_report_has_the_form_that_the_readme_shows() -> None:
    shown = Shown("baseline", 750, "step", 750, NUMBERS, left_s=0.0)
    assert line_text(shown) == "baseline  step 750/750  loss   3.897   199.3 images/s  AP 0.231  AP50 0.368"


def test_without_a_terminal_stages_and_steps_are_lines_and_not_too_many(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("cache", 6000) as row:
        stage("starting Ray")  # of whatever is shown now
        stage("starting Ray")
        for done in range(0, 6000, 10):
            clock[0] += 1.0
            row.at(done)
    stage("nothing is shown now")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "cache  starting Ray"
    assert lines[0] == "cache    90/6000 images    10.0 images/s  about 10 min left"
    assert 12 <= len(lines) <= 30  # ten minutes: every ten seconds at first, every minute at the end


def test_a_stage_is_left_when_the_work_goes_on(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("one", 300, "step") as row:
        row.stage("reading the first batches")
        clock[0] += 60.0
        row.at(20, left_s=90.0, numbers={"loss": 2.0})
        clock[0] += 60.0
        row.at(100, "evaluating 20%", numbers={"loss": 1.0})
    assert capsys.readouterr().out.splitlines() == [
        "one  reading the first batches",
        "one  step  20/300  loss   2.000  about 90 s left",
        "one  step 100/300  evaluating 20%  loss   1.000  about 2 min left",  # at the speed of late
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_bars_fit_their_terminal_and_say_the_time_left_first(width: int) -> None:
    rows = [
        Shown("a-run-with-quite-a-long-name-of-its-own", 750, "step", 310, NUMBERS, left_s=40.0),
        Shown("qskd", 750, "step", 0, {}, "reading the first batches", time.monotonic() - 30),
    ]
    console = Console(width=width, file=StringIO())
    console.print(Bars(lambda: rows))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)
    assert "40 s left" in lines[0]
    assert "reading the first" in lines[1]
    assert ("199.3 images/s" in lines[0]) == (width >= 120)


IN_A_TERMINAL = """
import sys, time, warnings, logging
from pipelines.reporting.board import progress
from pipelines.run.logs import start_logs, say
start_logs()
with progress("one", 100, "step") as one, progress("two", 50) as two:
    one.at(30, left_s=9.0); two.at(25)
    time.sleep(0.4)
    print("printed " + "x" * 100); logging.getLogger("qskd").warning("warned"); say("said")
    time.sleep(0.4)
    if len(sys.argv) > 1:
        raise KeyboardInterrupt
print("after")
"""


def in_a_terminal(*words: str) -> str:
    """What a program writes to a terminal of 60 columns."""
    mine, its = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IN_A_TERMINAL, *words]
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment):
        os.close(its)
        found = b""
        while True:
            try:
                chunk = os.read(mine, 65536)
            except OSError:  # the other end is closed
                break
            found += chunk
            if not chunk:
                break
    os.close(mine)
    return found.decode()


def test_two_rows_share_one_display_and_what_is_printed_stays_above_it() -> None:
    text = in_a_terminal()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    for line in ("printed " + "x" * 100, "WARNING warned", "said", "after"):  # whole, each on its own
        assert line in lines
    assert "\x1b[1A\x1b[2K" in text  # both rows are drawn anew together
    assert "\x1b[?25l" not in text  # a program that is killed leaves a cursor


def test_ctrl_c_in_the_middle_of_a_bar_takes_it_away() -> None:
    before, found, after = in_a_terminal("stop").partition("Traceback")
    assert found
    assert "KeyboardInterrupt" in after
    assert "\x1b[1A\x1b[2K" in before.rpartition("━")[2]  # the rows were erased
    assert "━" not in after


def test_a_watch_prints_each_report_once_and_knows_the_time_left(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(load(None, [f"output={tmp_path}", "name=one"]))
    add_report(folder, 100, 1, {"AP": 0.1, "AP50": 0.2}, [])
    with progress("one", SCHEDULE.total_steps, "step") as row:
        watch = TrainingWatch(row, folder, SCHEDULE)
        assert row.shown.done == 100  # goes on from there
        rows = [(200, {"loss/total": 2.0, "speed/images_per_s": 50.0})]
        add_report(folder, 200, 2, {"AP": 0.3, "AP50": 0.4}, rows)
        for _ in range(2):
            watch.look()
    assert capsys.readouterr().out == "one  step 200/300  loss   2.000    50.0 images/s  AP 0.300  AP50 0.400\n"
    assert time_left(SCHEDULE, 150, {}) is None
    # 150 steps, and the evaluations after epochs 2 and 3.
    assert time_left(SCHEDULE, 150, {"step_s": 0.5, "evaluation_s": 10.0}) == 150 * 0.5 + 2 * 10.0


def test_a_worker_says_its_stage_its_speed_and_how_far_an_evaluation_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    pace = Pace("", 16)
    monkeypatch.setattr(pace.pulse, "tell", lambda **facts: said.append(facts))
    pace.doing("reading the first batches")
    pace.step(1, torch.tensor(4.0, requires_grad=True), 30.0)  # it waited for the readers: no measure of speed
    pace.step(2, torch.tensor(3.0), 0.5)
    assert list(pace.evaluating("abcd", 4)) == list("abcd")
    pace.step(3, torch.tensor(2.0), 0.5)
    assert said[0] == {"doing": "reading the first batches"}
    assert said[1] == {"step": 1, "loss": 4.0}
    assert (said[2]["step_s"], said[2]["images_per_s"]) == (0.5, 32.0)
    assert [each["doing"] for each in said[3:8]] == [
        *(f"evaluating {part}%" for part in (0, 25, 50, 75)),
        "evaluating: computing AP",
    ]
    assert said[8]["evaluation_s"] > 0
    assert "doing" not in said[8]
    json.dumps(said, default=float)  # as it is posted


def test_without_ray_nothing_is_posted_or_heard_and_nothing_fails() -> None:
    code = (
        "from pipelines.reporting.pulse import Pulse, heard, forget; import time\n"
        "pulse = Pulse('runs/one', 'worker'); pulse.tell(step=1); time.sleep(0.1)\n"
        "forget('runs/one'); print(heard('runs/one'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("{}\n", "")
    assert heard("runs/never") == {}
    forget("runs/never")


def test_a_row_that_another_process_shows_prints_nothing_and_says_its_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    monkeypatch.setattr(board, "_shown_elsewhere", True)
    with progress("one", 100, "step", subject="runs/one") as row:
        stage("starting Ray")
        assert row.pulse.facts == {"doing": "starting Ray"}
        clock[0] += 100.0
        row.at(10)
        assert row.pulse.facts == {"doing": ""}  # the worker's own words count now
        row.line("a report")
    with progress("two", quiet=True) as row:
        row.stage("reading")
    assert capsys.readouterr().out == ""


def test_a_sweeps_row_counts_a_stopped_trial_as_done_and_the_rest_of_a_running_one_as_to_do(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    records = Records(load(None, [f"output={tmp_path}", "name=sweep"]))
    records.put(TrialRow(0, "finished", curve=((1.0, 0.2), (3.0, 0.4))))
    records.put(TrialRow(1, "stopped", curve=((1.0, 0.1),)))
    records.put(TrialRow(2, "running", curve=((2.0, 0.3),)))
    with progress("sweep", unit="step") as row:
        watch = SweepWatch(row, records, (300, 100), 5)
        watch.look()
        assert (row.shown.done, row.shown.total) == (300 + 300 + 200, 5 * 300)
        records.put(TrialRow(2, "finished", curve=((2.0, 0.3), (3.0, 0.5))))
        clock[0] += 100.0
        watch.look()
    assert capsys.readouterr().out == "sweep  step  900/1500  3/5 trials  best AP 0.500 (trial 2)  about 10 min left\n"


def test_in_json_a_stage_and_a_step_are_objects_with_their_numbers() -> None:
    code = (
        "from pipelines.run.logs import start_logs; from pipelines.reporting import board; start_logs()\n"
        "with board.progress('one', 300, 'step', quiet=True) as row:\n"
        "    row.stage('starting Ray'); row.begun -= 60; row.said_at -= 60\n"
        "    row.at(20, left_s=9.0, numbers={'loss': 2.0})"
    )
    environment = os.environ | {"QSKD_LOG": "json", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    stages, steps = map(json.loads, done.stderr.splitlines())
    assert (stages["run"], stages["doing"]) == ("one", "starting Ray")
    assert (steps["step"], steps["of"], steps["loss"]) == (20, 300, 2.0)


def test_a_students_row_goes_when_its_process_has_ended_and_a_failed_one_ends_the_wait() -> None:
    from pipelines.demo.quickstart import _wait

    def process(code: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code], text=True)

    slow = process("import time; time.sleep(2)")
    closed: list[tuple[str, bool]] = []
    shown = {name: contextlib.ExitStack() for name in ("fast", "slow")}
    for name, own in shown.items():
        own.callback(lambda name=name: closed.append((name, slow.poll() is None)))
    _wait({"fast": process(""), "slow": slow}, shown)
    assert closed[0] == ("fast", True)  # while the other was at work
    with pytest.raises(QskdError, match="training failed: fast"):
        _wait({"fast": process("raise SystemExit(3)"), "slow": slow}, shown)
