"""What `qskd predict` takes, and what it leaves: results with the dataset's own ids, pictures, videos; nothing else is touched."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from strangers import NOTES, refused, tree
from tiny import recipe, shake, silent_student
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.demo.quickstart import TEACHER
from pipelines.inspection.evaluate import evaluate
from pipelines.inspection.predict import predict_all, request, targets
from pipelines.inspection.results import CSV_FILE, JSON_FILE, Prediction, told
from pipelines.inspection.sources import files_of
from pipelines.prepare import prepare
from qskd.config import ResizeConfig
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.detectors import load_detector, save_detector
from qskd.errors import QskdError
from qskd.evaluation.detections import Detections

IDS = (40, 7, 90)
NAMES = ("cat", "a|b, \n“c”", "猫")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that keeps its dataset's ids; all scores are near one half."""
    folder = tmp_path_factory.mktemp("predict") / "model"
    made = silent_student(recipe().student, NAMES, 1).eval()
    shake(made, 1)
    made.category_ids = IDS
    save_detector(made, folder, ResizeConfig(size=64))
    return folder


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (90, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def ran(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_files_folders_and_patterns_give_the_same_images_and_never_what_was_drawn_before(
    model: Path, tmp_path: Path
) -> None:
    names = ["a[1].jpg", "b.PNG", "c.webp"]
    photos = [draw(tmp_path / name) for name in names]
    draw(tmp_path / "deep/er/d.jpg")
    (tmp_path / "notes.txt").write_bytes(NOTES)
    assert files_of([tmp_path]) == sorted(photos)
    assert files_of([tmp_path / "*.jpg", tmp_path / "a[1].jpg"]) == [photos[0]]
    assert files_of([tmp_path / "**/*.jpg"]) == [photos[0], tmp_path / "deep/er/d.jpg"]
    ran(model, tmp_path, "--threshold", 0)
    assert {path.name for path in tmp_path.glob("*.boxes.png")} == {"a[1].boxes.png", "b.boxes.png", "c.boxes.png"}
    theirs = draw(tmp_path / "my.boxes.png")  # not drawn by us
    assert files_of([tmp_path]) == sorted([*photos, theirs])
    for nothing in (tmp_path / "deep", tmp_path / "*.gif"):
        with pytest.raises(QskdError, match="no images or videos"):
            files_of([nothing])


def test_results_carry_the_ids_that_the_student_keeps_and_the_terminal_labels_and_scores(
    model: Path, tmp_path: Path
) -> None:
    for name in ("000000000139.png", "17.png"):
        draw(tmp_path / "photos" / name, seed=len(name))
    said = ran(model, tmp_path / "photos", "--out", tmp_path / "out", "--threshold", 0)
    results = json.loads((tmp_path / "out" / JSON_FILE).read_text())
    rows = list(csv.DictReader((tmp_path / "out" / CSV_FILE).open()))
    ((first,), _), ((second,), _) = predict_all(request(str(model), [tmp_path / "photos"], tmp_path / "out", 0.0))
    found = [*zip([139] * 99, first.found.category_ids, first.found.scores, first.found.boxes_xyxy, strict=False)]
    found += [*zip([17] * 99, second.found.category_ids, second.found.scores, second.found.boxes_xyxy, strict=False)]
    assert len(results) == len(rows) == len(found) > 20
    for result, row, (image_id, label, score, (left, top, right, bottom)) in zip(results, rows, found, strict=True):
        assert (result["image_id"], result["category_id"]) == (image_id, IDS[label])
        assert result["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=2e-3)
        assert result["score"] == pytest.approx(score, abs=1e-6)
        assert (int(row["image_id"]), int(row["category_id"])) == (image_id, IDS[label])
        assert row["category"] == NAMES[label]
        assert [float(row[side]) for side in ("left", "top", "width", "height")] == result["bbox"]
    best = first.found
    assert f"{len(best.scores)} objects: " in said
    assert f" {best.scores[0]:.2f}, " in said
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"000000000139.boxes.png", "17.boxes.png"}


def test_results_on_a_dataset_have_the_ap_that_evaluate_finds(tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, images = make_shapes(ShapesConfig(images=4, classes="hard"), tmp_path / "coco")
    prepare(annotations, images, str(tmp_path / "shards"), quiet=True)
    options = ("--out", tmp_path / "out", "--threshold", 0, "--no-pictures", "--annotations", annotations)
    ran(TEACHER, images, *options)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CSV_FILE, JSON_FILE]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        run = COCOeval(truth, truth.loadRes(str(tmp_path / "out" / JSON_FILE)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    said = evaluate(str(TEACHER), str(tmp_path / "shards"), workers=0)
    assert run.stats[0] > 0.3
    assert run.stats[0] == pytest.approx(said.metrics["AP"], abs=1e-4)


def test_annotations_that_do_not_fit_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    photo = draw(tmp_path / "photos/1.png")
    other = tmp_path / "instances.json"
    cases = {
        "0 images of this name": {
            "images": [{"id": 1, "file_name": "2.png"}],
            "categories": [{"id": 4, "name": "cat"}],
        },
        "none of its categories": {"images": [{"id": 1, "file_name": "1.png"}], "categories": [{"id": 4, "name": "x"}]},
        "`images` is no list": {"categories": []},
        "an id and a name": {"images": [], "categories": [{"id": "4", "name": "cat"}]},
    }
    for words, document in cases.items():
        other.write_text(json.dumps(document))
        with pytest.raises(QskdError, match=words):
            ran(model, photo, "--out", tmp_path / "out", "--annotations", other)
    other.write_text(
        json.dumps({"images": [{"id": 77, "file_name": "photos/1.png"}], "categories": [{"id": 4, "name": "cat"}]})
    )
    ran(model, photo, "--out", tmp_path / "out", "--annotations", other, "--threshold", 0)
    results = json.loads((tmp_path / "out" / JSON_FILE).read_text())
    assert {(one["image_id"], one["category_id"]) for one in results} == {(77, 4)}  # the other labels are left out


def test_a_model_without_ids_is_said_to_number_its_labels(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(model, tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "dataset_category_ids"})
    )
    draw(tmp_path / "b.png")
    draw(tmp_path / "a.png")
    ran(tmp_path / "model", tmp_path / "a.png", tmp_path / "b.png", "--out", tmp_path / "out", "--threshold", 0)
    results = json.loads((tmp_path / "out" / JSON_FILE).read_text())
    assert {one["category_id"] for one in results} == {0, 1, 2}
    assert {(one["file_name"], one["image_id"]) for one in results} == {("a.png", 1), ("b.png", 2)}
    assert "keeps no category ids" in caplog.text


def test_inputs_of_one_name_keep_their_places_in_the_output_folder(model: Path, tmp_path: Path) -> None:
    for name in ("one/1.png", "two/1.png", "three/3.png"):
        draw(tmp_path / name)
    ran(model, tmp_path / "one", tmp_path / "three", "--out", tmp_path / "flat")
    assert {name for name in tree(tmp_path / "flat") if name.endswith(".png")} == {"1.boxes.png", "3.boxes.png"}
    ran(model, tmp_path / "one", tmp_path / "two", "--out", tmp_path / "out")
    assert {name for name in tree(tmp_path / "out") if name.endswith(".png")} == {"one/1.boxes.png", "two/1.boxes.png"}


def test_pictures_that_differ_in_their_ending_alone_are_all_drawn(model: Path, tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp", "b.png"):
        draw(tmp_path / "photos" / name)
    ran(model, tmp_path / "photos", "--out", tmp_path / "out")
    drawn = {name for name in tree(tmp_path / "out") if name.endswith(".png")}
    assert drawn == {"a.png.boxes.png", "a.bmp.boxes.png", "b.boxes.png"}


def test_a_broken_image_among_others_is_left_out_and_named_at_the_end(model: Path, tmp_path: Path) -> None:
    for name in ("a.png", "c.png"):
        draw(tmp_path / "photos" / name)
    for name in ("b.png", "\u200eleft.png", "live.mov"):  # a name that is not shown as it is; a video that is none
        (tmp_path / "photos" / name).write_bytes(NOTES)
    with pytest.raises(QskdError, match=r"3 of 5 inputs: can't be read: .*b\.png"):
        ran(model, tmp_path / "photos", "--out", tmp_path / "out", "--threshold", 0)
    results = json.loads((tmp_path / "out" / JSON_FILE).read_text())
    assert {one["file_name"] for one in results} == {"a.png", "c.png"}


def test_results_replace_only_results(model: Path, tmp_path: Path) -> None:
    photo = draw(tmp_path / "photos/1.png")
    for _ in range(2):
        ran(model, photo, "--out", tmp_path / "out")
    for name in (JSON_FILE, CSV_FILE):
        (tmp_path / name[-3:]).mkdir()
        (tmp_path / name[-3:] / name).write_bytes(NOTES)
        refused(lambda name=name: ran(model, photo, "--out", tmp_path / name[-3:]), "is there already", tmp_path)  # type: ignore[misc]
    refused(lambda: ran(model, photo, "--no-pictures"), "no --out folder", tmp_path)
    ran(model, photo, "--out", tmp_path / "one.png")  # a picture's name is a picture
    assert (tmp_path / "one.png").is_file()


def test_what_is_told_of_an_image_is_bounded() -> None:
    many = Detections(
        np.zeros(20, np.int64), np.zeros((20, 4), np.float32), np.linspace(1, 0, 20), np.zeros(20, np.int64)
    )
    assert told(Prediction(Path("a"), None, many), NAMES).endswith("cat 0.63, and 12 more")
    assert told(Prediction(Path("a"), None, Detections.empty()), NAMES) == "nothing"


# --- videos -------------------------------------------------------------------------------------------------------------
def film(path: Path, count: int = 6, size: tuple[int, int] = (96, 64), turned: int = 0) -> Path:
    """Frame number n is a grey of 40 * n, its upper left corner white."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        for number in range(count):
            pixels = np.full((size[1], size[0], 3), 40 * number, np.uint8)
            pixels[: size[1] // 2, : size[0] // 2] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_frames_of_a_video_are_its_pictures_in_order(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from pipelines.inspection.videos import frame_rate, frames

    video = film(tmp_path / "clip.mp4")
    found = list(frames(video))
    assert [frame.index for frame in found] == [0, 1, 2, 3, 4, 5]
    assert [round(frame.seconds, 2) for frame in found] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    for frame in found:
        assert frame.pixels.shape == (64, 96, 3)
        assert frame.pixels[48:].mean() == pytest.approx(40 * frame.index, abs=4)
        assert frame.pixels[8:24, 8:40].mean() > 245
    assert [frame.index for frame in frames(video, every=4)] == [0, 4]
    assert frame_rate(video) == 5


def test_frames_of_a_telephones_video_are_upright(tmp_path: Path) -> None:
    """Held upright it stores lying frames, and says in the track's matrix (ISO 14496-12, tkhd) that they are to be turned."""
    pytest.importorskip("av")
    from pipelines.inspection.videos import frames

    video = film(tmp_path / "clip.mp4", count=2)
    data = bytearray(video.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix comes after 40 bytes
    one = 0x10000
    assert struct.unpack(">9i", data[at : at + 36]) == (one, 0, 0, 0, one, 0, 0, 0, 0x40000000)
    data[at : at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 64 * one, 0, 0x40000000)  # a quarter turn clockwise
    video.write_bytes(data)
    for frame in frames(video):
        assert frame.pixels.shape == (96, 64, 3)
        assert frame.pixels[8:40, 40:56].mean() > 245  # what was above on the left is above on the right
        assert frame.pixels[8:40, 8:24].mean() < 50


def test_a_video_is_drawn_and_its_frames_are_in_the_results(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    from pipelines.inspection.videos import frame_rate, frames

    photo = draw(tmp_path / "in/5.png")
    clip = film(tmp_path / "in/clip.mp4")
    ran(model, clip, "--threshold", 0)
    assert (tmp_path / "in/clip.boxes.mp4").is_file()  # not an input of the next, which is given its folder
    for _ in range(2):  # its own is replaced
        said = ran(model, tmp_path / "in", "--out", tmp_path / "out", "--threshold", 0, "--every", 2)
    assert "3 frames: " in said
    assert [frame.index for frame in frames(tmp_path / "out/clip.boxes.mp4")] == [0, 1, 2]
    assert frame_rate(tmp_path / "out/clip.boxes.mp4") == 2.5
    rows = list(csv.DictReader((tmp_path / "out" / CSV_FILE).open()))
    assert [row["frame"] for row in rows if row["file"] == str(photo)][:1] == [""]
    of_video = {(row["frame"], row["seconds"], int(row["image_id"])) for row in rows if row["file"] == str(clip)}
    assert {frame for frame, _, _ in of_video} == {"0", "2", "4"}
    assert {seconds for _, seconds, _ in of_video} == {"0.0", "0.4", "0.8"}
    ids = sorted(number for _, _, number in of_video)
    assert [number - ids[0] for number in ids] == [0, 2, 4]
    assert len({row["image_id"] for row in rows}) == 4


def test_a_video_replaces_neither_an_input_nor_a_strangers_file_and_a_broken_one_is_named(
    model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("av")
    clip, theirs = film(tmp_path / "clip.mp4"), film(tmp_path / "clip.boxes.mp4")
    assert files_of([tmp_path]) == [theirs, clip]
    refused(lambda: ran(model, clip), "is there already", tmp_path)
    refused(lambda: ran(model, clip, "--out", clip), "is an input", tmp_path)
    theirs.write_bytes(NOTES)
    refused(lambda: ran(model, clip), "is there already", tmp_path)
    (tmp_path / "broken.mp4").write_bytes(NOTES)
    refused(lambda: ran(model, tmp_path / "broken.mp4"), "can't be read", tmp_path)
    theirs.unlink()
    clip.write_bytes(clip.read_bytes()[:-700])  # cut short
    before = set(tmp_path.iterdir())
    with contextlib.suppress(QskdError):
        ran(model, clip)
    assert {path.name for path in set(tmp_path.iterdir()) - before} <= {"clip.boxes.mp4"}


def test_a_video_is_not_written_under_a_pictures_name_nor_a_picture_under_a_videos(tmp_path: Path) -> None:
    for image, out, remedy in (("a.mp4", "boxes.png", "boxes.mp4"), ("a.png", "boxes.mp4", "boxes.png")):
        with pytest.raises(QskdError, match=rf"what to do: --out .*{remedy}"):
            targets([tmp_path / image], tmp_path / out)
        assert targets([tmp_path / image], tmp_path / remedy) == [(tmp_path / image, tmp_path / remedy)]


def test_a_video_without_pyav_is_told_what_to_install(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip.mp4").write_bytes(NOTES)
    monkeypatch.setitem(sys.modules, "av", None)  # as where it is not installed
    error = refused(lambda: ran(model, tmp_path), "PyAV is not installed", tmp_path)
    assert "qskd[video]" in error.remedy


def test_names_of_a_detector_survive_its_folder(model: Path) -> None:
    assert load_detector(model).labels == NAMES
