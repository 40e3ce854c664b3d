"""The student's backbone, trained beforehand: a stand-in for the ImageNet weights that students start from in practice.

python -m benchmarks.evidence.backbone FOLDER        12,000 other images of the same kind, the dense head's loss alone

Each cell of the backbone's map learns which object it lies in and where that object is (`qskd.losses.dense_head`); no query, no
matching, no teacher. Cells of the evidence, taught or not, start from the one result (pipelines/assets/shapes_backbone); a
student whose backbone has other sizes gets one of its own, made the same way into the work folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import ResNetBackbone

from pipelines.demo.quickstart import RECIPE, TRAIN
from pipelines.feed.stream import local_stream
from pipelines.prepare import prepare
from pipelines.run.resolve import resolve
from pipelines.training.plan import make_plan
from qskd.checkpoints.weights import quiet
from qskd.config.recipe import load
from qskd.datasets.batch import train_batch
from qskd.datasets.shapes import make_shapes
from qskd.detectors import IMAGENET_MEAN, IMAGENET_STD, Detector, build_student, to_pixels
from qskd.losses.dense_head import DENSE_WEIGHTS, DenseHead
from qskd.losses.detection_loss import combine

IMAGES = TRAIN.model_copy(update={"images": 12_000, "seed": 1})  # another seed: none of them is in any other split
EPOCHS = 8


def save_backbone(detector: Detector, folder: Path) -> None:
    """A detector's ResNet as a folder that `student.backbone.init` reads; float16, for its size."""
    resnet = detector.backbone.get_submodule("model")
    state = {k: v for k, v in resnet.state_dict().items() if not k.endswith("num_batches_tracked")}
    plain = ResNetBackbone(resnet.config)
    missing = plain.load_state_dict(state, strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    with quiet():
        plain.half().save_pretrained(folder)


def pretrain(work: Path, folder: Path, epochs: int, overrides: Iterable[str] = ()) -> None:
    """Train and save. overrides: of the student. Prints the mean loss of each epoch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not (work / "backbone" / "manifest.json").exists():
        annotations, images = make_shapes(IMAGES, work / "backbone-coco")
        prepare(annotations, images, str(work / "backbone"), quiet=True)
    shards = f"{work}/backbone"  # val, too: nothing is evaluated, and the task's own may not be there yet
    given = [f"data.train={shards}", f"data.val={shards}", "student.backbone.init=", "student.inherit=false"]
    config = load(RECIPE, [*overrides, *given, f"training.epochs={epochs}", f"training.evaluate_every_epochs={epochs}"])
    plan = make_plan(resolve(config, "train"), "train")
    student = build_student(config.student, plan.train.labels, config.seed)
    head = DenseHead(config.student.backbone.hidden_sizes[-1], len(plan.train.labels))
    parameters = [*student.backbone.parameters(), *head.parameters()]
    steps = plan.stream.schedule.total_steps
    optimizer = torch.optim.AdamW(parameters, lr=config.training.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.training.learning_rate, steps, pct_start=0.05)
    total, count = 0.0, 0
    for share in local_stream(plan.stream):
        if share.subset == "val":
            continue
        batch = train_batch(share.arrays)
        pixels, mask = to_pixels(batch.images, batch.sizes, IMAGENET_MEAN, IMAGENET_STD)
        features, valid = student.backbone(pixels, mask)[-1]
        terms = head(features, valid.bool(), batch.targets)
        loss = combine(terms, DENSE_WEIGHTS, {name: term.count for name, term in terms.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total, count = total + loss.item(), count + 1
        if share.is_last:
            print(f"epoch {share.epoch + 1}: dense loss {total / count:.3f}", flush=True)
            total, count = 0.0, 0
    save_backbone(student, folder)


def make_backbone(work: Path, folder: Path, overrides: Iterable[str]) -> None:
    """A student's own backbone, unless its folder is there already; overrides: the student's (eight minutes on one core)."""
    if not folder.exists():
        pretrain(work, folder, EPOCHS, overrides)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.backbone", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    given = parser.parse_args(arguments)
    pretrain(given.work.resolve(), given.folder, given.epochs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
