"""What a dataset of detection costs with a teacher and a student like the paper's pair: bytes, operations, and by a formula
accelerator-hours and money.

python -m benchmarks.dataset_costs                                  bytes and operations of one image, and of whole datasets
python -m benchmarks.dataset_costs --tflops 20 --dollars 2          hours and dollars at a speed and a price of your own
python -m benchmarks.dataset_costs --student-ms 12 --teacher-ms 9   the same from your own times of an image

Measured here: the bytes of an image in a shard and in the cache (of photographs of COCO if a folder of some is given by
--coco, else of pictures made up in COCO's sizes), and the operations of both models at 800 x 1066. The teacher has the
published sizes of Conditional DETR ResNet-50 and random weights: sizes decide bytes and operations. Random boxes overlap
few objects, so that the cache keeps hardly any attention; 40 queries' are added by arithmetic. Everything of a whole dataset
is arithmetic from these, and no speed or price is assumed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import machine, print_table
from benchmarks.work_folder import check_record
from pipelines.caching.plan import bytes_text, estimate, make_cache_plan
from pipelines.prepare import prepare
from pipelines.run.resolve import resolve
from qskd.config.recipe import load
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.detectors import build_student, save_detector
from qskd.detectors.cost import gflops, parameters
from qskd.from_recipe import make_teacher

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "coco_conditional_r18.yaml"
HEIGHT, WIDTH = 800, 1066  # of a 4:3 picture, resized as DETR does
RESNET50 = (
    "student.backbone={layer_type: bottleneck, hidden_sizes: [256, 512, 1024, 2048], depths: [3, 4, 6, 3]}",
    "student.ffn_width=2048",
)
ATTENDED = 40  # queries of an image whose GIoU with an object reaches the floor, as benchmarks/cache_codec.py assumes
ATTENTION_BYTES = 240.0  # of one query's, as benchmarks/cache_codec.py found them in the cache's files
SETS = {"COCO train2017": 118_287, "Objects365": 1_700_000, "a billion images": 10**9}
BACKWARD = 2.0  # a backward pass is about two forward passes
MADE_UP_IMAGES = 24


@dataclass(frozen=True)
class PerImage:
    """Of one image: bytes in a shard and, for each view, in the cache; 10^9 operations of each model's forward pass."""

    shard_bytes: float
    cache_bytes: float
    teacher_gflops: float
    student_gflops: float

    @property
    def train_gflops(self) -> float:
        """Of one training step's share, the teacher's outputs being there."""
        return (1 + BACKWARD) * self.student_gflops


def data(folder: Path, coco: Path | None) -> tuple[str, float]:
    """Shards in folder/train; what they were made of, and bytes of an image in them."""
    if coco is not None:
        annotations, images = coco / "annotations" / "instances_train2017.json", coco / "train2017"
        made, what = (annotations, images), "photographs of COCO"
    else:
        made, what = make_shapes(ShapesConfig(images=MADE_UP_IMAGES, size=512), folder / "coco"), "made-up pictures"
    prepare(*made, str(folder / "train"), quiet=True)
    manifest = load_manifest(str(folder / "train"))
    size = sum(shard.bytes for shard in manifest.shards) / manifest.num_images
    return f"{manifest.num_images} {what}", size


def measure(coco: Path | None, edge: int = HEIGHT, student: Sequence[str] = ()) -> tuple[PerImage, list[str]]:
    """edge: the shorter side of a picture, in pixels. student: changes to the recipe, for a run of seconds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="qskd-costs-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # frozen norms on random weights
        folder = Path(scratch)
        source, shard_bytes = data(folder, coco)
        labels = load_manifest(str(folder / "train")).labels
        common = ["student.backbone.init=", f"student.resize.size={edge}", *student]
        large = load(RECIPE, [*common, *([] if student else [*RESNET50])]).student
        teacher = build_student(large, labels, seed=0).eval()
        save_detector(teacher, folder / "teacher", large.resize)
        config = load(RECIPE, [*common, f"teacher.path={folder}/teacher", f"data.train={folder}/train",
                               f"teacher.cache.path={folder}/cache", "teacher.cache.batch_size=2",
                               "data.views.crop_probability=0"])  # fmt: skip
        config = resolve(config, "distill")
        online = make_teacher(config, labels)
        assert online is not None
        cached = estimate(make_cache_plan(config), online)
        pixels = torch.zeros(1, 3, edge, edge * WIDTH // HEIGHT)
        small = build_student(config.student, labels, seed=0).eval()
        found = PerImage(
            shard_bytes,
            cached.bytes + ATTENDED * ATTENTION_BYTES,
            gflops(teacher.model, pixels),
            gflops(small.model, pixels),
        )
        facts = [
            machine("transformers"),
            f"shards of {source}; pictures of {edge} x {edge * WIDTH // HEIGHT} for operations",
            f"teacher {parameters(teacher.model) / 1e6:.1f} M parameters, student {parameters(small.model) / 1e6:.1f} M",
            f"cache: {bytes_text(cached.bytes)} found for a view; {ATTENDED} x {ATTENTION_BYTES:.0f} B of attention added",
        ]
    return found, facts


@dataclass(frozen=True)
class Bill:
    """A dataset's, in bytes and seconds of an accelerator."""

    shard_bytes: float
    cache_bytes: float
    cache_s: float
    cached_s: float
    online_s: float


def bill(images: int, views: int, epochs: int, one: PerImage, teacher_s: float, train_s: float) -> Bill:
    """teacher_s: the teacher's time for one image. train_s: the student's, for its step's share of one image.

    With the cache the teacher sees each view once (fewer, when there are fewer epochs than views); without it, one view of
    each image in every epoch.
    """
    seen = min(views, epochs)
    training = images * epochs * train_s
    once = images * seen * teacher_s
    return Bill(images * one.shard_bytes, images * seen * one.cache_bytes, once, training + once,
                training + images * epochs * teacher_s)  # fmt: skip


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.3g}" if seconds < 3.6e6 else f"{seconds / 3600:,.0f}"


def table(one: PerImage, given: argparse.Namespace) -> list[list[str]]:
    """Rows of the datasets. Hours are empty where neither a speed nor times are given."""
    rows = []
    for name, images in SETS.items():
        views, epochs = given.views, given.epochs
        if name == "a billion images":
            views, epochs = 1, 1  # one pass: no one sees a billion images fifty times
        seconds = (1.0, 1.0)
        known = given.tflops or (given.student_ms and given.teacher_ms)
        if given.student_ms and given.teacher_ms:
            seconds = given.teacher_ms / 1000, given.student_ms / 1000
        elif given.tflops:
            seconds = one.teacher_gflops / given.tflops / 1000, one.train_gflops / given.tflops / 1000
        made = bill(images, views, epochs, one, *seconds)
        row = [name, f"{views} / {epochs}", bytes_text(made.shard_bytes), bytes_text(made.cache_bytes)]
        times = (made.cache_s, made.cached_s, made.online_s)
        row += [hours(time) for time in times] if known else [""] * 3
        dollars = [f"{time / 3600 * given.dollars:,.0f}" for time in times[1:]] if known and given.dollars else ["", ""]
        rows.append(row + dollars)
    return rows


HEAD = ("", "views / epochs", "shards", "cache", "hours: cache", "all, cached", "all, online", "$ cached", "$ online")


def main(arguments: Sequence[str] | None = None) -> PerImage:
    """Run a command line, print and return what one image costs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dataset_costs", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--coco", type=Path, help="a folder with annotations/instances_train2017.json and train2017/")
    parser.add_argument("--views", type=int, default=4, help="of COCO and Objects365; a billion images are seen once")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument(
        "--tflops", type=float, help="10^12 operations a second that your accelerator sustains on such models"
    )
    parser.add_argument("--student-ms", type=float, help="your own time of a step, for one image")
    parser.add_argument("--teacher-ms", type=float, help="your own time of the teacher, for one image")
    parser.add_argument("--dollars", type=float, help="for an accelerator-hour")
    parser.add_argument("--record", type=Path, help="keep what was measured in this JSON file")
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing: take this record")
    parser.add_argument("--quick", action="store_true", help="small models and pictures: does it run?")
    given = parser.parse_args(arguments)
    times = [given.student_ms is not None, given.teacher_ms is not None]
    if any(times) and not all(times):
        parser.error("--student-ms and --teacher-ms belong together: hours are of both")
    if given.dollars and not (all(times) or given.tflops):
        parser.error("--dollars are of hours: give --tflops, or --student-ms and --teacher-ms")
    check_record(given.record, PerImage)
    if given.source:
        one, facts = PerImage(**json.loads(given.source.read_text())), [f"from {given.source}"]
    elif given.quick:
        sizes = ("student.backbone={embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1]}", "student.width=32",
                 "student.encoder_layers=1", "student.decoder_layers=1", "student.ffn_width=32")  # fmt: skip
        one, facts = measure(given.coco, 64, sizes)
    else:
        one, facts = measure(given.coco)
    if given.record:
        given.record.write_text(json.dumps(one.__dict__))
    print("\n  ".join(["A dataset's costs", *facts]))
    print_table(["of one image", ""], [
        ["in a shard", bytes_text(one.shard_bytes)], ["in the cache, a view", bytes_text(one.cache_bytes)],
        ["teacher, forward", f"{one.teacher_gflops:.0f} GFLOP"], ["student, forward", f"{one.student_gflops:.0f} GFLOP"],
        ["student, training (3 forwards)", f"{one.train_gflops:.0f} GFLOP"],
        ["online / cached, in operations, the cache being there", f"{1 + one.teacher_gflops / one.train_gflops:.2f}"],
    ])  # fmt: skip
    print_table(HEAD, table(one, given))
    return one


if __name__ == "__main__":
    main()
