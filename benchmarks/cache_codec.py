"""What the teacher cache costs in bytes and in exactness, and whether a student notices.

python -m benchmarks.cache_codec

Three tables. Bytes an image by column and the largest errors of each precision, for the quickstart's trained teacher (8 x 8
memory, 64 wide, 30 queries, 16 classes). The same bytes for the geometry of a COCO detector (25 x 34 memory, 256 wide, 300
queries, 80 classes): the shapes are real, the numbers are noise of a bell shape, which no compressor can shorten, and the
attention is the small teacher's, enlarged. And the loss curves of the quickstart's student, trained from each precision's
cache with the same seed: their distance from the curve of the float32 cache, beside the distance that another order of the
same images makes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from benchmarks.local_cache import make_cache
from benchmarks.timing import Ratio, Report, load_note, machine, print_table
from pipelines.demo.quickstart import RECIPE, TEACHER, TRAIN
from pipelines.feed.stream import local_stream
from pipelines.prepare import prepare
from pipelines.run.resolve import ResolvedConfig
from pipelines.training import driver as distill
from qskd.config import Config
from qskd.config.recipe import load
from qskd.datasets.batch import train_batch
from qskd.datasets.loader import BatchLoader
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import make_shapes
from qskd.detectors import build_student
from qskd.from_recipe import make_teacher, teacher_for_training
from qskd.structures import TeacherRecord
from qskd.teacher.cache import TeacherCacheReader, write_rows
from qskd.teacher.columns.table import ARRAYS, collate, decode_batch, encode, largest_errors
from qskd.teacher.identity import cache_identity, teacher_preprocessing
from qskd.teacher.making import CacheMaker
from qskd.teacher.manifest import CacheManifest
from qskd.teacher.online import OnlineTeacher
from qskd.training.step import Training

PRECISIONS = ("int8", "float16", "float32")
GOAL_BYTES = 300_000
COCO = {"queries": 300, "classes": 80, "channels": 256, "height": 25, "width": 34, "attended": 40}


def recipe(folder: Path, precision: str, epochs: int = 1, seed: int = 0) -> Config:
    overrides = [
        f"data.train={folder}/train",
        f"data.val={folder}/train",
        "data.views.count=1",
        f"teacher.path={TEACHER}",
        f"teacher.cache.path={folder}/cache-{precision}",
        f"teacher.cache.precision={precision}",
        f"training.epochs={epochs}",
        f"training.evaluate_every_epochs={epochs}",
        f"seed={seed}",
    ]
    return load(RECIPE, overrides)


def column_bytes(files: Sequence[Path]) -> dict[str, float]:
    """Stored bytes a row, by column, of Parquet files; "other" is all that is not data."""
    sizes, rows, total = dict.fromkeys(ARRAYS, 0), 0, 0
    for file in files:
        metadata = pq.read_metadata(file)
        rows += metadata.num_rows
        total += file.stat().st_size
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                if column.path_in_schema in sizes:
                    sizes[column.path_in_schema] += column.total_compressed_size
    return {name: size / rows for name, size in sizes.items()} | {
        "other": (total - sum(sizes.values())) / rows,
        "all": total / rows,
    }


def errors_of(config: Config, teacher: OnlineTeacher, manifest: CacheManifest, images: int) -> dict[str, float]:
    """The largest errors of what a cache gives back, over so many images."""
    reader = TeacherCacheReader(config.teacher.cache.path)
    loader = BatchLoader(config.data.train, "", config.data.views, teacher_preprocessing(config).resize)
    maker, worst = CacheMaker(config, teacher, torch.device("cpu")), dict[str, float]()
    for start in range(0, images, 16):
        rows = list(range(start, min(start + 16, images)))
        tensors = collate(reader.read(0, 0, rows), manifest.sizes, reader.columns)
        found = decode_batch({name: torch.from_numpy(value) for name, value in tensors.items()})
        true = maker.ask(loader.load("train", np.array([(0, row, 0) for row in rows])))
        for name, value in largest_errors(found, true).items():
            worst[name] = max(worst.get(name, 0.0), value)
    return worst


def coco_sized(attention: torch.Tensor, images: int = 32) -> TeacherRecord:
    """Noise in a COCO detector's geometry; `attention` [n, h, w] are real maps to enlarge and draw from."""
    g = torch.Generator().manual_seed(0)
    grid = (COCO["height"], COCO["width"])
    maps = F.interpolate(attention[:, None], grid, mode="bilinear")[:, 0]
    drawn = maps[torch.randint(len(maps), (images, COCO["attended"]), generator=g)]
    queries = torch.stack(
        [torch.randperm(COCO["queries"], generator=g)[: COCO["attended"]].sort().values for _ in range(images)]
    )
    return TeacherRecord(
        logits=torch.randn(1, images, COCO["queries"], COCO["classes"], generator=g) - 4,
        boxes_cxcywh=torch.rand(1, images, COCO["queries"], 4, generator=g),
        memory=(torch.randn(images, COCO["channels"], *grid, generator=g),),
        memory_valid=(torch.ones(images, *grid, dtype=torch.bool),),
        attention_queries=queries,
        attention=(drawn / drawn.sum((2, 3), keepdim=True),),
    )


def loss_curve(config: ResolvedConfig) -> list[float]:
    """The total loss of every step, from the cache and the directions beside it, as a training reads them."""
    labels, cpu = load_manifest(config.data.train).labels, torch.device("cpu")
    stream, teacher = distill.make_plan(config, "distill").stream, teacher_for_training(config, labels, cpu)
    student = build_student(config.student, labels, 0)
    training = Training(config, student, teacher, stream.schedule.total_steps, cpu)
    shares = (share for share in local_stream(stream) if share.subset == "train")
    return [training.train_step(train_batch(share.arrays))["total"].item() for share in shares]


def apart(mine: Sequence[float], theirs: Sequence[float], window: int = 20) -> float:
    """Mean relative distance of two curves, smoothed over `window` steps."""
    window = min(window, len(mine))
    smooth = [np.convolve(curve, np.ones(window) / window, "valid") for curve in (mine, theirs)]
    return float(np.mean(np.abs(smooth[0] - smooth[1]) / smooth[1]))


def measure(images: int, epochs: int) -> Report:
    torch.set_num_threads(1)
    report = Report("The teacher cache: bytes, errors, and a student trained from it")
    report.facts += [machine(), load_note(), f"{images} images, {epochs} epochs"]
    with tempfile.TemporaryDirectory(prefix="qskd-codec-") as scratch:
        folder = Path(scratch)
        prepare(
            *make_shapes(TRAIN.model_copy(update={"images": images}), folder / "shapes"),
            str(folder / "train"),
            quiet=True,
        )
        bytes_small, bytes_coco, errors, curves = {}, {}, {}, {}
        for precision in PRECISIONS:
            config = recipe(folder, precision, epochs)
            data = load_manifest(config.data.train)
            teacher = make_teacher(config, data.labels)
            assert teacher is not None
            resize = teacher_preprocessing(config).resize
            manifest = make_cache(config, teacher, resize, cache_identity(config, data))
            bytes_small[precision] = column_bytes(sorted(Path(config.teacher.cache.path).glob("*.parquet")))
            some = min(256, images)
            errors[precision] = errors_of(config, teacher, manifest, some)
            rows = TeacherCacheReader(config.teacher.cache.path).read(0, 0, range(some))
            looks = [torch.from_numpy(row.attention.astype(np.float32)).unflatten(1, (8, 8)) for row in rows]
            record = coco_sized(torch.cat(looks))
            write_rows(str(folder), f"{precision}.parquet", encode(record, range(32), precision), "")
            bytes_coco[precision] = column_bytes([folder / f"{precision}.parquet"])
            curves[precision] = loss_curve(ResolvedConfig(config))
        other = loss_curve(ResolvedConfig(recipe(folder, "float32", epochs, seed=1)))
    noise = apart(other, curves["float32"])
    for title, sizes in (("quickstart", bytes_small), ("COCO-sized", bytes_coco)):
        print(f"\nBytes an image, {title}")
        names = list(sizes["int8"])
        print_table(["", *PRECISIONS], [[name, *(f"{sizes[p][name]:.0f}" for p in PRECISIONS)] for name in names])
    print("\nLargest errors, quickstart (relative: over the channel's or query's largest value)")
    print_table(["", *PRECISIONS], [[name, *(f"{errors[p][name]:.2g}" for p in PRECISIONS)] for name in errors["int8"]])
    print()
    per_query = bytes_coco["int8"]["attention"] / COCO["attended"]
    room = (GOAL_BYTES - bytes_coco["int8"]["all"]) / per_query + COCO["attended"]
    report.figures += [
        (f"attention, COCO-sized, of each of the {COCO['attended']} queries assumed", f"{per_query:.0f} bytes"),
        (f"queries with attention that fit into {GOAL_BYTES} bytes", f"{room:.0f}"),
        ("loss curve of another order of the images, from float32's", f"{noise:.2%}"),
        *(
            (f"loss curve from {p}, from float32's", f"{apart(curves[p], curves['float32']):.3%}")
            for p in PRECISIONS[:2]
        ),
        (
            "last 50 steps' mean loss " + ", ".join(PRECISIONS),
            ", ".join(f"{statistics.mean(curves[p][-50:]):.3f}" for p in PRECISIONS),
        ),
    ]
    report.ratios += [
        Ratio("COCO-sized bytes an image / 300 000", (bytes_coco["int8"]["all"] / GOAL_BYTES,), at_most=1.0),
        Ratio(
            "distance of int8's loss curve / distance of another order's",
            (apart(curves["int8"], curves["float32"]) / noise,),
            at_most=1.0,
        ),
    ]
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cache_codec", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args(arguments)
    report = measure(given.images, given.epochs)
    report.print()
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
