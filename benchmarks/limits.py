"""What grows with a dataset outside the training step, at the sizes of COCO, Objects365 and a billion images: seconds and memory.

python -m benchmarks.limits                  all but the last two rows of a billion (they take 6 GB)
python -m benchmarks.limits --large          those too
python -m benchmarks.limits --ray            also what Ray Data's input costs for each run of steps

Each row is a process of its own, so that its peak of memory is its own. Manifests, orders and detections are real objects made
through the same classes as in a run; the images behind them are not there, and nothing here needs them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.timing import load_note, machine, print_table

ROWS_PER_SHARD = 512  # `qskd prepare`'s
SETS = {"COCO train": 118_287, "Objects365": 1_700_000, "a billion": 10**9}
VIEWS = 4


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def shards_of(images: int) -> int:
    return -(-images // ROWS_PER_SHARD)


def _shard_rows(images: int) -> tuple[int, ...]:
    return (ROWS_PER_SHARD,) * (images // ROWS_PER_SHARD) + (
        (images % ROWS_PER_SHARD,) if images % ROWS_PER_SHARD else ()
    )


def manifest(images: int) -> str:
    """Written by `to_json`, read again by `load_manifest`, as each worker and reader does."""
    from qskd.datasets.findings.splits import MOST_KEPT, packed_pictures
    from qskd.datasets.manifest import MANIFEST, Manifest, Shard, load_manifest
    from qskd.datasets.samples import Category

    categories = tuple(Category(number, f"class {number}") for number in range(1, 81))
    shards = tuple(
        Shard(f"shard-{number:05d}-{number:08x}.parquet", rows, 78_000_000 + number, f"{number:064x}")
        for number, rows in enumerate(_shard_rows(images))
    )
    with tempfile.TemporaryDirectory(prefix="qskd-limits-") as folder:
        file = Path(folder) / MANIFEST
        kept = np.arange(1, min(images, MOST_KEPT) + 1)
        pictures = packed_pictures(kept.astype(np.uint64), kept)
        whole = Manifest(categories, images, 7 * images, 0, shards, "made up", "0" * 64, pictures=pictures)
        file.write_text(whole.to_json())
        size, before = file.stat().st_size, peak_mib()
        del shards, whole
        started = time.perf_counter()
        load_manifest(folder)
        took = time.perf_counter() - started
    return f"{size / 1e6:.1f} MB, read in {took:.2f} s, process {peak_mib():.0f} MiB (before reading {before:.0f})"


def cache_manifest(images: int) -> str:
    from qskd.teacher.manifest import CacheManifest, CacheSizes, load_cache_manifest, save_cache_manifest

    rows = _shard_rows(images)
    names = tuple(f"shard-{number:05d}-{number:08x}" for number in range(len(rows)))
    files = tuple((count, 139_000_000 + number) for number, count in enumerate(rows))
    sizes = CacheSizes(1, 300, 80, (256,))
    with tempfile.TemporaryDirectory(prefix="qskd-limits-") as folder:
        save_cache_manifest(folder, CacheManifest({}, sizes, 16, names, dict.fromkeys(range(VIEWS), files)))
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        started = time.perf_counter()
        load_cache_manifest(folder)
        took = time.perf_counter() - started
    return f"{size / 1e6:.1f} MB, read in {took:.2f} s, process {peak_mib():.0f} MiB"


def order(images: int) -> str:
    """What a reader does for its first run of an epoch, and for its second: 16 images in the middle of it."""
    from qskd.datasets.order.schedule import Schedule, training_batches

    schedule, before = Schedule(_shard_rows(images), (), 0, 50, 16, 4096), peak_mib()
    taken = []
    for first in (schedule.steps_per_epoch // 2, schedule.steps_per_epoch // 2 + 1):
        started = time.perf_counter()
        next(training_batches(schedule, 1, first))
        taken.append(time.perf_counter() - started)
    return f"first batch {taken[0]:.3f} s, next {1000 * taken[1]:.2f} ms, {peak_mib() - before:.0f} MiB more"


def each_step(images: int) -> str:
    """What a worker asks for each batch, and a reader for each run of an evaluation of a twentieth as many images."""
    from qskd.datasets.order.schedule import Schedule, evaluation_batches

    schedule = Schedule(_shard_rows(images), _shard_rows(images // 20), 0, 50, 16, 4096)
    late, times = schedule.batches_in("val", 0) - 1, 200
    next(evaluation_batches(schedule, 0, late))  # the rows are made here
    started = time.process_time()
    for step in range(times):
        schedule.batches_in("train", step % 50)
    asked = time.process_time()
    for _ in range(times):
        next(evaluation_batches(schedule, 0, late))
    took = (asked - started) / times, (time.process_time() - asked) / times
    return f"{1e6 * took[0]:.1f} us a step; the last run of an evaluation {1e6 * took[1]:.0f} us"


def cache_job(images: int) -> str:
    """What the driver of `qskd cache` does for the units that come in, beside the work itself: which views are finished?"""
    from pipelines.caching.driver import ViewsLeft

    units = [(shard, view) for view in range(VIEWS) for shard in range(shards_of(images))]
    left, started = ViewsLeft(units), time.process_time()
    finished = [view for unit in units for view in left.finished_by([unit])]
    took = time.process_time() - started
    return f"{len(units):,} units of {len(finished)} views in {1000 * took:.1f} ms"


def row_groups(groups: int) -> str:
    """What a loader asks a teacher's file with so many row groups for each row: which are stored with it?"""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from qskd.storage.parquet import ParquetFiles

    schema = pa.schema([("image_id", pa.int64()), *((f"column {number}", pa.binary()) for number in range(10))])
    with tempfile.TemporaryDirectory(prefix="qskd-limits-") as folder:
        path = Path(folder, "file.parquet")
        with pq.ParquetWriter(path, schema, use_dictionary=False, write_statistics=False) as writer:
            for number in range(groups):
                row = {name: [number if name == "image_id" else b"x"] for name in schema.names}
                writer.write_table(pa.table(row, schema=schema))
        size = path.stat().st_size
        files = ParquetFiles(folder, lambda _: (path.name, groups, size), schema, "")
        started = time.process_time()
        files.group_rows(0, 0)
        opened = time.process_time()
        for row_number in range(groups):
            files.group_rows(0, row_number)
        took = (time.process_time() - opened) / groups
    return f"opened in {1000 * (opened - started):.1f} ms, then {1e6 * took:.1f} us a row"


def whole_order(images: int) -> str:
    """All of an epoch's order at once, as every run made it until it was made window by window."""
    from qskd.datasets.order.schedule import epoch_order

    started = time.perf_counter()
    epoch_order(_shard_rows(images), 0, 1, 4096)
    return f"{time.perf_counter() - started:.2f} s, process {peak_mib():.0f} MiB"


def first_stretch(images: int) -> str:
    """The ranges of steps of fifty epochs at 800 pixels, batch 16 over eight workers, and listing the first execution's."""
    from pipelines.feed.stream import StreamConfig
    from qskd.config import ResizeConfig, ViewConfig
    from qskd.datasets.order.schedule import Schedule

    resize = ResizeConfig(mode="shortest_edge", size=800)
    schedule = Schedule(_shard_rows(images), (), 0, 50, 16, 4096)
    stream = StreamConfig("", "", schedule, ViewConfig(count=VIEWS), resize, None, teacher_row_bytes=272_000)
    started = time.perf_counter()
    held = next(stream.stretches(schedule.total_steps // 2, 8))
    took = time.perf_counter() - started
    ranges = -(-schedule.steps_per_epoch // stream.range_length(8)) * schedule.epochs
    return f"{ranges:,} ranges of {stream.range_length(8)} steps; the first {len(held)} listed in {1000 * took:.0f} ms"


def evaluation(images: int) -> str:
    """On rank 0: 100 detections an image, as `benchmarks.evaluation` makes them."""
    from benchmarks.evaluation import make_problem
    from qskd.evaluation.average_precision import evaluate_coco

    truth, found = make_problem(images)
    size = sum(getattr(found, name).nbytes for name in ("image_ids", "boxes_xyxy", "scores", "category_ids"))
    before, started = peak_mib(), time.perf_counter()
    result = evaluate_coco(truth, found)
    took = time.perf_counter() - started
    return (
        f"{took:.1f} s by {result.backend}, {size / 1e6:.0f} MB of detections gathered, "
        f"process {peak_mib():.0f} MiB (before {before:.0f})"
    )


def checkpoint(images: int) -> str:
    """What `write_checkpoint` writes for the student of configs/coco_conditional_r18.yaml after a step; images: unused."""
    import torch

    from benchmarks.step_cases import r18
    from pipelines.training.checkpoints import write_checkpoint
    from qskd.datasets.batch import train_batch

    case = r18(1, 1, 64)
    training = case.training("qskd")
    training.train_step(train_batch(case.batches[0]))
    with tempfile.TemporaryDirectory(prefix="qskd-limits-") as folder:
        started = time.perf_counter()
        write_checkpoint(Path(folder), training, case.config, None)
        took = time.perf_counter() - started
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    trained = sum(p.numel() for p in training.module.parameters() if p.requires_grad)
    assert torch.is_grad_enabled()
    return f"{size / 1e6:.0f} MB, written to disk in {took:.2f} s; {trained / 1e6:.1f} M trained parameters"


def reading(readers: int) -> str:
    """How often each image's bytes are read from storage in an epoch of COCO, by so many readers of a machine, of which each is
    dealt every so manieth run of steps. One keeps rows in the loader's own store, which a row leaves when it is asked for;
    several share whole row groups (`qskd.storage.spool`), of which the oldest go. Sizes alone are kept here."""
    from pipelines.feed.stream import keep_bytes_for
    from qskd.datasets.loader import Recent
    from qskd.datasets.order.schedule import epoch_order

    group, run_rows, window = 64, 48, 4096
    order = epoch_order(_shard_rows(SETS["COCO train"]), 0, 0, window)

    def times(row_bytes: int, keep_bytes: int) -> float:
        spool = dict[tuple[int, int], None]()
        store, rows_read = Recent(keep_bytes), 0
        for at in range(0, len(order), run_rows):
            unread = dict[tuple[int, int], set[int]]()
            for shard, row in order[at : at + run_rows].tolist():
                if readers > 1:
                    if (place := (shard, row - row % group)) not in spool:
                        spool[place] = None
                        rows_read += group
                        while len(spool) * group * row_bytes > keep_bytes:
                            spool.pop(next(iter(spool)))
                elif store.take((shard, row)) is None:
                    unread.setdefault((shard, row - row % group), set()).add(row)
            for (shard, first), asked in unread.items():
                for row in set(range(first, first + group)) - asked:
                    store.put((shard, row), True, row_bytes)
                rows_read += group
        return rows_read / len(order)

    plain, cached = 167_000, 167_000 + 251_000
    found = [times(size, keep_bytes_for(window, size)) for size in (plain, cached)]
    small = times(cached, 2**30)
    memory = keep_bytes_for(window, cached) / 1e9
    return f"{found[0]:.1f}; with a cache {found[1]:.1f} (at most {memory:.1f} GB a reader; with 1 GiB {small:.1f})"


def ray_input(images: int) -> str:
    """Ray Data's input for so many ranges of steps (here `images` is their number), made before the first block flows."""
    from pipelines.cluster.start import start_ray

    start_ray()
    import ray

    runs = [{"subset": "train", "epoch": 0, "first": at, "last": at + 3} for at in range(images)]
    ray.data.from_items(runs[:10], override_num_blocks=10)
    started = time.perf_counter()
    ray.data.from_items(runs, override_num_blocks=len(runs))
    took = time.perf_counter() - started
    ray.shutdown()
    return f"{took:.1f} s, {1000 * took / images:.2f} ms a run"


PARTS: dict[str, Callable[[int], str]] = {
    "manifest": manifest,
    "cache_manifest": cache_manifest,
    "order": order,
    "each_step": each_step,
    "cache_job": cache_job,
    "row_groups": row_groups,
    "whole_order": whole_order,
    "first_stretch": first_stretch,
    "evaluation": evaluation,
    "checkpoint": checkpoint,
    "reading": reading,
    "ray_input": ray_input,
}


def rows(large: bool, with_ray: bool, quick: bool) -> list[tuple[str, str, int]]:
    """(part, the size in words, the size)."""
    if quick:
        return [(part, "quick", 2000) for part in PARTS if part not in ("reading", "ray_input")]
    asked = [(part, name, images) for part in ("manifest", "cache_manifest", "order") for name, images in SETS.items()]
    asked += [(part, name, images) for part in ("each_step", "cache_job") for name, images in list(SETS.items())[:2]]
    asked.append(("row_groups", "512 groups", 512))
    asked += [("whole_order", name, images) for name, images in list(SETS.items())[:2]]
    asked += [("first_stretch", name, images) for name, images in SETS.items()]
    asked += [("evaluation", f"{images:,} images", images) for images in (5_000, 30_000, 100_000)]
    asked.append(("checkpoint", "ResNet-18 student", 0))
    asked += [("reading", f"{readers} reader(s)", readers) for readers in (1, 4, 16)]
    asked += [("ray_input", f"{runs:,} runs", runs) for runs in (1_000, 4_096)] if with_ray else []
    billion = [row for row in asked if row[1] == "a billion" and row[0].endswith("manifest")]
    return asked if large else [row for row in asked if row not in billion]


def main(arguments: Sequence[str] | None = None) -> dict[str, str]:
    """Run a command line, print and return what was found, by "part, size"."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--large", action="store_true", help="also the manifests of a billion images")
    parser.add_argument("--ray", action="store_true", help="also what needs Ray")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--one", nargs=2, metavar=("PART", "SIZE"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(PARTS[given.one[0]](int(given.one[1]))))
        return {}
    print("What grows with the data, outside the step\n  " + f"{machine('ray', 'hotcoco')}, {load_note()}")
    found: dict[str, str] = {}
    for part, name, size in rows(given.large, given.ray, given.quick):
        command = [sys.executable, "-m", "benchmarks.limits", "--one", part, str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        failed = f"failed ({done.returncode}): {' '.join(done.stderr.splitlines()[-1:])}"
        found[f"{part}, {name}"] = failed if done.returncode else json.loads(done.stdout.splitlines()[-1])
        print(f"  {part}, {name}: {found[f'{part}, {name}']}", flush=True)
    print_table(["", "found"], [list(row) for row in found.items()])
    return found


if __name__ == "__main__":
    main()
