"""Shards are the same byte for byte whatever the number of processes, and nothing half-written stays, however it ends."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qskd.datasets import packing
from qskd.datasets.findings.leaving_out import without
from qskd.datasets.formats.opening import open_dataset
from qskd.datasets.manifest import Manifest, load_manifest
from qskd.datasets.pictures import helpers
from qskd.datasets.pictures.reader import PictureReader
from qskd.datasets.shards import verify, write_shards
from qskd.errors import QskdError

ROOT = Path(__file__).parents[1]
COUNT = 150  # images: three parts


def picture(path: Path, number: int, orientation: int = 1, size: tuple[int, int] = (24, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def coco(folder: Path, broken: tuple[int, ...] = (), turned: bool = True) -> tuple[Path, Path]:
    """COUNT images, every seventh turned, some square ones that only the others' sizes explain. broken: those that are cut off."""
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number in range(COUNT):
        orientation = 6 if turned and number % 7 == 3 else 1
        size = (20, 20) if number % 35 == 3 else (24, 16)
        path = folder / "images" / f"{number:03d}.jpg"
        picture(path, number, orientation, size)
        if number in broken:
            path.write_bytes(path.read_bytes()[:200])
        images.append({"id": 3 * number + 1, "file_name": path.name, "width": size[0], "height": size[1]})
        for extra in range(number % 3):
            box = [extra, 1, 5 + number % 7, 6.5]
            boxes.append(
                {
                    "id": len(boxes),
                    "image_id": 3 * number + 1,
                    "category_id": extra % 2,
                    "bbox": box,
                    "iscrowd": extra // 2,
                }
            )
    boxes = boxes[::2] + boxes[1::2]  # an image's objects are not together
    document = {
        "annotations": boxes,
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
        "images": images,
    }
    (folder / "a.json").write_text(json.dumps(document))
    return folder / "a.json", folder / "images"


def yolo(folder: Path) -> tuple[Path, None]:
    for number in range(COUNT):
        picture(folder / f"images/train/{number:03d}.jpg", number, 6 if number % 5 == 0 else 1)
        (folder / "labels/train").mkdir(parents=True, exist_ok=True)
        (folder / f"labels/train/{number:03d}.txt").write_text("1 0.5 0.5 0.25 0.5\n" * (number % 2))
    (folder / "data.yaml").write_text("names: [cat, dog]\ntrain: images/train\n")
    return folder / "data.yaml", None


def voc(folder: Path) -> tuple[Path, None]:
    (folder / "Annotations").mkdir(parents=True)
    for number in range(COUNT):
        picture(folder / f"JPEGImages/{number:03d}.jpg", number)
        box = f"<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>{8 + number % 8}</ymax></bndbox>"
        text = f"<annotation><filename>x.jpg</filename><object><name>cat</name>{box}</object></annotation>"
        (folder / f"Annotations/{number:03d}.xml").write_text(text)
    return folder, None


def embedded(folder: Path) -> tuple[Path, None]:
    rows = []
    for number in range(COUNT):
        picture(folder / "one.png", number)
        objects = {"bbox": [[1.0, 2.0, 5.0, 6.0]], "category": [number % 2]}
        rows.append({"image": {"bytes": (folder / "one.png").read_bytes(), "path": "x.png"}, "objects": objects})
    classes = {"feature": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "_type": "Sequence"}
    features = {"image": {"_type": "Image"}, "objects": {"bbox": {}, "category": classes}}
    schema = pa.Table.from_pylist(rows).schema.with_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    (folder / "one.png").unlink()
    for number, (first, stop) in enumerate(((0, 70), (70, COUNT))):  # two files, several row groups each
        pq.write_table(
            pa.Table.from_pylist(rows[first:stop], schema), folder / f"train-{number}.parquet", row_group_size=33
        )
    return folder, None


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two helpers are worth their start for few images too."""
    monkeypatch.setattr(packing, "FEWEST", 40)


def make(
    source: tuple[Path, Path | None],
    to: Path,
    processes: int,
    on_error: Any = "stop",
    leave_out: tuple[str, ...] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    dataset = without(open_dataset(source[0], source[1], on_error), leave_out)
    return write_shards(dataset, str(to), 50, 16, progress=progress, processes=processes)


def assert_same(one: Path, other: Path) -> None:
    names = sorted(os.listdir(one))
    assert names == sorted(os.listdir(other))
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("kind", [coco, yolo, voc, embedded])
def test_shards_and_manifest_are_the_same_byte_for_byte_with_helpers(
    kind: Callable[[Path], tuple[Path, Path | None]], tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a thread, as in a notebook, or in a Ray job's driver. Progress comes in steps of a part and reaches the end."""
    (tmp_path / "data").mkdir()
    source = kind(tmp_path / "data")
    asked: list[str] = []
    real = helpers.Helpers.ask
    monkeypatch.setattr(
        helpers.Helpers,
        "ask",
        lambda self, function, *rest: asked.append(function.__name__) or real(self, function, *rest),
    )  # type: ignore[func-returns-value]
    make(source, tmp_path / "one", 1)
    assert asked == []
    seen: list[tuple[int, int]] = []
    thread = threading.Thread(target=lambda: make(source, tmp_path / "two", 2, progress=lambda *at: seen.append(at)))
    thread.start()
    thread.join(60)
    assert_same(tmp_path / "one", tmp_path / "two")
    assert {"examine", "write"} == set(asked)
    assert seen[-1] == (COUNT, COUNT)
    assert kind is embedded or seen == [(64, COUNT), (128, COUNT), (COUNT, COUNT)]
    verify(str(tmp_path / "two"))


def test_broken_pictures_and_categories_left_out_are_the_same_with_helpers(tmp_path: Path, few: None) -> None:
    source = coco(tmp_path, broken=(0, 60, 61, 99, 149))
    for processes in (1, 2):
        manifest = make(source, tmp_path / str(processes), processes, "skip", ("dog",))
    assert_same(tmp_path / "1", tmp_path / "2")
    assert manifest.shard_rows == (50, 50, 45)
    assert len(manifest.problems) == 6
    found = []
    for processes in (1, 2):
        with pytest.raises(QskdError) as caught:
            make(source, tmp_path / "stopped", processes)
        found.append(str(caught.value))
    assert found[0] == found[1]
    assert "000.jpg" in found[0]
    assert os.listdir(tmp_path / "stopped") == []
    (tmp_path / "images/001.jpg").unlink()
    (tmp_path / "images/001.jpg").symlink_to("/etc/hostname")
    with pytest.raises(
        QskdError, match=r"image 4 \(001.jpg\): file_name .* is a link to"
    ):  # refused even when skipping
        make(source, tmp_path / "stopped", 2, "skip")


def test_a_helper_that_is_killed_is_an_error_that_leaves_nothing(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "examine", _die)
    with pytest.raises(QskdError, match="was killed by signal 9"):
        make(coco(tmp_path), tmp_path / "s", 2)
    assert os.listdir(tmp_path / "s") == []


def _die(reader: PictureReader, part: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_picture_that_changes_between_its_two_readings_is_an_error(tmp_path: Path) -> None:
    dataset = open_dataset(*coco(tmp_path))
    reader = dataset.picture_reader
    found = reader.examine(next(dataset.parts(3)))
    names = [f"{number:03d}.jpg" for number in range(3)]
    assert [len(one) for one in reader.encoded(names, found.located, found.stamps).to_pylist()] == [
        s for _, s in found.stamps
    ]
    picture(tmp_path / "images/002.jpg", 99)
    with pytest.raises(QskdError, match=r"002\.jpg: the picture was changed"):
        reader.encoded(names, found.located, found.stamps)


SCRIPT = """
import sys, qskd.datasets.packing as packing
from pathlib import Path
from qskd.datasets.formats.opening import open_dataset
from qskd.datasets.shards import write_shards
packing.FEWEST = 40
print("begun", flush=True)
dataset = open_dataset(Path(sys.argv[1]), Path(sys.argv[2]))
def told(done, of):
    print(done, flush=True)
    sys.stdin.readline()  # and waits for the end, which would else come after the last shard now and then
write_shards(dataset, sys.argv[3], 50, 16, progress=told, processes=2)
"""


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGKILL])
def test_a_prepare_that_is_stopped_leaves_no_helper_and_no_manifest_and_the_next_one_is_whole(
    way: signal.Signals, tmp_path: Path
) -> None:
    """The script has no `if __name__ == "__main__"`: helpers do not run it again."""
    source, images = coco(tmp_path)
    (tmp_path / "s").mkdir()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(source), str(images), str(tmp_path / "s")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"  # once: no helper prints it
        assert process.stdout.readline() == b"64\n"
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.send_signal(way)
        # It may be about to read, too late to be interrupted: the end of what it reads lets it go on, to the interrupt.
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)
    deadline = time.monotonic() + 30
    while (alive := [pid for pid in children if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive == []
    if way == signal.SIGINT:
        assert os.listdir(tmp_path / "s") == []
    else:  # shards that were not whole
        assert list((tmp_path / "s").glob(".writing-*"))
    with pytest.raises(QskdError, match="no such file"):
        load_manifest(str(tmp_path / "s"))
    make((source, images), tmp_path / "s", 1)
    verify(str(tmp_path / "s"))
    assert list((tmp_path / "s").glob(".writing-*")) == []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_small_dataset_and_one_core_start_no_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "Helpers", lambda *_: pytest.fail("a helper was started"))
    make(coco(tmp_path), tmp_path / "small", 8)
    monkeypatch.setattr(packing, "FEWEST", 40)
    make((tmp_path / "a.json", tmp_path / "images"), tmp_path / "one", 1)
    assert packing.cores() >= 1
