"""`qskd prepare` on all cores over one, and what a large COCO JSON takes to read.

python -m benchmarks.prepare --coco FOLDER                 photographs of COCO (annotations/instances_train2017.json, train2017/)
python -m benchmarks.prepare                               made-up pictures of COCO's size
python -m benchmarks.prepare --annotations 10000000        a generated JSON of as many annotations: memory and time to read it

Rates are images/s of looking at pictures and writing shards, reading the annotations not counted; one process and all of them take
turns, and the ratio is of one round. Where other programs keep the cores busy, wall time says little: CPU seconds are printed too,
the helpers' included. On cores of their own, helpers can reach `cores` times the ratio of CPU seconds of one over all, less the
seconds that they take to start.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.timing import Ratio, Report, load_note, machine, ratios
from qskd.datasets.coco import read_coco
from qskd.datasets.packing import cores
from qskd.datasets.shards import write_shards

SIZE = (640, 480)
OBJECTS365 = 1_700_000  # images
# Not ru_maxrss, which a process takes over from the one that started it.
_READ = """
import json, sys, time
from pathlib import Path
from qskd.datasets.coco import read_coco
begun = time.process_time()
dataset = read_coco(Path(sys.argv[1]), Path(sys.argv[1]).parent)
read_s, findings = time.process_time() - begun, dataset.findings
peak_kib = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([read_s, int(peak_kib) / 1024, dataset.listed_objects, len(dataset)]))
"""


def made_up(folder: Path) -> tuple[dict[str, Any], Path]:
    """A few pictures as large in pixels and bytes as COCO's, and what COCO's JSON would say of them."""
    rng, pictures = np.random.default_rng(0), folder / "made-up"
    pictures.mkdir()
    images, boxes = [], []
    for number in range(24):
        rough = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
        noisy = np.asarray(rough, np.int16) + rng.integers(-24, 25, (SIZE[1], SIZE[0], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(pictures / f"{number}.jpg", quality=85)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": SIZE[0], "height": SIZE[1]})
        boxes += [
            {"image_id": number, "category_id": 1, "bbox": [9 * k + 1, 5, 50, 60], "iscrowd": 0} for k in range(7)
        ]
    return {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}, pictures


def repeated(tree: dict[str, Any], pictures: Path, count: int, folder: Path) -> tuple[Path, Path]:
    """`count` images under names of their own, those of `tree` over and over: (its JSON, its pictures)."""
    (folder / "images").mkdir()
    own: dict[int, list[dict[str, Any]]] = {}
    for entry in tree["annotations"]:
        own.setdefault(entry["image_id"], []).append(entry)
    images, boxes = [], list[dict[str, Any]]()
    for number in range(count):
        image = tree["images"][number % len(tree["images"])]
        name = f"{number:08d}{Path(image['file_name']).suffix}"
        (folder / "images" / name).write_bytes((pictures / image["file_name"]).read_bytes())
        images.append({**image, "id": number, "file_name": name})
        for entry in own.get(image["id"], []):
            boxes.append({**entry, "id": len(boxes), "image_id": number})
    path = folder / "a.json"
    path.write_text(json.dumps({**tree, "images": images, "annotations": boxes}))
    return path, folder / "images"


class Taken(NamedTuple):
    wall_s: float
    cpu_s: float


def write(annotations: Path, images: Path, to: Path, processes: int) -> Taken:
    """Of all but reading the annotations. cpu_s: the helpers' too."""
    dataset = read_coco(annotations, images)
    before, begun = _cpu_s(), time.perf_counter()
    write_shards(dataset, str(to), processes=processes)
    return Taken(time.perf_counter() - begun, _cpu_s() - before)


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def starting() -> float:
    """CPU seconds until a helper can be asked for something."""
    code = "import qskd.datasets.packing, qskd.datasets.pictures.helpers"
    before = _cpu_s()
    subprocess.run([sys.executable, "-c", code], check=True)
    return _cpu_s() - before


def large_json(count: int, path: Path) -> None:
    """COCO's fields but outlines, fifteen objects an image, as Objects365 has."""
    rng, images = random.Random(0), max(1, count // 15)
    with path.open("w") as file:
        file.write('{"info": {}, "licenses": [], "images": [')
        for number in range(images):
            image = {"license": 4, "file_name": f"{number:012d}.jpg", "height": 480, "width": 640, "id": number}
            file.write((", " if number else "") + json.dumps(image | {"date_captured": "2013-11-14 11:18:45"}))
        file.write('], "annotations": [')
        some = []
        for number in range(997):
            x, y, w, h = (round(rng.uniform(1, 200), 2) for _ in range(4))
            box = {"segmentation": [], "area": round(w * h, 4), "iscrowd": 0, "bbox": [x, y, w, h]}
            some.append(json.dumps(box | {"category_id": number % 80 + 1})[:-1])
        for number in range(count):
            rest = f', "image_id": {number % images}, "id": {number}}}'
            file.write((", " if number else "") + some[number % 997] + rest)
        names = [{"id": number + 1, "name": f"class {number}"} for number in range(80)]
        file.write(f'], "categories": {json.dumps(names)}}}')


def figures_of_json(count: int, folder: Path) -> list[tuple[str, str]]:
    path = folder / "large.json"
    large_json(count, path)
    said = subprocess.run([sys.executable, "-c", _READ, str(path)], check=True, capture_output=True, text=True).stdout
    read_s, peak, objects, images = json.loads(said)
    size = path.stat().st_size / 2**20
    return [
        (f"JSON of {objects} annotations, {images} images", f"{size:.0f} MiB"),
        ("  peak memory of reading it, findings included", f"{peak:.0f} MiB"),
        ("  CPU time of reading it", f"{read_s:.1f} s ({1e6 * read_s / objects:.1f} us an annotation)"),
    ]


def rates(report: Report, source: tuple[Path, Path], count: int, rounds: int, folder: Path) -> None:
    every, taken = cores(), dict[int, list[Taken]]()
    for _ in range(rounds):
        for processes in (1, every):
            taken.setdefault(processes, []).append(write(*source, folder / str(processes), processes))
    one, all_ = taken[1], taken[every]
    manifests = [(folder / str(processes) / "manifest.json").read_bytes() for processes in (1, every)]
    if manifests[0] != manifests[1]:
        raise SystemExit("WRONG: the shards differ with the number of processes")
    rate = [[count / each.wall_s for each in side] for side in (all_, one)]
    per_core = [value / every for value in rate[0]]
    figures = f"{statistics.median(rate[0]):.0f} and {statistics.median(rate[1]):.0f} images/s"
    report.ratios.append(
        Ratio(f"{every} process(es) / ({every} x one)", ratios(per_core, rate[1]), figures, at_least=0.9)
    )
    cpu = [[each.cpu_s for each in side] for side in (one, all_)]
    milliseconds = [1000 * statistics.median(side) / count for side in cpu]
    words = f"{milliseconds[0]:.2f} and {milliseconds[1]:.2f} ms an image"
    report.ratios.append(Ratio("the same by CPU seconds: one / all", ratios(*cpu), words))
    start_s = starting()
    steady = [(seconds - every * start_s) for seconds in cpu[1]]
    words = f"{1000 * statistics.median(steady) / count:.2f} ms an image"
    report.ratios.append(Ratio("  without the helpers' start", ratios(cpu[0], steady), words, at_least=0.9))
    hours = OBJECTS365 * statistics.median(steady) / count / 3600
    report.figures += [
        ("a helper's start", f"{start_s:.2f} CPU s"),
        (
            f"{OBJECTS365} such images by CPU seconds (arithmetic)",
            f"{hours:.2f} h on one core, {hours / 2:.2f} h on two",
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run a command line, print and return what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--coco", type=Path, help="a folder with annotations/instances_train2017.json and train2017/")
    parser.add_argument("--images", type=int, default=4096, help="in a round, of those there are over and over")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--annotations", type=int, default=200_000, help="in the large JSON; 0: leave that out")
    given = parser.parse_args(arguments)
    report = Report("qskd prepare", [machine("pyarrow", "pillow"), f"before: {load_note()}"])
    with tempfile.TemporaryDirectory(prefix="qskd-prepare-") as scratch:
        folder = Path(scratch)
        if given.coco:
            tree = json.loads((given.coco / "annotations" / "instances_train2017.json").read_text())
            source = repeated(tree, given.coco / "train2017", given.images, folder)
        else:
            source = repeated(*made_up(folder), given.images, folder)
        size = sum(path.stat().st_size for path in source[1].iterdir()) / given.images
        report.facts.append(f"{given.images} images of {size / 1000:.0f} kB on average, {cores()} core(s)")
        rates(report, source, given.images, given.rounds, folder)
        if given.annotations:
            report.figures += figures_of_json(given.annotations, folder)
    report.facts.append(f"after: {load_note()}")
    report.print()
    return report


if __name__ == "__main__":
    main()
