"""Export: the folder, what comes after the graph, and alone; what is refused. Graphs: test_export_graphs.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_detectors
import test_families
import tiny
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.demo.quickstart import TEACHER
from pipelines.deployment.export import ExportOptions, export, foresee, image_files, real_batches, square
from pipelines.inspection.evaluate import evaluate
from pipelines.inspection.predict import predict
from pipelines.prepare import prepare
from qskd.config import ResizeConfig, StudentConfig
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.deploy import onnx_detect
from qskd.deploy.export import (
    check_parity,
    compare,
    export_onnx,
    open_session,
    random_batches,
    require_parity,
    together,
)
from qskd.detectors import FAMILIES, Detector, load_detector, read_preprocessing, save_detector
from qskd.errors import QskdError

torch.set_num_threads(1)

SIZE = 64


def random_detector(kind: str) -> Detector:
    other = kind in ("conditional", "deformable", "refined", "two_stage")
    layers = 2  # a graph holds each of them
    return Detector((test_detectors if other else test_families).tiny_model(kind, layers=layers)).eval()


def test_what_torch_cannot_export_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = random_detector("conditional")

    def refuse(*_: Any, **__: Any) -> Any:
        return torch.fft.fftn(torch.zeros(2, 3)).abs(), torch.linalg.svdvals(torch.zeros(3, 3))

    monkeypatch.setattr(detector.model, "forward", refuse)
    with pytest.raises(QskdError, match=r"conditional_detr as ONNX: torch's torchscript exporter failed: .*\n.*dynamo"):
        export_onnx(detector, tmp_path / "model.onnx", SIZE)


def outputs_of(count: int, queries: int, slots: int, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return 3 * torch.randn(count, queries, slots), torch.rand(count, queries, 4)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", FAMILIES)
def test_boxes_are_those_of_transformers_own_post_processing(name: str, threshold: float) -> None:
    """40 queries of 7 classes: more pairs than the 100 that some families keep."""
    logits, boxes = outputs_of(2, 40, 7, 0)
    sizes = [(480, 640), (31, 17)]
    processor = FAMILIES[name].processor_class()
    said = SimpleNamespace(logits=logits, pred_boxes=boxes)
    theirs = processor.post_process_object_detection(said, threshold=threshold, target_sizes=sizes)
    mine = onnx_detect.boxes_of(logits.numpy(), boxes.numpy(), np.array(sizes), name, threshold)
    for found, expected in zip(mine, theirs, strict=True):
        order = expected["scores"].argsort(descending=True, stable=True)  # DETR's come in the order of its queries
        np.testing.assert_allclose(found["scores"], expected["scores"][order], atol=1e-6)
        np.testing.assert_array_equal(found["labels"], expected["labels"][order])
        np.testing.assert_allclose(found["boxes_xyxy"], expected["boxes"][order], rtol=1e-5, atol=1e-3)
        assert len(found["scores"]) > 10 or threshold == 0.9


def test_probabilities_of_extreme_logits_are_numbers() -> None:
    logits = np.array([[[-500.0, 0, 500], [90, -90, 1000]]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        sigmoid, softmax = (onnx_detect.probabilities_of(logits, name) for name in ("rt_detr", "detr"))
    np.testing.assert_allclose(sigmoid, torch.from_numpy(logits).sigmoid(), atol=1e-7)
    np.testing.assert_allclose(softmax, torch.from_numpy(logits).softmax(-1)[..., :-1], atol=1e-7)


def picture(path: Path, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).resize((120, 90)).save(path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's teacher, whose scores mean something."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    images = tuple(picture(folder.parent / f"{number}.png", number) for number in range(3))
    export(str(TEACHER), folder, ExportOptions(dynamic_batch=True, images=images, rounds=3))
    return folder


ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "qskd", "scipy", "onnx"):
            raise ImportError(name + " is not to be here")
sys.meta_path.insert(0, Refuse())
import runpy
for image in sys.argv[1:]:
    sys.argv = ["detect.py", image, "--threshold", "0.05"]
    runpy.run_path("detect.py", run_name="__main__")
    print("end")
assert not {"torch", "transformers", "qskd"} & set(sys.modules)
"""


def deep_and_turned(path: Path) -> Path:
    """12 bits in 16, stored a quarter turn away from upright."""
    grey = Image.open(picture(path)).convert("L").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 16).save(path, exif=exif)
    return path


def test_the_folder_detects_without_torch_and_finds_what_qskd_finds(exported: Path, tmp_path: Path) -> None:
    images = [picture(tmp_path / "photo.png"), deep_and_turned(tmp_path / "deep.png")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, *map(str, images)]
    done = subprocess.run(command, cwd=exported, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *said, rest = done.stdout.split("end\n")
    assert (len(said), rest) == (2, "")
    labels = load_detector(TEACHER).labels
    for image, lines in zip(images, said, strict=True):
        alone = [json.loads(line) for line in lines.splitlines()]
        found = predict(str(TEACHER), [image], tmp_path / "boxes.png", threshold=0.05)[0][1]
        assert len(found.scores) > 2
        assert [entry["label"] for entry in alone] == [labels[label] for label in found.category_ids]
        np.testing.assert_allclose([entry["score"] for entry in alone], found.scores, atol=1e-4)
        np.testing.assert_allclose([entry["box_xyxy"] for entry in alone], found.boxes_xyxy, atol=0.05)


def test_detect_gives_the_datasets_category_ids_where_the_folder_keeps_them(exported: Path, tmp_path: Path) -> None:
    image, folder = picture(tmp_path / "photo.png"), tmp_path / "exported"
    shutil.copytree(exported, folder)
    said = json.loads((folder / "config.json").read_text())
    assert not any("category_id" in entry for entry in onnx_detect.detect(folder, image, 0.05))
    said["dataset_category_ids"] = [100 + slot for slot in range(len(said["id2label"]))]
    (folder / "config.json").write_text(json.dumps(said))
    found = onnx_detect.detect(folder, image, 0.05)
    assert len(found) > 2
    assert [said["id2label"][str(entry["category_id"] - 100)] for entry in found] == [entry["label"] for entry in found]


def test_pixels_are_those_of_the_folders_own_processor(exported: Path, tmp_path: Path) -> None:
    image = Image.open(picture(tmp_path / "photo.png"))
    processor = AutoImageProcessor.from_pretrained(exported, backend="pil")
    expected = processor(images=image, return_tensors="np")["pixel_values"]
    said = json.loads((exported / "preprocessor_config.json").read_text())
    resized = np.asarray(image.resize((said["size"]["width"], said["size"]["height"]), Image.Resampling.BILINEAR))
    mine = onnx_detect.pixels_of(resized[None], said["image_mean"], said["image_std"])
    np.testing.assert_allclose(mine, expected, atol=1e-5)
    seen_as = read_preprocessing(exported)
    (name, ours), *others = real_batches([tmp_path / "photo.png"], seen_as, 2)
    assert (name, tuple(ours.shape), others) == ("photo.png", (2, 3, 64, 64), [])  # filled up
    np.testing.assert_allclose(ours[1:], expected, atol=1e-5)


def test_the_folder_is_the_same_detector_for_qskd_and_transformers(exported: Path, tmp_path: Path) -> None:
    assert {path.name for path in exported.iterdir()} >= {
        *("config.json", "model.safetensors", "preprocessor_config.json", "model.onnx", "detect.py", "README.md")
    }
    assert read_preprocessing(exported) == read_preprocessing(TEACHER)
    first, again = (load_detector(folder).model.state_dict() for folder in (TEACHER, exported))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    annotations, images = make_shapes(ShapesConfig(images=16), tmp_path / "coco")
    prepare(annotations, images, str(tmp_path / "shards"), quiet=True)
    before, after = (evaluate(str(folder), str(tmp_path / "shards"), workers=0) for folder in (TEACHER, exported))
    assert before.metrics == after.metrics
    assert before.metrics["AP"] > 0


def test_a_checkpoints_own_mean_and_deviation_stay(tmp_path: Path) -> None:
    source, own = tmp_path / "source", {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    save_detector(random_detector("conditional"), source, ResizeConfig(mode="shortest_edge", size=48), **own)
    with pytest.raises(QskdError, match=r"shortest edge of 48 pixels and padded\n.*one square size.*\n.*--size 48"):
        square(str(source), None)
    export(str(source), tmp_path / "out", ExportOptions(size=96, onnx=False))
    seen_as = read_preprocessing(tmp_path / "out")
    assert (seen_as.resize, seen_as.mean, seen_as.std) == (ResizeConfig(size=96), own["mean"], own["std"])
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_a_uri_is_exported_as_its_folder_is_and_named_as_it_was_given(tmp_path: Path) -> None:
    save_detector(random_detector("conditional"), tmp_path / "mine", ResizeConfig(size=64))
    there, options = (tmp_path / "mine").as_uri(), ExportOptions(onnx=False)
    assert foresee(there, tmp_path / "out", options).startswith(f"{there} → {tmp_path}/out: a Hugging Face folder")
    for model, out in ((there, "there"), (str(tmp_path / "mine"), "here")):
        export(model, tmp_path / out, options)
    names = sorted(file.name for file in (tmp_path / "here").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "there").iterdir())
    assert all((tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes() for name in names)
    (tmp_path / "mine" / "model.safetensors").unlink()
    with pytest.raises(QskdError) as told:
        export(there, tmp_path / "again", options)
    assert told.value.where == there  # not the copy, which the user never saw


def likeness() -> tuple[list[np.ndarray], list[np.ndarray]]:
    logits, boxes = (value.numpy() for value in outputs_of(2, 8, 5, 1))
    other = [logits + 1e-6, boxes.copy()]
    order = np.array([0, 1, 3, 2, 4, 5, 6, 7])
    other[0][1], other[1][1] = other[0][1][order], other[1][1][order]
    return [logits, boxes], other


def test_queries_that_changed_places_are_compared_with_their_likeness_where_order_means_nothing() -> None:
    mine, theirs = likeness()
    alike = compare("", mine, theirs, "rt_detr", reorder=True)
    assert alike.reordered == 2
    assert alike.worst < 1e-5
    assert alike.logits < 1e-5
    assert not compare("", mine, theirs, "conditional_detr", reorder=False).worst < 0.1


@pytest.mark.parametrize("wrong", [np.nan, 0.01])
def test_a_difference_is_refused_in_whatever_order(wrong: float) -> None:
    mine, theirs = likeness()
    theirs[1][0, 5, 2] += wrong
    found = compare("noise", mine, theirs, "rt_detr", reorder=True)
    with pytest.raises(QskdError, match=r"noise, 2 image\(s\): probabilities differ by \S+ and boxes by (nan|0.01)"):
        require_parity([together("noise", [found])], "rt_detr")
    assert np.isnan(found.worst) if np.isnan(wrong) else found.worst == pytest.approx(wrong, rel=1e-3)


def test_a_model_that_differs_leaves_nothing_behind(tmp_path: Path) -> None:
    save_detector(random_detector("conditional"), tmp_path / "source", ResizeConfig(size=SIZE))
    with pytest.raises(QskdError, match=r"at most 0\b"):
        export(str(tmp_path / "source"), tmp_path / "out", ExportOptions(tolerance=0.0, rounds=0))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_detector(random_detector("rt_detr"), tmp_path / "source", ResizeConfig(size=SIZE))
    source = str(tmp_path / "source")
    for options, complaint in (
        (ExportOptions(size=100), r"divisible by 16[\s\S]*--size 96$"),
        (ExportOptions(images=(tmp_path / "source",)), "no images"),
        (ExportOptions(images=(tmp_path / "gone.jpg",)), r"gone\.jpg: no such file or folder"),
        (ExportOptions(images=(tmp_path / "source" / "config.json",)), "not a readable image"),
        (ExportOptions(dynamic_batch=True, batch_size=4), "4, with --dynamic-batch, whose graph takes any number"),
        (ExportOptions(onnx=False, dynamic_batch=True, tolerance=0.1), "given with --dynamic-batch, --tolerance"),
        (ExportOptions(onnx=False, images=(tmp_path,), exporter="dynamo"), "given with --images, --exporter dynamo"),
    ):
        for ask in (export, foresee):
            with pytest.raises(QskdError, match=complaint):
                ask(source, tmp_path / "out", options)
    with pytest.raises(QskdError, match="the model's own folder"):
        export(source, tmp_path / "source", ExportOptions())
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, ["export", source, "--out", "x", "--exporter", "magic"])
    assert "torchscript or dynamo" in str(result.exception)


def test_dry_run_says_what_would_be_written_and_writes_nothing(tmp_path: Path) -> None:
    save_detector(random_detector("conditional"), tmp_path / "source", ResizeConfig(size=SIZE))
    picture(tmp_path / "photo.png")
    arguments = ["export", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--images", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "batch 1, images of 64 x 64 pixels, checked with noise and 1 image(s)" in " ".join(result.output.split())
    assert "any batch" in foresee(str(tmp_path / "source"), tmp_path / "out", ExportOptions(dynamic_batch=True))
    assert image_files([tmp_path]) == [tmp_path / "photo.png"]
    assert not (tmp_path / "out").exists()


def test_a_student_is_exported_as_it_was_trained(tmp_path: Path) -> None:
    """Thawed norms and dropped denoising parts are transformers' own again in the saved folder."""
    config = StudentConfig.model_validate({**tiny.STUDENT, "family": "d_fine", "feature_levels": 2})
    student = tiny.silent_student(config, tiny.LABELS, 0)
    tiny.shake(student, 1)
    save_detector(student, tmp_path / "student", ResizeConfig(size=SIZE), {"made": "here"})
    out = export(str(tmp_path / "student"), tmp_path / "out", ExportOptions(rounds=0))
    require_parity(check_parity(student, open_session(out / "model.onnx"), random_batches(SIZE, (1,))), "student")
    assert json.loads((out / "qskd.json").read_text())["made"] == "here"
