"""`import qskd`: the verbs as functions and the pieces of a loop of one's own; docs/python.md is run as it stands."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import STUDENT, recipe

import qskd
from pipelines.cli import DOORS
from pipelines.functions.recipes import configuration
from qskd.config.recipe import load
from qskd.datasets.manifest import load_manifest
from qskd.errors import QskdError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python.md"
NOT_OF_FUNCTIONS = {
    "dry_run",
    "all_fields",
    "out",
    "check",
    "check_derived",
    "per_class",
    "images",
    "places",
    "pictures",
    "every",
    "annotations",
}  # said otherwise, or what prints


def test_importing_it_loads_nothing_heavy_and_a_verb_s_name_no_ray() -> None:
    code = """if True:
        import sys, json, qskd
        heavy = [name for name in ("torch", "transformers", "pydantic", "pipelines", "ray") if name in sys.modules]
        verbs = [getattr(qskd, name).__name__ for name in qskd.VERBS]
        print(json.dumps([heavy, verbs, [name for name in ("torch", "ray", "mlflow") if name in sys.modules]]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == [[], list(qskd.VERBS), []]


def test_every_name_is_there_for_dir_for_type_checkers_and_for_use() -> None:
    names = {*qskd.VERBS, *qskd.PIECES}
    assert names <= set(dir(qskd))
    assert all(getattr(qskd, name).__name__ == name for name in names)
    typed = {
        alias.asname
        for node in ast.walk(ast.parse((ROOT / "qskd" / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert typed == names
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        _ = qskd.distil


@pytest.mark.parametrize("verb", qskd.VERBS)
def test_a_function_has_the_options_of_its_verb(verb: str) -> None:
    options = inspect.signature(DOORS[verb].command).parameters
    own = inspect.signature(getattr(qskd, verb)).parameters
    assert set(options) - NOT_OF_FUNCTIONS <= set(own)
    for name in set(options) & set(own):
        default = options[name].default
        if verb in ("evaluate", "label") and name == "workers":  # in a program, in its own process
            continue
        if default is not inspect.Parameter.empty and default is not None:
            assert own[name].default == (tuple(default) if isinstance(default, list) else default), name


@pytest.mark.parametrize("verb", ["cache", "train", "distill", "tune"])
def test_a_function_of_a_recipe_says_what_the_recipe_lacks(verb: str) -> None:
    with pytest.raises(QskdError, match=r"^(data\.train|teacher\.cache\.path): empty"):
        getattr(qskd, verb)({"name": "x"})


def test_a_recipe_is_a_file_its_fields_or_what_they_became(tmp_path: Path) -> None:
    tree = {"name": "a", "student": STUDENT, "training": {"epochs": 3}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    fields = {
        "training.learning_rate": 1e-5,
        "teacher.path": tmp_path / "t",
        "data.views.count": 2,
        "card.data": "no: yes",
    }
    texts = ["training.learning_rate=1e-5", f"teacher.path={tmp_path}/t", "data.views.count=2", 'card.data="no: yes"']
    expected = load(tmp_path / "a.yaml", texts)
    assert expected.training.learning_rate == 1e-5
    for given in (tmp_path / "a.yaml", str(tmp_path / "a.yaml"), tree, load(tmp_path / "a.yaml")):
        for set_ in (fields, texts):
            found = configuration(given, set_, ())
            assert found == expected
            assert found.student.model_fields_set == expected.student.model_fields_set
    with pytest.raises(QskdError, match="did you mean epochs"):
        configuration({"training": {"epoch": 3}}, (), ())
    assert configuration(None, {}, ()) == load(None)


def test_a_local_place_is_what_the_command_takes_it_for(
    tiny_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is called ~ or s3: was made in the working folder."""
    coco, here = tiny_folders / "coco", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.json").write_bytes((coco / "annotations.json").read_bytes())
    qskd.prepare("~/a.json", coco / "images", "~/shards")
    assert len(qskd.select("~/shards", "~/few.json", 2).images) == 2
    assert (tmp_path / "few.json").is_file()
    refusing = (
        lambda: qskd.select(tmp_path / "shards", "s3://bucket/few.json", 2),
        lambda: qskd.label("teacher", coco / "images", "s3://bucket/labels.json"),
        lambda: qskd.export("teacher", "s3://bucket/exported"),
        lambda: qskd.prepare("s3://bucket/a.json", coco / "images", tmp_path / "others"),
    )
    for call in refusing:
        with pytest.raises(QskdError, match="a URI"):
            call()
    assert not list(here.iterdir())


def test_prepare_predict_evaluate_and_export_give_values_and_print_nothing(
    tiny_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = tiny_folders / "coco"
    annotations = next(coco.glob("*.json"))
    images = next(path for path in coco.iterdir() if path.is_dir())
    made = qskd.prepare(annotations, images, tmp_path / "shards")
    assert made.images == made.manifest.num_images > 0
    assert made.problems == ()
    assert Path(made.folder) == tmp_path / "shards"
    model, photo = tiny_folders / "model", tiny_folders / "photo.png"
    (one,) = qskd.predict(model, photo, threshold=0.0)
    several = qskd.predict(model, [photo, Image.open(photo), np.asarray(Image.open(photo))], threshold=0.0)
    assert one.boxes_xyxy.shape == (len(one.scores), 4)
    assert len(one.labels) == len(one.scores) > 0
    assert (np.diff(one.scores) <= 0).all()
    assert all(np.array_equal(each.boxes_xyxy, one.boxes_xyxy) for each in several)
    assert not list(tiny_folders.glob("*.boxes.png"))
    labels = dict.fromkeys(made.classes, "cat")
    measured = qskd.evaluate(model, made.folder, set={"teacher.class_map": labels})
    assert 0 <= measured.ap == measured.metrics["AP"] <= 1
    labelled = qskd.label(model, images, tmp_path / "labels.json", threshold=0.0)
    assert labelled.images == made.images
    assert sum(labelled.objects.values()) == len(json.loads((tmp_path / "labels.json").read_text())["annotations"]) > 0
    chosen = qskd.select(made.folder, tmp_path / "chosen.json", 2, seed=3)
    assert len(chosen.images) == 2
    assert (tmp_path / "chosen.png").is_file()
    exported = qskd.export(model, tmp_path / "out", onnx=False)
    assert exported == type(exported)(str(tmp_path / "out"), None, None, "")
    assert (tmp_path / "out" / "config.json").is_file()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("verb", "given", "named", "said"),
    [
        ("label", ("m", "photos", "out.json"), {"threshold": 5.0}, "threshold: 5.0\n  expected: a number, 0 to 1"),
        ("label", ("m", "photos", "out.json"), {"threshold": "x"}, "threshold: 'x'"),
        ("label", ("m", "photos", "out.json"), {"workers": -1}, "workers: -1\n  expected: a whole number, at least 0"),
        ("label", ("m", "photos", "out.json"), {"batch_size": 0}, "batch_size: 0"),
        ("label", ("m", "photos", "out.json"), {"on_error": "Stop"}, "on_error: 'Stop'\n  expected: stop or skip"),
        ("select", ("s", "out.json", True), {}, "budget: True"),
        ("select", ("s", "out.json", "10"), {}, "budget: '10'"),
        ("select", ("s", "out.json", 2.5), {}, "budget: 2.5"),
        (
            "select",
            ("s", "out.json", 3),
            {"by": "foo"},
            "by: 'foo'\n  expected: random or classes or uncertainty or gradients",
        ),
        ("predict", ("m", "photo.png"), {"threshold": 2}, "threshold: 2"),
        ("evaluate", ("m", "s"), {"batch_size": "many"}, "batch_size: 'many'"),
        ("export", ("m", "out"), {"size": 0}, "size: 0"),
        ("export", ("m", "out"), {"calibration": 5}, "calibration: 5"),
        ("export", ("m", "out"), {"exporter": "torch"}, "exporter: 'torch'\n  expected: torchscript or dynamo"),
        ("export", ("m", "out"), {"images": "photos"}, "images: 'photos'\n  expected: several, in a list"),
        ("evaluate", ("m", "s"), {"backend": "coco"}, "backend: 'coco'\n  expected: auto or hotcoco"),
        ("evaluate", ("m", "s"), {"set": "compute.device=cpu"}, "what to do: set=['compute.device=cpu']"),
        ("predict", ("m", "photo.png"), {"classes": "cat"}, "what to do: classes=['cat']"),
        ("tune", (), {"space": "query_selection"}, "what to do: space=['query_selection']"),
        ("distill", (), {"methods": "mine"}, "what to do: methods=['mine']"),
    ],
)
def test_what_the_command_would_not_take_the_function_does_not(
    verb: str, given: tuple[Any, ...], named: dict[str, Any], said: str
) -> None:
    with pytest.raises(QskdError) as complained:
        getattr(qskd, verb)(*given, **named)
    assert said in str(complained.value)


@pytest.mark.parametrize("kind", ["turned", "12 bits in 16", "float"])
def test_a_picture_of_pillows_is_seen_as_its_file_is(kind: str, tiny_folders: Path, tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (48, 64), np.uint8)
    file = tmp_path / ("photo.tif" if kind == "float" else "photo.png")
    exif = Image.Exif()
    if kind == "turned":
        exif[0x0112] = 6
    pixels = {"turned": grey, "12 bits in 16": grey.astype(np.uint16) * 16, "float": grey.astype(np.float32) / 255}
    Image.fromarray(pixels[kind]).save(file, exif=exif)
    (of_file, of_pillow) = qskd.predict(tiny_folders / "model", [file, Image.open(file)], threshold=0.0)
    assert np.array_equal(of_file.boxes_xyxy, of_pillow.boxes_xyxy)
    assert np.array_equal(of_file.scores, of_pillow.scores)
    assert len(of_file.scores)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_an_array_that_is_no_picture_is_refused_with_what_it_is(wrong: np.ndarray, tiny_folders: Path) -> None:
    with pytest.raises(QskdError, match=rf"images: an array of {wrong.dtype}, .*\n  expected: RGB of uint8"):
        qskd.predict(tiny_folders / "model", wrong)


def test_a_function_leaves_torch_as_many_threads_as_it_had(tiny_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of the caller's own goes on beside it."""
    from pipelines.deployment import export as program

    def exported(*_: Any) -> Path:
        torch.set_num_threads(1)
        raise QskdError("out", "full")

    monkeypatch.setattr(program, "export", exported)
    torch.set_num_threads(3)
    try:
        labels = dict.fromkeys(load_manifest(str(tiny_folders / "val")).labels, "cat")
        qskd.evaluate(tiny_folders / "model", tiny_folders / "val", set={"teacher.class_map": labels})
        assert torch.get_num_threads() == 3
        with pytest.raises(QskdError, match="full"):
            qskd.export(tiny_folders / "model", "out")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["pipelines", "search_spaces"])
@pytest.mark.parametrize("inside", ["__init__.py", "other.py"])  # a package, a folder without an __init__
def test_a_package_of_another_project_under_our_name_is_named(name: str, inside: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / inside).write_text("")
    code = f"import sys, qskd; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['qskd', '--version']; "
    code += "from qskd.verbs import main; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    if inside == "other.py":  # a namespace gives way to a real package
        assert done.returncode == 0
        return
    assert done.returncode == 1
    assert f"{tmp_path}/{name}/__init__.py is imported under this name, which is not qskd's" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_installation_that_was_written_over_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines
    from qskd.verbs import check_ours

    check_ours("pipelines")
    monkeypatch.delattr(pipelines, "OF_QSKD")
    with pytest.raises(QskdError, match="not qskd's"):
        check_ours("pipelines")


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


def test_the_page_s_loop_trains_a_transformers_model_in_under_25_lines(tmp_path: Path) -> None:
    """As it stands: names of files are this test's, and the printed terms are read."""
    from test_distiller import Pictures, together
    from tiny import FAMILIES, LABELS, silent_student

    from qskd.config import ResizeConfig
    from qskd.detectors import save_detector

    code = next(block for block in blocks() if "qskd.Distiller" in block and "for batch in loader" in block)
    assert len([line for line in code.splitlines() if line.strip()]) < 25
    for name, family in (("student", "conditional"), ("teacher", "refined")):
        sizes = recipe(FAMILIES[family]).student
        save_detector(silent_student(sizes, LABELS, 5), tmp_path / name, ResizeConfig(size=64))
    loader = [together([Pictures()[i] for i in range(4)])] * 12
    lines: list[tuple[Any, ...]] = []
    names: dict[str, Any] = {"loader": loader, "print": lambda *said: lines.append(said)}
    code = code.replace('"./student"', repr(str(tmp_path / "student"))).replace(
        '"./teacher"', repr(str(tmp_path / "teacher"))
    )
    code = code.replace('"./distilled"', repr(str(tmp_path / "distilled")))
    exec(compile(code, str(PAGE), "exec"), names)
    losses = [said[-1]["agfd"] for said in lines if isinstance(said[-1], dict)]
    assert losses[-1] < losses[0]
    assert (tmp_path / "distilled" / "config.json").is_file()
    touched = {name for name, each in names["student"].named_parameters() if each.grad is not None and each.grad.any()}
    assert any("backbone" in name for name in touched)


def test_every_block_of_the_page_is_python_and_names_what_is_there() -> None:
    for block in blocks():
        tree = ast.parse(block)
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qskd"
        }
        for name in used:
            assert hasattr(qskd, name), name
        for node in ast.walk(tree):  # the verbs' options are theirs
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in qskd.VERBS:
                own = inspect.signature(getattr(qskd, node.func.attr)).parameters
                assert {keyword.arg for keyword in node.keywords} <= set(own)
