"""Which faults befall which verb, at which moments, and where that is written down."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = Path(__file__).parent / "records"
DASHBOARD = "QSKD_CHAOS_DASHBOARD"  # in the environment of a cluster that has Ray's: 1
VERBS = {"cache": "pipelines.cache_teacher", "distill": "pipelines.distill", "tune": "pipelines.tune"}
# What the table calls them.
FAULTS = {
    "worker": "a worker is killed",
    "actor": "the teacher's actor is killed",
    "node": "a node is killed",
    "driver": "the driver is killed",
    "head": "the head is killed",
    "disk": "the disk is full for seconds",
    "store": "the store is away for seconds, or for good",
}
# The processes of a role, by what Ray calls them: of the cache job a worker decodes, of a sweep it is a trial's process.
TITLES = {
    ("cache", "worker"): "ray::decode",
    ("cache", "actor"): "TeacherActor",
    ("distill", "worker"): "RayTrainWorker",
    ("tune", "worker"): "ImplicitFunc",
}
CHECKS = {
    "ended": "ended",
    "weights": "same result",
    "once": "no image twice",
    "mlflow": "same MLflow run",
    "processes": "no process left",
    "files": "no file left",
}
STORE_VARIANTS = ("seconds", "for good")


@dataclass(frozen=True)
class Moment:
    """One disturbed run. fraction: when the fault comes, as a share of the time that the undisturbed run takes.

    outage_s: how long a disk is full or a store away. variant: of the store's; "for good" is until the run has given up.
    chance: which of several processes or nodes is struck, 0 to 1.
    """

    verb: str
    fault: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.verb}-{self.fault}-{self.number:02d}"

    @property
    def seed(self) -> int:
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big")

    def draw(self) -> tuple[float, float, float]:
        """(fraction, outage in seconds, chance)."""
        drawn = random.Random(self.seed)
        return drawn.uniform(0.05, 0.98), drawn.uniform(3.0, 8.0), drawn.random()

    @property
    def variant(self) -> str:
        return STORE_VARIANTS[self.number % 2] if self.fault == "store" else ""

    @property
    def record(self) -> Path:
        return RECORDS / self.verb / self.fault / f"{self.number:02d}.json"

    def read(self) -> dict[str, Any] | None:
        return json.loads(self.record.read_text()) if self.record.exists() else None

    def write(self, record: Mapping[str, Any]) -> None:
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps(record, indent=1) + "\n")


def applies(verb: str, fault: str) -> bool:
    return fault != "actor" or verb == "cache"


def moments(verbs: Sequence[str], faults: Sequence[str], count: int) -> Iterator[Moment]:
    """One of each pair, then the next of each: a run that is cut short has spread its moments evenly."""
    for number in range(count):
        for fault in faults:  # those of one kind one after the other: they share a cluster, a disk, a store
            for verb in verbs:
                if applies(verb, fault):
                    yield Moment(verb, fault, number)


def applicable_checks(verb: str) -> list[str]:
    """The cache job opens no MLflow run; only it makes rows of images."""
    skipped = "mlflow" if verb == "cache" else "once"
    return [check for check in CHECKS if check != skipped]


def code_checksum() -> str:
    """Of all modules that a run executes: the version that a record is of."""
    digest = hashlib.sha256()
    for folder in ("qskd", "pipelines", "search_spaces"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
