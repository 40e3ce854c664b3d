"""The overfit proof: a small student with random weights learns a few real images by heart.

python -m benchmarks.overfit --family conditional_detr

High AP on the images it was trained on says nothing of how well a detector generalises, and much of the code: boxes,
classes, resizing, matching, losses, evaluation, saving and loading have to agree, or it is not reached. No Ray is started.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipelines.feed.stream import Share, local_stream
from pipelines.prepare import prepare
from pipelines.run.resolve import ResolvedConfig
from pipelines.training.plan import make_plan
from qskd.config import FACTS, Config
from qskd.config.recipe import load
from qskd.datasets.batch import train_batch
from qskd.detectors import Detector, Preprocessing, build_student, load_detector, read_preprocessing, save_detector
from qskd.errors import QskdError
from qskd.evaluation.average_precision import CocoResult, evaluate_coco
from qskd.evaluation.detections import Detections, GroundTruth
from qskd.evaluation.inference import predict_batch
from qskd.from_recipe import ground_truth
from qskd.training.step import Training

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "overfit.yaml"
SAMPLE = ROOT.parent / "shared" / "coco-sample"
FAMILIES = tuple(FACTS)
WANTED_AP50 = 0.9
MOST_OBJECTS = 8
SMALLEST_SIDE = 32.0  # pixels of the image as it is; smaller objects vanish at the recipe's resolution


@dataclass(frozen=True)
class Candidate:
    """An image that may be chosen."""

    image_id: int
    categories: frozenset[int]
    greyscale: bool
    portrait: bool
    landscape: bool


def candidates(document: dict[str, Any], images: Path) -> list[Candidate]:
    """Images that are there, of 1 to 8 objects, none of them a crowd or with a side shorter than 32 pixels, by id."""
    objects: dict[int, list[dict[str, Any]]] = {}
    for annotation in document["annotations"]:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    found = []
    for image in sorted(document["images"], key=lambda entry: entry["id"]):
        own = objects.get(image["id"], [])
        smallest = min((side for annotation in own for side in annotation["bbox"][2:]), default=0.0)
        if len(own) > MOST_OBJECTS or smallest < SMALLEST_SIDE or any(annotation.get("iscrowd") for annotation in own):
            continue
        if not (images / image["file_name"]).is_file():  # a part of the dataset is enough
            continue
        with Image.open(images / image["file_name"]) as picture:
            greyscale = picture.mode == "L"
        tall, wide = image["height"] > image["width"], image["width"] > image["height"]
        categories = frozenset(annotation["category_id"] for annotation in own)
        found.append(Candidate(image["id"], categories, greyscale, tall, wide))
    return found


def choose(document: dict[str, Any], images: Path, count: int) -> list[int]:
    """The ids of `count` images: a greyscale one if there is one, a portrait, a landscape, then any; each time the one
    with the most categories that are not there yet, of equals the one with the smallest id."""
    left, chosen, seen = candidates(document, images), [], set[int]()
    kinds: list[Callable[[Candidate], bool]] = [lambda c: c.greyscale, lambda c: c.portrait, lambda c: c.landscape]
    if len(left) < count:
        raise QskdError(str(images), f"{len(left)} images that can be used", f"at least {count}")
    for number in range(count):
        fitting = [one for one in left if kinds[number](one)] if number < len(kinds) else left
        best = max(fitting or left, key=lambda one: (len(one.categories - seen), -one.image_id))
        left.remove(best)
        chosen.append(best.image_id)
        seen |= best.categories
    return chosen


def make_shards(annotations: Path, images: Path, folder: Path, count: int) -> str:
    """Shards of the chosen images, with all categories of the dataset and their own ids."""
    if not annotations.is_file():
        raise QskdError(str(annotations), "no such file", "COCO annotations", "--annotations FILE --images FOLDER")
    document = json.loads(annotations.read_text())
    chosen = set(choose(document, images, count))
    document["images"] = [image for image in document["images"] if image["id"] in chosen]
    document["annotations"] = [entry for entry in document["annotations"] if entry["image_id"] in chosen]
    subset = folder / "chosen.json"
    subset.write_text(json.dumps(document))
    prepare(subset, images, str(folder / "shards"), quiet=True)
    return str(folder / "shards")


def make_config(shards: str, family: str, steps: int | None = None, overrides: Sequence[str] = ()) -> Config:
    """The recipe for one family, with these shards to train and to evaluate on."""
    own = [f"name=overfit-{family}", f"student.family={family}", f"data.train={shards}", f"data.val={shards}"]
    if FACTS[family].vit:
        own += ["student.backbone.hidden_sizes=[96]", "student.backbone.depths=[1,1,1]"]
    if (
        family == "table-transformer"
    ):  # before its norms its authors' dropout is noise in what every layer adds to: AP50 0.82
        own.append("student.dropout=0")
    return load(RECIPE, [*own, *([f"training.epochs={steps}"] if steps else []), *overrides])


@dataclass(frozen=True)
class Proof:
    """The student's evaluations on the images it learned: after training, and as saved and loaded again."""

    trained: CocoResult
    loaded: CocoResult
    steps: int

    @property
    def complaint(self) -> str:
        """What is not as it should be; empty when the proof holds."""
        if self.loaded.metrics != self.trained.metrics:
            return "the student does not evaluate alike after it was saved and loaded"
        found = self.trained.metrics["AP50"]
        return f"AP50 {found:.4f} is below {WANTED_AP50}" if found < WANTED_AP50 else ""


def evaluate(detector: Detector, shares: Iterable[Share], seen_as: Preprocessing, truth: GroundTruth) -> CocoResult:
    """COCO AP over these batches."""
    category_ids = [number for number, _ in truth.categories]
    found = [predict_batch(detector, share.arrays, seen_as, category_ids) for share in shares]
    return evaluate_coco(truth, Detections.concatenate(found))


def tell(what: str, result: CocoResult, more: str = "") -> None:
    print(f"{what}: " + "  ".join(f"{name} {result.metrics[name]:.4f}" for name in ("AP", "AP50")) + more, flush=True)


def overfit(config: Config, folder: Path) -> Proof:
    """Train on `config.data.train`, evaluate on `config.data.val` (the same images), save the student to `folder`, load it
    and evaluate again."""
    stream, truth = make_plan(ResolvedConfig(config), "train").stream, ground_truth(config.data.val)
    steps = stream.schedule.total_steps
    student = build_student(config.student, [name for _, name in truth.categories], config.seed)
    training = Training(config, student, None, steps, torch.device("cpu"))
    results, loss = [], torch.zeros(())
    for kind, shares in groupby(local_stream(stream), key=lambda share: share.subset):
        if kind == "train":
            for share in shares:
                loss = training.train_step(train_batch(share.arrays))["total"]
        else:
            with training.evaluation_weights() as detector:
                results.append(evaluate(detector, shares, Preprocessing(config.student.resize), truth))
            tell(f"step {training.step}", results[-1], f"  loss {loss.item():.3f}")
    training.check_finite()
    with training.evaluation_weights() as detector:
        save_detector(detector, folder, config.student.resize)
    last = (share for share in local_stream(stream, steps - 1) if share.subset == "val")
    loaded = evaluate(load_detector(folder), last, read_preprocessing(folder), truth)
    tell("saved and loaded", loaded)
    return Proof(results[-1], loaded, steps)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; 1 when the proof fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overfit", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--images", type=Path, default=SAMPLE / "train2017", help="folder of pictures")
    parser.add_argument("--annotations", type=Path, default=SAMPLE / "annotations" / "instances_train2017.json")
    parser.add_argument("--count", type=int, default=8, help="how many images to learn")
    parser.add_argument("--out", type=Path, help="folder to keep the student in, for `qskd export` and the like")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="set a field of the recipe")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qskd-overfit-") as scratch:
        try:
            shards = make_shards(given.annotations, given.images, Path(scratch), given.count)
            truth = ground_truth(shards)
            categories = len(set(truth.category_ids.tolist()))
            print(f"images {truth.image_ids.tolist()}: {len(truth.category_ids)} objects of {categories} categories")
            proof = overfit(
                make_config(shards, given.family, given.steps, given.set), given.out or Path(scratch) / "student"
            )
        except QskdError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    minutes = (time.perf_counter() - started) / 60
    tell(given.family, proof.trained, f"  steps {proof.steps}  minutes {minutes:.1f}")
    if proof.complaint:
        print(f"FAILED: {proof.complaint}")
    return int(bool(proof.complaint))


if __name__ == "__main__":
    sys.exit(main())
