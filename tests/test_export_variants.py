"""INT8, float16 and OpenVINO: what is written, refused and measured. How far each is from float32: test_export_graphs.py."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from test_export import SIZE, random_detector
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.demo.quickstart import TEACHER
from pipelines.deployment.benchmark import BenchmarkOptions, benchmark
from pipelines.deployment.benchmark import foresee as foresee_benchmark
from pipelines.deployment.calibration import Calibration, images_to_calibrate
from pipelines.deployment.export import ExportOptions, export, foresee
from pipelines.deployment.found import show
from pipelines.deployment.tradeoff import points_of
from pipelines.deployment.variants import VariantOptions
from pipelines.inspection.evaluate import evaluate
from pipelines.prepare import prepare
from qskd.config import ResizeConfig
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.deploy import onnx_detect
from qskd.deploy.export import random_batches
from qskd.deploy.model_card import read_card
from qskd.deploy.runtimes import need_openvino
from qskd.deploy.side_by_side import Pictures, Truth, _detections, side_by_side
from qskd.deploy.variants import FLOAT16, FLOAT32, INT8, OPENVINO_FLOAT32, VARIANTS
from qskd.detectors import Preprocessing, save_detector
from qskd.errors import QskdError
from qskd.storage.ownership import is_own_picture

torch.set_num_threads(1)

needs_openvino = pytest.mark.skipif(  # importorskip would import it, and let it post what `need_openvino` switches off
    find_spec("openvino") is None, reason="an optional runtime: pip install -e '.[openvino]'"
)


def noise(count: int, seed: int) -> list[np.ndarray]:
    return [pixels.numpy() for _, pixels in random_batches(SIZE, (1,) * count, seed)]


@needs_openvino
def test_an_export_for_openvino_runs_there_and_in_detect(tmp_path: Path) -> None:
    asked = ExportOptions(rounds=0, variants=VariantOptions(openvino=True))
    out = export(source(tmp_path / "source"), tmp_path / "out", asked, Console(quiet=True))
    assert {path.name for path in out.glob("*openvino*")} == {"openvino_model.xml", "openvino_model.bin"}
    assert not (out / FLOAT16.file).exists()  # which it is made of, and nobody asked for
    card = read_card(out)
    assert card is not None
    assert card.variants is not None
    first, *others = card.variants.facts
    assert {fact.variant for fact in others} >= {OPENVINO_FLOAT32}  # float16 in the file, float32 at work
    assert first.variant == FLOAT32
    Image.new("RGB", (80, 60), "red").save(tmp_path / "photo.png")
    here, there = (
        onnx_detect.detect(out, tmp_path / "photo.png", 0.0, name) for name in (FLOAT32.file, OPENVINO_FLOAT32.file)
    )
    np.testing.assert_allclose(there[0]["box_xyxy"], here[0]["box_xyxy"], atol=0.5)
    assert there[0]["score"] == pytest.approx(here[0]["score"], abs=5e-3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    annotations, images = make_shapes(ShapesConfig(images=16), root / "coco")
    prepare(annotations, images, str(root / "val"), quiet=True)
    return root / "val"


@pytest.fixture(scope="module")
def exported(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's teacher, whose scores mean something, for two images at a time."""
    again = f"{shards}/../{shards.name}"  # the same folder
    asked = VariantOptions(int8=True, float16=True, calibration=(again,), evaluate=str(shards))
    out = tmp_path_factory.mktemp("variants") / "out"
    return export(str(TEACHER), out, ExportOptions(batch_size=2, rounds=1, variants=asked), Console(quiet=True))


def test_ap_of_each_file_stands_in_the_card_and_float32s_is_that_of_evaluate(exported: Path, shards: Path) -> None:
    card = read_card(exported)
    assert card is not None
    assert card.variants is not None
    one, int8, half = card.variants.facts
    assert [fact.variant for fact in card.variants.facts] == [FLOAT32, INT8, FLOAT16]
    assert one.metrics["AP"] == pytest.approx(evaluate(str(exported), str(shards), workers=0).ap, abs=1e-3)
    assert one.metrics["AP"] > 0.2
    for fact in (int8, half):
        assert fact.metrics["AP"] == pytest.approx(one.metrics["AP"], abs=0.05)
        assert fact.differences is not None
        assert fact.differences.images == 16
        assert fact.bytes == (exported / fact.variant.file).stat().st_size < one.bytes
    assert (one.ratio, one.differences) == (1.0, None)
    text = (exported / "README.md").read_text()
    assert f"| model.int8.onnx | int8 | {int8.bytes / 1e6:.2f} | {int8.metrics['AP']:.3f} |" in text
    assert "INT8: 46 of 72 nodes that multiply (11 Conv, 35 Gemm)" in text
    assert "It is calibrated on 16 images of" in text
    assert "INT8 is calibrated on the images that AP is measured on" in text


def test_the_plain_folder_is_what_it_is_without_other_files(exported: Path, tmp_path: Path) -> None:
    plain = export(str(TEACHER), tmp_path / "plain", ExportOptions(onnx=False), Console(quiet=True))
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (plain / name).read_bytes() == (exported / name).read_bytes()
    assert {path.name for path in exported.iterdir()} - {path.name for path in plain.iterdir()} == {
        *("model.onnx", "detect.py", "model.int8.onnx", "model.float16.onnx")
    }


def test_detect_takes_the_other_files(exported: Path, shards: Path, tmp_path: Path) -> None:
    photo = next((shards.parent / "coco").rglob("*.jpg"))
    first = onnx_detect.detect(exported, photo, 0.3)
    assert first
    others = ["model.int8.onnx", "model.float16.onnx"]
    for name in others:
        found = onnx_detect.detect(exported, photo, 0.3, name)
        np.testing.assert_allclose(found[0]["box_xyxy"], first[0]["box_xyxy"], atol=3)
        assert found[0]["label"] == first[0]["label"]
    # a name of the folder, or a path from here
    assert onnx_detect.detect(exported, photo, 0.3, str(exported / "model.onnx")) == first


def test_a_graph_that_detect_cannot_read_is_named_and_no_picture_is_blamed(
    exported: Path, shards: Path, tmp_path: Path
) -> None:
    photo = next((shards.parent / "coco").rglob("*.jpg"))
    (tmp_path / "broken.onnx").write_text("{}")
    for model, said in (("nosuch.onnx", "no such file"), (str(tmp_path / "broken.onnx"), "can't be read as a graph")):
        with pytest.raises(ValueError, match=said):
            onnx_detect.detect(exported, photo, 0.3, model)


def test_a_benchmark_that_can_not_be_is_refused_by_the_dry_run_too(
    exported: Path, shards: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(stranger := tmp_path / "stranger.png")
    (tmp_path / "empty.json").write_text(
        '{"images": [{"id": 1, "file_name": "stranger.png", "width": 8, "height": 8}], "annotations": [],'
        ' "categories": [{"id": 1, "name": "star"}]}'
    )
    prepare(tmp_path / "empty.json", tmp_path, str(empty := tmp_path / "empty"), quiet=True)
    wrong = [
        (exported, {"exported": True, "onnx": True}, "given with --exported"),
        (exported, {"exported": True, "evaluate": str(tmp_path / "nosuch")}, "nosuch"),
        (TEACHER, {"exported": True}, "no model.onnx"),
        (exported, {"exported": True, "out": tmp_path / "new.png"}, "without --evaluate"),
        (
            exported,
            {"exported": True, "evaluate": str(shards), "out": tmp_path / "new.txt"},
            r"(?s)new\.txt.*what to do: --out .*new\.png",
        ),
        (exported, {"exported": True, "evaluate": str(shards), "out": stranger}, "qskd did not draw it"),
        (exported, {"exported": True, "evaluate": str(empty), "out": tmp_path / "new.png"}, "no AP could be measured"),
    ]
    for model, options, said in wrong:
        for ask in (foresee_benchmark, benchmark):
            with pytest.raises(QskdError, match=said):
                ask([str(model)], BenchmarkOptions(memory=False, **options))


def test_a_broken_picture_to_calibrate_with_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("no picture")
    for place, said in (("photos", "not a readable image"), ("nosuch", "no such file or folder")):
        options = ExportOptions(variants=VariantOptions(int8=True, calibration=(str(tmp_path / place),)))
        with pytest.raises(QskdError, match=said):
            foresee(str(TEACHER), tmp_path / "out", options)


def test_benchmark_measures_every_file_of_an_export_and_draws_them(
    exported: Path, shards: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "new" / "ap.png"
    options = BenchmarkOptions(batches=(1,), exported=True, evaluate=str(shards), out=picture, memory=False, rounds=1)
    found = benchmark([str(exported)], options)
    card = read_card(exported)
    assert card is not None
    assert card.variants is not None
    said = {fact.variant.name: fact for fact in card.variants.facts}
    torch_row, *rows = found.rows
    assert (torch_row.runtime, [timing.batch for timing in torch_row.timings]) == ("PyTorch", [1, 2])
    assert {row.runtime for row in rows} == set(said)
    assert is_own_picture(picture)
    first = torch_row.timings[1].ms_per_image
    assert [(point.precision, point.runtime, point.ms, point.megabytes) for point in points_of(found)] == [
        (row.variant.computes, "onnxruntime", row.timings[0].ratio * first, row.bytes / 1e6)
        for row in rows
        if row.variant
    ]
    for row in rows:
        assert [timing.batch for timing in row.timings] == [2]  # all that its graph takes
        assert row.bytes == said[row.runtime].bytes
        assert row.metrics["AP"] == pytest.approx(said[row.runtime].metrics["AP"], abs=1e-6)
    show(found, Console(file=(shown := io.StringIO()), width=120))
    assert "size on disk, and COCO AP" in shown.getvalue()
    assert f"{rows[1].bytes / 1e6:.2f} │ {rows[1].metrics['AP']:.3f}" in shown.getvalue()
    assert torch_row.metrics["AP"] == pytest.approx(said["float32 onnxruntime"].metrics["AP"], abs=1e-3)
    with pytest.raises(QskdError, match=r"no model\.onnx\n.*a folder of `qskd export`"):
        benchmark([str(TEACHER)], options)


def source(folder: Path) -> str:
    save_detector(random_detector("detr"), folder, ResizeConfig(size=SIZE))
    return str(folder)


def test_int8_without_images_says_what_to_give_and_writes_nothing(tmp_path: Path) -> None:
    model, out, empty = source(tmp_path / "source"), tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no picture")
    for options, complaint in (
        (["--int8"], r"no images to calibrate with\n.*\n.*--calibration SHARDS"),
        (
            ["--int8", "--calibration", str(empty)],
            r"empty: no images to calibrate INT8 with\n.*a shard folder, or files",
        ),
        (["--int8", "--calibration", str(tmp_path / "none")], "none: no such file or folder"),
        (["--calibration", str(empty)], "has no effect without --int8"),
        (["--int8", "--calibration", str(empty), "--no-onnx"], "made of the graph"),
        (["--float16", "--exporter", "dynamo"], "nodes must have the names of their modules"),
    ):
        for also in ([], ["--dry-run"]):
            result = CliRunner().invoke(app, ["export", model, "--out", str(out), *options, *also])
            assert isinstance(result.exception, QskdError), options
            with pytest.raises(QskdError, match=complaint):
                raise result.exception
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "source"]


def test_a_dry_run_names_the_files_and_writes_none(shards: Path, tmp_path: Path) -> None:
    model, out = source(tmp_path / "source"), tmp_path / "out"
    options = ["--int8", "--float16", "--calibration", str(shards), "--evaluate", str(shards), "--dry-run"]
    result = CliRunner().invoke(app, ["export", model, "--out", str(out), *options], catch_exceptions=False)
    said = " ".join(result.output.split())
    assert "besides model.int8.onnx, model.float16.onnx; INT8 is calibrated on" in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_earlier_exports_other_files_go_with_it_and_those_of_others_stay(tmp_path: Path) -> None:
    model, out = source(tmp_path / "source"), tmp_path / "out"
    export(model, out, ExportOptions(onnx=False), Console(quiet=True))
    ours = {variant.file for variant in VARIANTS} | {"openvino_model.bin", "openvino_model.int8.bin"}
    others = {"model.bin", "model.xml", "openvino_model.fp16.xml", "my.int8.onnx"}
    for name in ours | others:
        (out / name).write_bytes(b"of an earlier export")
    export(model, out, ExportOptions(onnx=False, overwrite=True), Console(quiet=True))
    left = {path.name for path in out.iterdir()}
    assert not left & ours
    assert others <= left
    assert all((out / name).read_bytes() == b"of an earlier export" for name in others)


def test_calibration_images_are_spread_over_all_that_are_given(shards: Path, tmp_path: Path) -> None:
    seen_as = Preprocessing(ResizeConfig(size=SIZE))
    whole = Calibration(images_to_calibrate([str(shards)], seen_as), 1)
    some = Calibration(images_to_calibrate([str(shards)], seen_as), 2, most=3)
    assert (whole.count, len(whole), some.count, len(some)) == (16, 16, 3, 2)
    np.testing.assert_array_equal(some[0][0], whole[0][0])
    np.testing.assert_array_equal(some[1], np.repeat(whole[15], 2, 0))  # the last, filled up
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"{number}.png")
    files = Calibration(images_to_calibrate([str(tmp_path)], seen_as), 1)
    assert (files.count, files[1].shape, len(list(files.pictures()))) == (2, (1, 3, SIZE, SIZE), 2)
    prepare(tmp_path, None, str(tmp_path / "photos"), unlabeled=True, quiet=True)
    unlabelled = Calibration(images_to_calibrate([str(tmp_path / "photos")], seen_as), 1)
    assert unlabelled.count == 2
    np.testing.assert_array_equal(unlabelled[1], files[1])


@needs_openvino
def test_openvino_is_imported_without_what_posts_to_its_maker() -> None:
    need_openvino()
    assert sys.modules["openvino.tools.ovc.telemetry_utils"].tm.__name__ == "openvino.tools.ovc.telemetry_stub"
    assert not [name for name, there in sys.modules.items() if name.startswith("openvino_telemetry") and there]


CTRL_C = """if True:
    import faulthandler, signal, sys
    from pathlib import Path
    from qskd.deploy.onnx_detect import session_of
    from qskd.deploy.runtimes import session_of_openvino
    faulthandler.enable()  # as Ray's and pytest's processes do
    file = Path(sys.argv[1])
    opened = [session_of(file)] + [session_of_openvino(file, 1) for _ in range(2)] + [session_of(file)]
    while opened:
        opened.pop(0)
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("closing")
"""


@needs_openvino
def test_ctrl_c_closes_a_program_in_order_after_graphs_ran_in_openvino(tmp_path: Path) -> None:
    """Each of OpenVINO's cores gives its thread a stack for signals; of two that overlap the first's end spoils the second's."""
    openvino = need_openvino()
    from openvino import opset13

    pixels = opset13.parameter([1, 3, 8, 8], np.float32)
    pixels.output(0).get_tensor().set_names({"pixel_values"})
    openvino.save_model(openvino.Model([opset13.relu(pixels)], [pixels]), str(tmp_path / "graph.xml"))
    command = [sys.executable, "-c", CTRL_C, str(tmp_path / "graph.xml")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert (done.returncode, done.stdout) == (0, "closing\n"), done.stderr


def test_outputs_that_are_no_numbers_are_refused_by_name() -> None:
    detector = random_detector("conditional")

    def run(value: float) -> Any:
        return lambda pixels: (np.full((1, 9, 5), value, np.float32), np.full((1, 9, 4), 0.5, np.float32))

    with pytest.raises(QskdError, match="conditional_detr, broken: outputs that are no numbers"):
        side_by_side(detector, {"first": run(0.0), "broken": run(np.inf)}, [Pictures(noise(1, 0)[0])], 1)


@pytest.mark.parametrize("kind", ["detr", "table", "conditional"])
def test_an_exports_detections_are_ranked_as_its_familys_are(kind: str) -> None:
    """Of DETR and Table Transformer each query's softmax counts, not a sigmoid of each logit."""
    detector, truth = random_detector(kind), Truth(cast(Any, None), (3, 5), (0, 1))
    logits = 3 * torch.randn(1, 9, len(detector.labels) + (kind != "conditional"))
    boxes = torch.rand(1, 9, 4)
    some = Pictures(np.zeros((1, 3, 8, 8), np.float32), np.array([7]), np.array([[8, 8]]))
    found = _detections(detector, logits.numpy(), boxes.numpy(), some, truth)
    chances = logits.sigmoid() if kind == "conditional" else logits.softmax(-1)
    expected = chances[0, :, :2].flatten().sort(descending=True).values
    torch.testing.assert_close(torch.from_numpy(found.scores).sort(descending=True).values, expected)
