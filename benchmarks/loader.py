"""Speed of loading: against bare decoding, and through Ray Data against a torch DataLoader with as many processes.

python -m benchmarks.loader

In this process: `BatchLoader.load` of training's own rows, from freshly opened shards, against decoding and resizing the
same encoded bytes, already in memory, and nothing else.

In two: Ray Data as training uses it (`pipelines.feed.stream`), and a DataLoader that reads the same encoded bytes as files
and makes the very same arrays with this project's own functions for views, boxes and padding: what differs is the
machinery around them. One reader process each. The consumer, this process, reads every byte of a batch (a timing.checksum,
compared in the end) and does nothing else. Speed counts from the arrival of an early batch; starting up is told apart.
Decoded views are not kept (an epoch's first sight of every image), unless it says so.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from benchmarks import timing
from benchmarks.timing import Difference, Pass, Ratio, Report
from pipelines.cluster.start import start_ray
from pipelines.feed.readers import Readers, open_stream
from pipelines.feed.stream import LOADER_ROWS, StreamConfig
from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.coco import read_coco
from qskd.datasets.loader import label_index
from qskd.datasets.manifest import Manifest
from qskd.datasets.order.schedule import Schedule, training_batches
from qskd.datasets.pictures.joining import pad
from qskd.datasets.samples import Category, Sample
from qskd.datasets.shards import write_shards
from qskd.datasets.views import decode_image, make_view, resized_size, view_boxes, view_image

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "coco-sample"
SHARD = 128  # rows; also the shuffling window, so that a pass reads its rows little by little, as one over COCO does
BATCH = 16
RESIZE = ResizeConfig(mode="shortest_edge", size=320)
DECODING_GOAL, DATALOADER_GOAL = 0.95, 1.0
WARM_UP = 4  # batches that arrive before speed is measured
PACE = 0.8  # of the DataLoader's speed: what the consumer with a training step of its own asks for


def synthetic_sample(number: int, width: int = 640, height: int = 480) -> Sample:
    """A JPEG whose detail falls with frequency as in photographs (1/f), about 150 kB as COCO's are, with a few boxes."""
    random = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    shape = 1 / np.maximum(frequency, 1 / width) ** 1.1
    waves = np.fft.irfft2(np.fft.rfft2(random.standard_normal((3, height, width))) * shape, s=(height, width))
    waves /= waves.std(axis=(1, 2), keepdims=True)
    pixels = np.stack([waves[0] + 0.3 * waves[1], waves[0], waves[0] + 0.3 * waves[2]], axis=-1) * 50 + 120
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    count = int(random.integers(0, 15))
    low = random.uniform(0, 0.7, (count, 2)) * [width, height]
    boxes = np.concatenate([low, low + random.uniform(0.05, 0.3, (count, 2)) * [width, height]], axis=1)
    labels, area, crowd = random.integers(1, 81, count), np.ones(count, np.float32), np.zeros(count, bool)
    encoded, boxes = buffer.getvalue(), boxes.astype(np.float32)
    return Sample(number, f"{number}.jpg", width, height, encoded, boxes, labels, area, crowd)


class Pictures:
    """`count` samples for `write_shards`: the photographs of the COCO sample where it is, else synthetic ones, repeated
    under ids of their own."""

    problems: list[dict[str, str]] = []  # noqa: RUF012
    source_sha256 = "0" * 64

    def __init__(self, count: int, synthetic: bool) -> None:
        self.count = count
        if synthetic or not (SAMPLE / "annotations").is_dir():
            self.categories = tuple(Category(number, f"class {number}") for number in range(1, 81))
            self.distinct = [synthetic_sample(number) for number in range(min(count, 48))]
            self.source = f"{len(self.distinct)} synthetic pictures"
            return
        lists = SAMPLE / "annotations"
        parts = [read_coco(lists / f"instances_{at}2017.json", SAMPLE / f"{at}2017") for at in ("train", "val")]
        self.categories = parts[0].categories
        self.distinct = list(islice(chain.from_iterable(part.samples() for part in parts), count))
        self.source = f"{len(self.distinct)} photographs of COCO"

    def __len__(self) -> int:
        return self.count

    def samples(self) -> Iterator[Sample]:
        for number, sample in enumerate(islice(cycle(self.distinct), self.count), 1):
            yield replace(sample, image_id=number, file_name=f"{number}.jpg")


@dataclass(frozen=True)
class Data:
    """What is loaded: shards, the same encoded bytes as files, and the order of the rows."""

    samples: list[Sample]  # in the order of the shards' rows
    manifest: Manifest
    files: Path
    stream: StreamConfig  # one epoch; rows are kept in memory, decoded views are not

    @property
    def rows(self) -> list[np.ndarray]:
        """One array [BATCH, 3] of (shard, row, view) a step."""
        return [batch.rows for batch in training_batches(self.stream.schedule, 0)]

    @property
    def kept(self) -> StreamConfig:
        """Two epochs with all decoded views kept."""
        return replace(self.stream, schedule=replace(self.stream.schedule, epochs=2), keep_bytes=8 * 2**30)


def make_data(pictures: Pictures, folder: Path) -> Data:
    shards, files = str(folder / "shards"), folder / "files"
    manifest = write_shards(pictures, shards, rows_per_shard=SHARD)
    files.mkdir()
    samples = list(pictures.samples())
    room = 0  # for the encoded rows only: BatchLoader keeps no views when it can't keep all of them
    for sample in samples:
        room += (files / sample.file_name).write_bytes(sample.encoded) + 1000
    schedule = Schedule(manifest.shard_rows, (), 0, 1, BATCH, SHARD)
    return Data(samples, manifest, files, StreamConfig(shards, "", schedule, ViewConfig(), RESIZE, None, room))


def bare(sample: Sample) -> np.ndarray:
    """Decode and resize, with the library calls that the loader makes and nothing around them."""
    picture: Image.Image = Image.open(io.BytesIO(sample.encoded))
    picture.load()
    picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    height, width = resized_size(sample.height, sample.width, RESIZE)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def in_one_process(data: Data, rounds: int) -> tuple[list[Ratio], Difference]:
    """Images/s of a fresh BatchLoader over the others'; each round is one epoch, the sides taking turns at each batch."""
    files, differing = Files(data), 0
    speeds: dict[str, list[float]] = {"loader": [], "bare": [], "files": []}
    for _ in range(rounds):
        loader, spent = data.stream.loader(), dict.fromkeys(speeds, 0.0)
        sides: dict[str, Callable[[np.ndarray], Any]] = {
            "loader": partial(loader.load, "train"),
            "bare": lambda rows: [bare(data.samples[shard * SHARD + row]) for shard, row, _ in rows.tolist()],
            "files": lambda rows: collate([files[shard, row, view] for shard, row, view in rows.tolist()]),
        }
        for number, rows in enumerate(data.rows):
            results = {}
            for name in [*sides, *sides][number % 3 : number % 3 + 3]:
                started = time.perf_counter()
                results[name] = sides[name](rows)
                spent[name] += time.perf_counter() - started
            differing += timing.checksum(results["loader"]) != timing.checksum(results["files"])
        for name, taken in spent.items():
            speeds[name].append(BATCH * len(data.rows) / taken)
    found = [
        timing.speeds_ratio("BatchLoader / bare decoding", speeds["loader"], speeds["bare"], DECODING_GOAL),
        timing.speeds_ratio("BatchLoader / the DataLoader's work, in this process", speeds["loader"], speeds["files"]),
    ]
    return found, Difference("batches: BatchLoader against the DataLoader's", differing, 0)


def kept_speed(data: Data) -> float:
    """Images/s of an epoch that a BatchLoader has seen before."""
    loader = data.kept.loader()

    def epoch() -> None:
        for rows in data.rows:
            loader.load("train", rows)

    epoch()
    return BATCH * len(data.rows) / timing.seconds(epoch)


class Files(Dataset[tuple[Any, ...]]):
    """The same images from files; an item is one view: pixels [h, w, 3], boxes, labels and where it is from."""

    def __init__(self, data: Data) -> None:
        self.folder, self.manifest, self.policy = data.files, data.manifest, data.stream.views
        self.samples = [replace(sample, encoded=b"") for sample in data.samples]

    def __getitem__(self, place: tuple[int, int, int]) -> tuple[Any, ...]:
        shard, row, index = place
        sample = self.samples[shard * SHARD + row]
        view = make_view(self.policy, sample.image_id, index)
        picture = decode_image((self.folder / sample.file_name).read_bytes(), sample.file_name)
        single, size = ~sample.iscrowd, (sample.width, sample.height)
        boxes, kept = view_boxes(sample.boxes_xyxy[single], *size, view, self.policy.min_visible)
        labels = label_index(self.manifest, sample.category_ids[single][kept])
        return view_image(picture, view, RESIZE), boxes, labels, sample.image_id, size[::-1], place


def collate(items: Sequence[tuple[Any, ...]]) -> dict[str, torch.Tensor]:
    """The arrays of `BatchLoader.load`, as tensors: those a DataLoader passes on in shared memory, arrays it pickles."""
    pixels, boxes, labels, image_ids, original_sizes, places = zip(*items, strict=True)
    images, sizes = pad(pixels)
    counts, rows = np.array([len(one) for one in labels], np.int32), np.array(places, np.int32)
    arrays = {"images": images, "sizes": sizes, "counts": counts, "image_ids": np.array(image_ids)}
    arrays |= {"original_sizes": np.array(original_sizes, np.int32), "positions": rows[:, :2], "views": rows[:, 2]}
    ragged = {"boxes_cxcywh": boxes, "labels": labels}
    padded = {name: pad_sequence([*map(torch.from_numpy, each)], batch_first=True) for name, each in ragged.items()}
    return padded | {name: torch.from_numpy(array) for name, array in arrays.items()}


def data_loader(data: Data) -> Iterator[Any]:
    """One epoch by one process. Not forked: this process has Ray's threads."""
    order = [[tuple(row) for row in rows.tolist()] for rows in data.rows]
    batches: Any = DataLoader(
        Files(data), batch_sampler=order, num_workers=1, collate_fn=collate, multiprocessing_context="forkserver"
    )
    return iter(batches)


def ray_stream(config: StreamConfig) -> Iterator[Any]:
    shares = open_stream(config, 0, world_size=1, rank=0, readers=Readers())
    return ({name: each for name, each in share.arrays.items() if name != LOADER_ROWS} for share in shares)


def in_two_processes(data: Data, rounds: int) -> tuple[list[Ratio], list[tuple[str, str]], Difference]:
    """Images/s through Ray over a DataLoader's, and what else is told of both."""
    passes: dict[str, list[Pass]] = {"Ray": [], "DataLoader": []}
    sides: dict[str, Callable[[], Iterator[Any]]] = {"Ray": partial(ray_stream, data.stream)}
    sides["DataLoader"] = partial(data_loader, data)
    with timing.StorePeak() as peak:
        for number in range(rounds):
            for name in sorted(sides, reverse=number % 2 == 0):
                passes[name].append(timing.watch(sides[name], timing.checksum))
        # Ray's batches come in runs: from the end of one, the count of those that follow is exact.
        length = data.stream.range_length(1)
        first = -(-WARM_UP // length) * length - 1
        fps = {name: [one.speed(BATCH, first) for one in each] for name, each in passes.items()}
        step = BATCH / (PACE * statistics.median(fps["DataLoader"]))
        paced = {name: timing.watch(side, timing.checksum, step) for name, side in sides.items()}
    kept = timing.watch(partial(ray_stream, data.kept), timing.checksum)
    words = "Ray Data / DataLoader, one process each"
    ratio = timing.speeds_ratio(words, fps["Ray"], fps["DataLoader"], DATALOADER_GOAL)
    again = f"{kept.speed(BATCH, len(data.rows) - 1):.0f} images/s"
    told = [("Ray: steps in a block", str(length)), ("Ray, 2nd epoch, views kept in memory", again)]
    for name, each in passes.items():
        waits = [*chain.from_iterable(one.waits[WARM_UP:] for one in each)]
        told += [
            (f"{name}: time to the first batch", f"{statistics.median(one.arrivals[0] for one in each):.1f} s"),
            (f"{name}: wait for the next batch, p50 / p99", timing.p50_p99(waits)),
            (f"{name}: the same, a step taking {1000 * step:.0f} ms", timing.p50_p99(paced[name].waits[WARM_UP:])),
        ]
    told.append(("Ray: most of the object store in use", f"{peak.bytes / 2**20:.0f} MiB"))
    expected = passes["DataLoader"][0].results
    seen = [*chain.from_iterable(passes.values()), *paced.values()]
    differing = sum(a != b for one in seen for a, b in zip(one.results, expected, strict=True))
    return [ratio], told, Difference("batches: Ray's against the DataLoader's", differing, 0)


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run a command line, print and return what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=512, help="of one epoch; at least 128")
    parser.add_argument("--rounds", type=int, default=3, help="all sides are measured so many times")
    parser.add_argument("--synthetic", action="store_true", help="made-up pictures even if there are photographs")
    parser.add_argument("--no-ray", action="store_true", help="only what runs in this process")
    parser.add_argument("--quick", action="store_true", help="one shard of synthetic pictures, one round")
    given = parser.parse_args(arguments)
    images, rounds = (SHARD, 1) if given.quick else (given.images, given.rounds)
    torch.set_num_threads(1)
    report = Report("Loading: images/s of qskd over others' (higher is better)")
    with tempfile.TemporaryDirectory(prefix="qskd-loader-") as folder:
        data = make_data(pictures := Pictures(images, given.synthetic or given.quick), Path(folder))
        size_kb = statistics.mean(len(sample.encoded) for sample in data.samples) / 1000
        report.ratios, difference = in_one_process(data, rounds)
        report.differences = [difference]
        report.figures = [("BatchLoader, 2nd epoch, views kept in memory", f"{kept_speed(data):.0f} images/s")]
        if not given.no_ray:
            start_ray()
            found, told, difference = in_two_processes(data, rounds)
            report.ratios += found
            report.figures += told
            report.differences.append(difference)
    report.facts = [
        timing.machine("ray", "pillow", "numpy", "pyarrow") + f", {timing.load_note()}",
        f"{images} images an epoch of {pictures.source}, {size_kb:.0f} kB each; shards and shuffling windows of {SHARD}",
        f"batch {BATCH}, shorter side {RESIZE.size}, flips; encoded rows kept, decoded views not, unless said",
    ]
    report.print()
    return report


if __name__ == "__main__":
    sys.exit(main().exit_code)
