"""The cache job, killed at random moments: does it end with the files of an undisturbed job, and compute nothing twice?

python -m benchmarks.cache_kills [--kills 20]

The job is started as a user would, in a process of its own that starts its own Ray, and at a moment drawn from the time the
undisturbed job takes one of these is killed: the driver, the actor that holds the teacher, a process that decodes, or
everything at once (driver, actors and Ray itself). Then the same command is started again, and killed again, until it gets to
the end; then another cache is begun. After every kill: each file that is there has the bytes of the undisturbed job's, and
each that was there before is the very same file. At every end: the same files, no other, and no process left.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
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
class Kill:
    """What was killed and when (seconds after the start), and what was wrong afterwards."""

    victim: str
    after_s: float
    files: int = 0  # whole, after it
    survived: bool = False  # the job went on by itself, to its end
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


class Target:
    """One cache, its job started and killed again and again until it is finished."""

    def __init__(self, folder: Path, number: int, views: int, expected: dict[str, str]) -> None:
        self.folder, self.views, self.expected = folder, views, expected
        self.cache = folder / f"cache-{number}"
        self.seen: dict[str, tuple[int, int]] = {}

    def attack(self, kill: Kill) -> bool:
        """Start the job and kill; False when the job had ended before there was anything to kill."""
        driver = start(self.folder, self.cache, self.views)
        time.sleep(kill.after_s)
        while not (struck := strike(kill.victim, driver)) and driver.poll() is None:
            time.sleep(0.05)  # no such process yet
        code = driver.wait(timeout=600)
        kill.survived = struck and code == 0
        if struck and kill.victim in ("actor", "decoder") and code:
            kill.wrong.append(f"the job ended with {code}: see its log")
        kill.wrong += self.look()
        kill.files = len(self.seen)
        return struck

    def look(self) -> list[str]:
        """What is wrong with the files that are there."""
        now = whole_files(self.cache)
        wrong = [f"computed again: {name}" for name, mark in self.seen.items() if now.get(name) != mark]
        found = digests(self.cache) if self.cache.exists() else {}
        wrong += [f"other bytes: {name}" for name in now if found[name] != self.expected[name]]
        self.seen = now
        return wrong

    @property
    def finished(self) -> bool:
        """Whether the manifest, which is written last, is that of a whole cache."""
        return self.cache.exists() and digests(self.cache).get("manifest.json") == self.expected["manifest.json"]

    def finish(self) -> list[str]:
        """Run the job to its end, if it is not there yet; what is wrong then."""
        wrong = []
        if not self.finished and start(self.folder, self.cache, self.views).wait(timeout=600) != 0:
            wrong.append("the last run failed: see its log")
        wrong += self.look()
        wrong += [f"missing: {name}" for name in self.expected if not (self.cache / name).exists()]
        wrong += [f"left in the folder: {path.name}" for path in self.cache.iterdir() if path.name not in self.expected]
        return wrong + [f"left running: {title}" for title in left_over(self.cache)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cache_kills", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    draw, views, kills, caches = random.Random(given.seed), 2, list[Kill](), 0
    with tempfile.TemporaryDirectory(prefix="qskd-cache-kills-") as scratch:
        folder = Path(scratch)
        annotations, pictures = make_shapes(ShapesConfig(images=given.images), folder / "shapes")
        prepare(annotations, pictures, str(folder / "data"), rows_per_shard=max(1, given.images // 8), quiet=True)
        began = time.monotonic()
        if start(folder, folder / "whole", views).wait() != 0:
            print((folder / "log.txt").read_text())
            return 1
        took, expected = time.monotonic() - began, digests(folder / "whole")
        print(f"undisturbed: {took:.0f} s, {len(expected) - 1} files; {machine('ray')}", flush=True)
        target, wrong = Target(folder, caches, views, expected), list[str]()
        while len(kills) < given.kills:
            kill = Kill(VICTIMS[len(kills) % len(VICTIMS)], draw.uniform(0.3, 0.95) * took)
            if target.attack(kill):
                kills.append(kill)
                print(
                    f"{len(kills):2}  {kill.victim:<10} after {kill.after_s:5.1f} s, {kill.files:2} files whole"
                    f"{' (went on by itself)' if kill.survived else ''}  {'; '.join(kill.wrong) or 'all right'}",
                    flush=True,
                )
            if target.finished or len(kills) == given.kills:
                found = target.finish()
                wrong += found
                caches += 1
                print(f"    cache {caches} at its end: {'; '.join(found) or 'all right'}", flush=True)
                target = Target(folder, caches, views, expected)
    counts, bad = Counter(kill.victim for kill in kills), Counter(kill.victim for kill in kills if kill.wrong)
    rows = [
        [v, str(counts[v]), str(sum(kill.survived for kill in kills if kill.victim == v)), str(bad[v])]
        for v in VICTIMS
        if counts[v]
    ]
    print_table(["killed", "times", "went on by itself", "something wrong"], rows)
    print(f"caches: {caches}; wrong at their end: {len(wrong)}")
    return int(bool(bad or wrong))


if __name__ == "__main__":
    sys.exit(main())
