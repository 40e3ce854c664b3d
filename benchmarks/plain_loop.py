"""Plain training in images a CPU second, over transformers' own loop: what `qskd train` costs where there is no teacher.

python -m benchmarks.plain_loop

The student of the quickstart and its own pictures, JPEG. Ours: read from shards, decode, flip, resize, train a step. Theirs: decode
the same JPEG bytes with Pillow, the family's image processor, the model with its own loss, AdamW. The same weights, pictures (in
ours shuffled and flipped) and clipping, one process, one thread, taking turns at each step; CPU seconds are counted, which others
on the machine disturb little.

Three of ours: as the recipe has it; without what the other loop lacks, the dense head and the average of the weights; and that with
pictures that are kept decoded, as in every epoch but the first where they fit into memory.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor

from benchmarks.detection_loss import threads
from benchmarks.timing import Ratio, Report, load_note, machine, speeds_ratio
from pipelines.demo.quickstart import RECIPE, TRAIN
from pipelines.feed.stream import StreamConfig, local_stream
from qskd.config import Config, ViewConfig
from qskd.config.recipe import load
from qskd.datasets.batch import train_batch
from qskd.datasets.coco import read_coco
from qskd.datasets.manifest import load_manifest
from qskd.datasets.order.schedule import Schedule
from qskd.datasets.samples import Sample
from qskd.datasets.shapes import make_shapes
from qskd.datasets.shards import write_shards
from qskd.detectors import Detector, build_student, save_detector
from qskd.training.step import Training

GOAL = 1.15
BATCH = 16
BARE = ("detection.dense_weight=0", "training.ema_decay=0")
SIDES = {"as the recipe has it": (), "without dense head and average": BARE, "the same, pictures kept decoded": BARE}
KEPT = "the same, pictures kept decoded"
CPU = torch.device("cpu")


def student_of(config: Config, labels: Sequence[str]) -> Detector:
    return build_student(config.student, labels, seed=0)


class Ours:
    """One step at a time: what a worker does, its reader's work too."""

    def __init__(self, config: Config, labels: Sequence[str], shards: str, schedule: Schedule, kept: bool) -> None:
        views, resize = ViewConfig(flip_probability=0.5), config.student.resize
        # Room for the encoded rows alone, as where the pictures are many, or for all.
        encoded = sum(shard.bytes + 3000 * shard.rows for shard in load_manifest(shards).shards)
        keep = 2**30 if kept else encoded
        stream = StreamConfig(shards, "", schedule, views, resize, None, keep)
        self.shares = local_stream(stream)
        self.training = Training(config, student_of(config, labels), None, schedule.total_steps, CPU)

    def __call__(self) -> None:
        self.training.train_step(train_batch(next(self.shares).arrays))


class Theirs:
    """The loop that transformers' documentation writes down, without its Trainer."""

    def __init__(self, config: Config, labels: Sequence[str], samples: Sequence[Sample]) -> None:
        student = student_of(config, labels)
        with tempfile.TemporaryDirectory(prefix="qskd-plain-") as folder:
            save_detector(copy.deepcopy(student).eval(), folder, config.student.resize)
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.model = without_hooks(student.model).train()
        self.model.config.auxiliary_loss = True  # every decoder layer learns, as in ours
        settings = config.training
        self.optimizer = torch.optim.AdamW(
            (each for each in self.model.parameters() if each.requires_grad),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.clip_norm = settings.clip_norm
        self.categories = {category: slot for slot, category in enumerate(sorted({*_categories(samples)}))}
        self.batches = itertools.cycle([samples[at : at + BATCH] for at in range(0, len(samples), BATCH)])

    def __call__(self) -> None:
        pictures, said = [], []
        for sample in next(self.batches):
            pictures.append(Image.open(io.BytesIO(sample.encoded)).convert("RGB"))
            said.append({"image_id": sample.image_id, "annotations": list(self.annotations(sample))})
        given = self.processor(images=pictures, annotations=said, return_tensors="pt")
        loss = self.model(**given).loss
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()

    def annotations(self, sample: Sample) -> Iterator[dict[str, Any]]:
        for (left, top, right, bottom), category in zip(
            sample.boxes_xyxy.tolist(), sample.category_ids.tolist(), strict=True
        ):
            box = [left, top, right - left, bottom - top]
            area = box[2] * box[3]
            yield {"bbox": box, "category_id": self.categories[category], "area": area, "iscrowd": 0}


def _categories(samples: Sequence[Sample]) -> Iterator[int]:
    for sample in samples:
        yield from sample.category_ids.tolist()


def without_hooks(model: Any) -> Any:
    """As transformers made it."""
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        vars(module).pop("forward", None)
    return model


def measure(images: int, rounds: int) -> list[Ratio]:
    """Images a CPU second of each side over theirs, by rounds of an epoch of `images`; of what is kept, the first is left out."""
    with tempfile.TemporaryDirectory(prefix="qskd-plain-") as folder:
        shapes = TRAIN.model_copy(update={"images": images})
        annotations, pictures = make_shapes(shapes, Path(folder) / "coco")
        source = read_coco(annotations, pictures)
        samples = list(source.samples())
        manifest = write_shards(source, f"{folder}/shards", rows_per_shard=images)
        schedule = Schedule(manifest.shard_rows, (), 0, rounds + 1, BATCH, images)
        sides: dict[str, Ours | Theirs] = {}
        for name, overrides in SIDES.items():
            config = load(RECIPE, ["student.inherit=false", "training.schedule=constant", *overrides])
            sides[name] = Ours(config, shapes.class_names, f"{folder}/shards", schedule, name == KEPT)
        sides["transformers"] = Theirs(load(RECIPE), shapes.class_names, samples)
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds + 1):
            spent = dict.fromkeys(sides, 0.0)
            for step in range(images // BATCH):
                turn = step % len(sides)
                for name in [*sides, *sides][turn : turn + len(sides)]:
                    started = time.process_time()
                    sides[name]()
                    spent[name] += time.process_time() - started
            for name, seconds in spent.items():
                taken[name].append(images / seconds)
    theirs = taken["transformers"][1:]
    return [
        speeds_ratio(name, taken[name][1:], theirs, None if name == KEPT else GOAL)
        for name in sides
        if name != "transformers"
    ]


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run a command line, print and return what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plain_loop", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=512, help="of one epoch")
    parser.add_argument("--rounds", type=int, default=5, help="epochs, after one that warms up")
    parser.add_argument("--quick", action="store_true", help="two steps: seconds")
    given = parser.parse_args(arguments)
    images, rounds = (2 * BATCH, 1) if given.quick else (given.images, given.rounds)
    report = Report("Plain training, qskd / transformers' own loop (images a CPU second; higher is better)")
    with threads(1):
        report.ratios = measure(images, rounds)
    report.facts = [
        machine("transformers", "pillow") + f", {load_note()}, one thread",
        f"the quickstart's student, {images} pictures an epoch of {TRAIN.size} x {TRAIN.size}, batch {BATCH}",
    ]
    report.print()
    return report


if __name__ == "__main__":
    sys.exit(main().exit_code)
