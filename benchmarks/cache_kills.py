"""The cache job, killed at random moments: does it end with the files of an undisturbed job, and compute nothing twice?

python -m benchmarks.cache_kills [--kills 20]

Each trial starts the job as a user would, in a process of its own that starts its own Ray, and kills, at a moment drawn from
the time the undisturbed job takes, one of: the driver, the actor that holds the teacher, a process that decodes, or
everything at once (driver, actors and Ray itself). Then it runs the same command again, to the end, and looks: the same
bytes in every file, every file that was whole before the kill untouched, no unfinished file left, no process left.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.timing import machine, print_table
from pipelines.prepare import prepare
from pipelines.quickstart import TEACHER
from qskd.shapes import ShapesConfig, make_shapes

VICTIMS = ("driver", "actor", "decoder", "everything")
MARK = "QSKD_KILLS_TRIAL"  # in the environment of every process of a trial
# How Ray titles the processes: the actor's class, the task's function.
TITLES = {"actor": "TeacherActor", "decoder": "ray::decode"}


@dataclass
class Trial:
    """What was killed and when (seconds after the start), and what was wrong afterwards."""

    victim: str
    after_s: float
    files_before: int = 0
    survived: bool = False  # the job went on by itself
    too_late: bool = False  # the job had ended before: nothing was killed
    wrong: list[str] = field(default_factory=list)


def start(folder: Path, cache: Path, views: int) -> subprocess.Popen[bytes]:
    settings = [
        f"data.train={folder}/data",
        f"data.views.count={views}",
        f"teacher.path={TEACHER}",
        f"teacher.cache.path={cache}",
    ]
    command = [sys.executable, "-m", "pipelines.cache_teacher", *(part for s in settings for part in ("--set", s))]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {MARK: str(cache)}
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it started, also through Ray (whose daemons are its children)."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def strike(victim: str, driver: subprocess.Popen[bytes]) -> bool:
    """Kill the victim; False when there is none (yet, or any more)."""
    everyone = family(psutil.Process(driver.pid)) if driver.poll() is None else []
    if victim == "everything":
        targets = everyone
    elif victim == "driver":
        targets = everyone[:1]
    else:
        targets = [p for p in everyone if TITLES[victim] in _title(p)]
    for target in targets:
        try:
            target.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    return bool(targets)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def whole_files(cache: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every finished file."""
    found = {path.name: path.stat() for path in cache.glob("*.parquet")} if cache.exists() else {}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def left_over(cache: Path, patience_s: float = 60.0) -> list[str]:
    """The processes of a trial's two jobs, known by their environment, that don't go away."""
    deadline = time.monotonic() + patience_s
    while True:
        found = [p for p in psutil.process_iter() if _marked(p, str(cache))]
        if not found or time.monotonic() > deadline:
            return [_title(p)[:60] for p in found]
        time.sleep(0.5)


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def run_trial(folder: Path, cache: Path, views: int, trial: Trial, expected: dict[str, str]) -> Trial:
    driver = start(folder, cache, views)
    time.sleep(trial.after_s)
    while not (struck := strike(trial.victim, driver)) and driver.poll() is None:
        time.sleep(0.05)  # no such process yet
    if not struck:
        trial.too_late = True
        return trial
    if trial.victim in ("driver", "everything"):
        driver.wait()
    else:
        trial.survived = driver.wait(timeout=300) == 0
    before = whole_files(cache)
    trial.files_before = len(before)
    again = start(folder, cache, views)
    if again.wait(timeout=300) != 0:
        trial.wrong.append("the second run failed: see its log")
    after = whole_files(cache)
    trial.wrong += [f"computed again: {name}" for name, mark in before.items() if after.get(name) != mark]
    found = digests(cache)
    trial.wrong += [f"other bytes: {n}" for n in sorted(expected) if found.get(n) != expected[n]]
    trial.wrong += [f"left in the folder: {path.name}" for path in cache.iterdir() if path.name not in expected]
    trial.wrong += [f"left running: {title}" for title in left_over(cache)]
    return trial


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cache_kills", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    draw, views, trials = random.Random(given.seed), 2, list[Trial]()
    with tempfile.TemporaryDirectory(prefix="qskd-cache-kills-") as scratch:
        folder = Path(scratch)
        annotations, pictures = make_shapes(ShapesConfig(images=given.images), folder / "shapes")
        prepare(annotations, pictures, str(folder / "data"), rows_per_shard=max(1, given.images // 8), quiet=True)
        began = time.monotonic()
        if start(folder, folder / "whole", views).wait() != 0:
            print((folder / "log.txt").read_text())
            return 1
        took = time.monotonic() - began
        expected = digests(folder / "whole")
        print(f"undisturbed: {took:.0f} s, {len(expected) - 1} files; {machine('ray')}", flush=True)
        for number in range(given.kills):
            trial = Trial(VICTIMS[number % len(VICTIMS)], draw.uniform(0.2, 0.95) * took)
            while run_trial(folder, folder / f"cache-{number}", views, trial, expected).too_late:
                trial = Trial(trial.victim, 0.7 * trial.after_s)  # a machine's speed drifts
                shutil.rmtree(folder / f"cache-{number}", ignore_errors=True)
            trials.append(trial)
            print(
                f"{number + 1:2}  {trial.victim:<10} after {trial.after_s:5.1f} s, {trial.files_before:2} files whole"
                f"{' (went on by itself)' if trial.survived else ''}  {'; '.join(trial.wrong) or 'all right'}",
                flush=True,
            )
    counts, bad = Counter(t.victim for t in trials), Counter(t.victim for t in trials if t.wrong)
    rows = [
        [v, str(counts[v]), str(sum(t.survived for t in trials if t.victim == v)), str(bad[v])]
        for v in VICTIMS
        if counts[v]
    ]
    print_table(["killed", "times", "went on by itself", "something wrong"], rows)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
