"""What is run: three small jobs on synthetic images, each in a driver of its own, as a user would start it."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.plan import ROOT, VERBS
from pipelines.prepare import prepare
from qskd.config import Config
from qskd.config.recipe import load, to_yaml
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.detectors import build_student, save_detector
from qskd.storage.files import make_folder
from qskd.storage.places import open_folder

IMAGES = {"train": (64, 0), "val": (16, 1000)}  # how many, and the first one's number
ROWS_PER_SHARD = 8
SIZES = [
    "student.backbone.embedding_size=8", "student.backbone.hidden_sizes=[8, 16]", "student.backbone.depths=[1, 1]",
    "student.width=32", "student.encoder_layers=1", "student.decoder_layers=2", "student.heads=4", "student.ffn_width=32",
    "student.queries=8", "student.resize.size=64", "student.dropout=0.1", "training.batch_size=16",
    "training.learning_rate=1e-3", "training.backbone_learning_rate_scale=1", "training.ema_decay=0.9",
    "detection.dense_weight=1", "compute.device=cpu",
]  # fmt: skip
OF_VERB = {
    "cache": ["data.views.count=2", "data.views.crop_probability=0.5", "teacher.cache.batch_size=8"],
    "distill": [
        "training.epochs=4",
        "training.checkpoint_every_steps=2",
        "training.evaluate_every_epochs=2",
        "teacher.cache.attention_giou_floor=-1",
    ],
    "tune": ["training.epochs=2", "training.checkpoint_every_steps=2", "teacher.cache.attention_giou_floor=-1"],
}
TUNE = ["--space", "loss_weights", "--space", "query_selection", "--trials", "3", "--at-once", "1"]


def job_checksum(verb: str) -> str:
    """Of all that decides what a verb's run computes, code and machine left out."""
    decides = json.dumps([SIZES, OF_VERB[verb], TUNE if verb == "tune" else [], IMAGES, ROWS_PER_SHARD])
    return hashlib.sha256(decides.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Places:
    """Folders or URIs. data: with `train`, `val` and `cache`. output: where runs go. tracking: of MLflow, a local file."""

    data: str
    output: str
    teacher: str
    tracking: str


def make_data(folder: Path) -> None:
    """Shards and a teacher whose weights are drawn from a seed; the cache for distill and tune is made by the verb."""
    for name, (images, first) in IMAGES.items():
        annotations, pictures = make_shapes(ShapesConfig(images=images, first_image=first), folder / f"{name}-coco")
        prepare(annotations, pictures, str(folder / name), rows_per_shard=ROWS_PER_SHARD, quiet=True)
        shutil.rmtree(folder / f"{name}-coco")
    labels = load_manifest(str(folder / "train")).labels
    teacher = load(None, [*SIZES, "student.queries=11", "student.width=64", "student.decoder_layers=3"]).student
    save_detector(build_student(teacher, labels[::-1], seed=7).eval(), folder / "teacher", teacher.resize)


def copy_folder(source: Path, uri: str) -> None:
    """A local folder to anywhere."""
    filesystem, root = open_folder(uri)
    make_folder(filesystem, root, uri)
    pafs.copy_files(str(source), root, destination_filesystem=filesystem)


def recipe(verb: str, name: str, places: Places) -> Config:
    """Of a run called `name`. Its cache is its own where the verb makes it, else the one beside the data."""
    cache = f"{places.output}/{name}.teacher" if verb == "cache" else f"{places.data}/cache"
    fixed = [
        f"name={name}", f"output={places.output}", f"data.train={places.data}/train", f"data.val={places.data}/val",
        f"teacher.path={places.teacher}", f"teacher.cache.path={cache}", f"tracking.uri=sqlite:///{places.tracking}",
    ]  # fmt: skip
    return load(None, [*SIZES, *OF_VERB[verb], *fixed])


class Driver:
    """The command, once. `log` has what it said."""

    def __init__(self, verb: str, config: Config, cluster: Cluster, folder: Path, number: int) -> None:
        path = folder / "recipe.yaml"
        path.write_text(to_yaml(config))
        self.log = folder / f"{number}.log"
        command = [sys.executable, "-m", VERBS[verb], str(path), *(TUNE if verb == "tune" else [])]
        with self.log.open("wb") as said:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=cluster.environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.began = time.monotonic()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code, or None when it has to be killed at the end of that time."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def said(self, lines: int = 12) -> str:
        """Its last lines."""
        return "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-lines:])


def leave_out(text: str, names: Mapping[str, str]) -> str:
    """Without this machine's folders: a record is committed."""
    for found, said in sorted(names.items(), key=lambda pair: -len(pair[0])):
        text = text.replace(found, said)
    return text
