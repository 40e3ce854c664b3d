"""One disturbed run from its command to its record, and the undisturbed run that it is compared with."""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.chaos import checks
from benchmarks.chaos.checks import Left
from benchmarks.chaos.faults import Blow, judge_end, mend, strike
from benchmarks.chaos.plan import RECORDS, ROOT, Moment, applicable_checks, code_checksum
from benchmarks.chaos.work import Driver, Places, job_checksum, leave_out, recipe
from benchmarks.chaos.world import World
from benchmarks.timing import machine
from qskd.config import Config
from qskd.storage.files import read_bytes
from qskd.storage.places import open_folder

LIMIT_S = 600.0  # a command that takes longer hangs; an undisturbed one takes a minute on a busy machine
MOST_COMMANDS = 4
MOST_MISSES = 3
LOOK_EVERY_S = 0.02


def first_id(config: Config) -> str:
    """The MLflow run that the run's folder names; "" when it names none yet, or the store is away."""
    with contextlib.suppress(Exception):
        filesystem, root = open_folder(f"{config.output}/{config.name}")
        return str(json.loads(read_bytes(filesystem, f"{root}/mlflow.json"))["run_id"])
    return ""


class Undisturbed:
    """A verb's run that nothing happens to."""

    def __init__(self, verb: str, seconds: float, left: Left) -> None:
        self.verb, self.seconds, self.left = verb, seconds, left

    @staticmethod
    def path(verb: str) -> Path:
        return RECORDS / "undisturbed" / f"{verb}.json"

    @classmethod
    def read(cls, verb: str) -> Undisturbed | None:
        """The one on record, if it is of this code on a machine like this."""
        path = cls.path(verb)
        record = json.loads(path.read_text()) if path.exists() else {}
        known = tuple(record.get(name) for name in ("job", "code", "machine"))
        if known != (job_checksum(verb), code_checksum(), machine("ray")):
            return None
        return cls(verb, record["seconds"], Left(**record["left"]))

    @classmethod
    def make(cls, verb: str, world: World) -> Undisturbed:
        places = world.places("")
        config, folder = recipe(verb, f"{verb}-undisturbed", places), world.logs / f"{verb}-undisturbed"
        folder.mkdir(exist_ok=True)
        began = time.monotonic()
        driver = Driver(verb, config, world.cluster, folder, 0)
        if driver.wait(LIMIT_S) != 0:
            raise RuntimeError(f"the undisturbed {verb} failed:\n{driver.log.read_text()[-3000:]}")
        seconds, left = round(time.monotonic() - began, 1), checks.look(verb, config)
        record = {"verb": verb, "seconds": seconds, "job": job_checksum(verb), "code": code_checksum()}
        cls.path(verb).parent.mkdir(parents=True, exist_ok=True)
        cls.path(verb).write_text(
            json.dumps(record | {"machine": machine("ray"), "left": left.to_json()}, indent=1) + "\n"
        )
        return cls(verb, seconds, left)

    def took(self, seconds: float) -> None:
        """A run was over before anything struck it: with other work on the machine than before, this is how long one takes."""
        self.seconds, path = seconds, self.path(self.verb)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": seconds}, indent=1) + "\n")


def make_cache(world: World) -> None:
    """The teacher's outputs that distill and tune read."""
    config, folder = recipe("distill", "shared", world.places("")), world.logs / "shared"
    folder.mkdir(exist_ok=True)
    driver = Driver("cache", config, world.cluster, folder, 0)
    if driver.wait(LIMIT_S) != 0:
        raise RuntimeError(f"the cache could not be made:\n{driver.log.read_text()[-3000:]}")


class Trial:
    """A moment at work."""

    def __init__(self, moment: Moment, world: World, expected: Undisturbed, missed: int) -> None:
        self.moment, self.world, self.expected, self.missed = moment, world, expected, missed
        places: Places = world.places(moment.fault)
        name = f"{moment.name}.{missed}" if missed else moment.name
        self.config = recipe(moment.verb, name, places)
        self.folder = world.logs / name
        self.folder.mkdir(exist_ok=True)
        self.own = {process.pid for process in world.cluster.workers()}
        self.commands: list[dict[str, Any]] = []
        self.before: Mapping[str, Any] = {}
        self.first_id = ""
        self.began = time.monotonic()

    def start(self) -> Driver:
        return Driver(self.moment.verb, self.config, self.world.cluster, self.folder, len(self.commands))

    def ended(self, driver: Driver, code: int | None, killed: bool = False) -> None:
        """Note how a command ended."""
        how = "killed" if killed else "hung" if code is None else f"exit code {code}"
        seconds = round(time.monotonic() - driver.began, 1)
        said = "" if code == 0 or killed else self.short(driver.said())
        self.commands.append({"ended": how, "seconds": seconds, "said": said})

    def short(self, text: str) -> str:
        ours = {str(self.world.folder): "WORK", f"{ROOT}/": "", sys.prefix: "VENV", sys.base_prefix: "PYTHON"}
        return leave_out(text, ours)[-1500:]

    def disturb(self) -> tuple[Blow, Driver, float]:
        """Start, and strike at the moment; later when there is nothing to strike yet."""
        fraction = self.moment.draw()[0]
        driver = self.start()
        at = driver.began + fraction * self.expected.seconds
        blow = Blow()
        while driver.running and not blow.struck:
            if time.monotonic() >= at:
                if self.moment.verb == "cache":
                    self.before = checks.whole_files(self.config.teacher.cache.path)
                else:
                    self.first_id = first_id(self.config)
                blow = strike(self.moment, self.world, driver)
            time.sleep(LOOK_EVERY_S)
        return blow, driver, round(time.monotonic() - driver.began, 1)

    def run(self) -> dict[str, Any]:
        """The record."""
        blow, driver, after_s = self.disturb()
        if blow.again:
            self.ended(driver, None, killed=True)
        elif blow.mend_at is not None:
            while driver.running and time.monotonic() < blow.mend_at:
                time.sleep(LOOK_EVERY_S)
            if driver.running:
                mend(self.moment, self.world)
            self.ended(driver, driver.wait(LIMIT_S))
        else:
            self.ended(driver, driver.wait(LIMIT_S))
        mend(self.moment, self.world)
        while self.commands[-1]["ended"] != "exit code 0" and len(self.commands) < MOST_COMMANDS:
            again = self.start()
            self.ended(again, again.wait(LIMIT_S))
        verdicts = self.verdicts(blow) if blow.struck else {}
        fraction = self.moment.draw()[0]
        return {
            "verb": self.moment.verb, "fault": self.moment.fault, "number": self.moment.number,
            "variant": self.moment.variant, "seed": self.moment.seed, "fraction": round(fraction, 3), "after_s": after_s,
            "missed": self.missed, "struck": blow.struck, "commands": self.commands, "checks": verdicts,
            "job": job_checksum(self.moment.verb), "code": code_checksum(),
            "machine": machine("ray"), "dashboard": self.world.dashboard, "date": datetime.date.today().isoformat(),
        }  # fmt: skip

    def verdicts(self, blow: Blow) -> dict[str, str]:
        """Check -> "" or in words what is wrong."""
        wrong: dict[str, str] = {"ended": judge_end(self.moment, blow, self.commands, LIMIT_S)}
        verb, cluster = self.moment.verb, self.world.cluster
        own = self.own if self.moment.fault != "head" else set()
        wrong["processes"] = checks.check_processes(cluster, own, self.world.lost)
        found = checks.look(verb, self.config)
        wrong["weights"] = checks.compare_content(self.expected.left, found)
        left = checks.temporary(self.world.scratch, self.world.dashboard)
        wrong["files"] = checks.compare_files(self.expected.left, found, sorted(left))
        if verb == "cache":
            wrong["once"] = checks.check_once(self.config, self.before)
        else:
            wrong["mlflow"] = checks.check_mlflow(self.expected.left, found, self.first_id, first_id(self.config))
        return {name: self.short(wrong[name]) for name in applicable_checks(verb)}


def run(moment: Moment, world: World, expected: Undisturbed) -> dict[str, Any]:
    """Disturb a run, record it, and leave the world fit for the next. A run that was over first is none: another is begun."""
    for missed in range(MOST_MISSES + 1):
        world.tidy()
        trial = Trial(moment, world, expected, missed)
        try:
            record = trial.run()
        finally:
            mend(moment, world)
            world.bury()
        if record["struck"]:
            break
        if record["commands"][-1]["ended"] == "exit code 0":
            expected.took(record["commands"][-1]["seconds"])
    if any(record["checks"].values()):
        world.drop_cluster()  # who knows what it has seen
    moment.write(record)
    return record
