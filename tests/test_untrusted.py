"""What is read of others, by name: each odd input found so far; names in messages, tables, pictures and pages; outputs."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from qskd.config import Config
from qskd.config.recipe import load
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.errors import QskdError, told_without_traceback, writing
from qskd.pictures.panels import Key, Panel, sheet
from qskd.pictures.plots import draw_boxes
from qskd.printable import LONGEST_NAME, escaped, one_line, printable, shown_value
from qskd.untrusted import DEEPEST, LARGEST_YAML, MOST_NODES, parse_json, parse_large_json, parse_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


def refused(call: Any, *words: str) -> None:
    with pytest.raises(QskdError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --- JSON and YAML --------------------------------------------------------------------------------------------------
def test_json_is_refused_by_name_for_depth_repeated_keys_and_what_is_no_json() -> None:
    assert parse_json('{"a": [1, {"b": null}]}', "here") == {"a": [1, {"b": None}]}
    assert parse_json(b"\xef\xbb\xbf[1]", "here") == [1]
    assert parse_json("[1]".encode("utf-16"), "here") == [1]
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "here")
    for text, word in (
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested more than"),
        ("[" * 100_000, "nested too deep"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("1" * 5000, "not JSON"),
        ("NaN", "NaN is no JSON number"),
        ("", "not JSON"),
        (b"\xff", "not JSON"),
    ):
        refused(lambda text=text: parse_json(text, "here.json"), "here.json", word)
    refused(lambda: parse_large_json("[" * 100_000, "big.json"), "big.json", "nested too deep")


def test_yaml_is_refused_by_name_for_bombs_depth_tags_repeated_keys_and_size() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: .5}", "here")["d"] == {"b": 1, "e": 0.5}
    assert parse_yaml("", "here") is None
    for text, word in (
        (BOMB, f"more than {MOST_NODES} values"),
        ("a: &a [*a]", "itself part of"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested more than"),
        ("[" * 500_000, "nest"),
        ("a: 1\nb: 2\na: 3", "the key 'a' is there twice"),
        ("!!python/object/apply:os.system [ls]", "not YAML"),
        ("a: 2026-99-99", "not YAML"),
        ("a: !!timestamp x", "not YAML"),
        ("a: !!int ''", "not YAML"),
        ("a: 0x" + "f" * 4000, "a number of 4002 characters"),
        ("--- a\n--- b", "not YAML"),
        ("x" * (LARGEST_YAML + 1), f"at most {LARGEST_YAML}"),
    ):
        refused(lambda text=text: parse_yaml(text, "here.yaml"), "here.yaml", word)
    deep_by_alias = "a: &a " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 40 + "*a" + "]" * 40
    refused(lambda: parse_yaml(deep_by_alias, "here"), "nested more than")


def test_a_bomb_and_a_recipe_without_end_take_neither_time_nor_memory(tmp_path: Path) -> None:
    """In a process that may hold a gigabyte and run for a minute; the bomb alone took 64 s and all memory there was."""
    recipe = tmp_path / "bomb.yaml"
    recipe.write_text(BOMB)
    program = """
        import resource, sys
        from qskd.errors import QskdError
        from qskd.config.recipe import load
        resource.setrlimit(resource.RLIMIT_AS, (2**30 + 2**29, 2**30 + 2**29))
        for path in (sys.argv[1], "/dev/zero"):
            try:
                load(path)
            except QskdError as error:
                print(error.found[:40])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert len(done.stdout.splitlines()) == 2, done.stdout + done.stderr


def test_a_recipe_may_be_utf_16_or_begin_with_a_mark_and_says_what_it_is_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text("name: odd", encoding=encoding)
        assert load(path).name == "odd"
    path.write_bytes(b"\xff\xfe\x00")
    refused(lambda: load(path), "r.yaml", "cannot be read")
    refused(lambda: load(tmp_path), "cannot be read")
    refused(lambda: load("a" * 300), "cannot be read")
    refused(lambda: load("a\0b"), "cannot be read")


def test_an_alias_in_a_recipe_is_not_set_along_with_what_it_stands_for(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("student: {resize: &size {size: 64}}\nteacher: {resize: *size}")
    config = load(path, ["student.resize.size=128"])
    assert (config.student.resize.size, config.teacher.resize and config.teacher.resize.size) == (128, 64)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("seed=18446744073709551616", "64 bits"),
        ('data.train="a\\0b"', "NUL"),
        ("distillation.selection.boundaries=" + "[" * 5000, "nest"),
        ("student.size=[s]", "student.size"),
        ("student.feature_levels=999999999999", "feature_levels"),
        ("training.learning_rate=1e999", "learning_rate"),
        ("\x1b[31mname=x", "\\x1b[31mname"),
        (f"{'n' * 1_000_000}=1", "unknown field"),
    ],
)
def test_an_override_that_no_field_takes_is_an_error_of_the_users(override: str, word: str) -> None:
    refused(lambda: load(None, [*(["student.family=rt_detr"] if "levels" in override else []), override]), word)


# --- terminal -------------------------------------------------------------------------------------------------------
def test_a_message_can_not_give_a_terminal_orders_nor_fill_it() -> None:
    error = QskdError("\x1b]0;x\x07" + "d/" * 500_000, "\ud800\r\u202e", "a" * 10**6, "\n" * 10**6)
    said = str(error)
    assert "\\x1b]0;x\\x07" in said
    assert "\\ud800\\r\\u202e" in said
    assert len(said) < 3000
    assert not any(letter in said for letter in "\x1b\x07\r\u202e\ud800")
    assert str(QskdError.from_json(error.to_json())) == said
    plain = "a.json: image 7 (é日本 x.png)\n\tsecond line"
    assert printable(plain) == escaped(plain) == str(QskdError(plain, "x")).removesuffix(": x") == plain
    assert one_line("a\n\t b\x1b") == "a b\\x1b"
    assert len(one_line("x" * 10**6)) == LONGEST_NAME
    assert len(shown_value([["x" * 10**6] * 100] * 100)) < 10_000
    assert shown_value(10**5000).startswith("an integer of")


def test_log_lines_and_results_show_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.run.logs import TextLines, say, tell

    record = logging.LogRecord("qskd", logging.WARNING, "", 0, "of %s", ("\x1b[31mx",), None)
    assert TextLines("%(levelname)s %(message)s").format(record) == "WARNING of \\x1b[31mx"
    say("\x1b[2J")
    tell("\x9b31m", "one\ntwo")
    assert capsys.readouterr().out == "\\x1b[2J\n\\x9b31m one\ntwo\n"
    tell("\n".join(f"{n} class" for n in range(5000)))  # of what was asked for nothing is left out
    assert len(capsys.readouterr().out.splitlines()) == 5000


def test_what_looks_like_markup_in_a_path_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.demo.quickstart import quickstart
    from pipelines.deployment.found import Benchmark, Row, show
    from qskd.deploy.speed import Cost, Size, Timing

    quickstart(Path("/x/[/red]odd[bold]"), dry_run=True)
    assert "/x/[/red]odd[bold]/data" in capsys.readouterr().out.replace("\n", "")
    console = Console(width=200, record=True)
    found = Benchmark(
        "cpu",
        {"[/red]m": ("detr", Size(64, 64), Cost(10, 0.1))},
        [Row("[/red]m", "PyTorch", [Timing(1, 1.0, 1.0, 3)], {1: 5})],
    )
    show(found, console)
    assert "[/red]m" in console.export_text()


# --- pictures, tracking ---------------------------------------------------------------------------------------------
ODD_NAMES = ["traffic\nlight", "\x1b[31mred", "$x^{2", "x" * 100_000, "", "a\r\nb\tc", "🦊\u202e"]


def test_class_names_with_line_breaks_are_drawn_on_one_line() -> None:
    image = np.full((200, 300, 3), 120, np.uint8)
    boxes = np.array([[10 + 20 * n, 30, 100 + 20 * n, 150] for n in range(len(ODD_NAMES))])
    drawn = draw_boxes(image, boxes[:1], [0], [0.9], ODD_NAMES)
    assert (drawn == draw_boxes(image, boxes[:1], [0], [0.9], ["traffic light"])).all()
    assert draw_boxes(image, boxes, range(len(ODD_NAMES)), None, ODD_NAMES).shape == (400, 600, 3)
    keys = tuple(Key(name, ((1, 2, 3),)) for name in ODD_NAMES)
    panels = [Panel(name, name, image, keys) for name in ODD_NAMES[:3]]
    assert sheet("a\nb", "c\nd", "e\nf", panels).ndim == 3


def test_a_run_on_classes_with_line_breaks_leaves_its_pictures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tiny import STUDENT, recipe, silent_student

    from pipelines.cli import main
    from pipelines.prepare import prepare
    from pipelines.reporting.report import write_report
    from pipelines.tracking.tracker import Tracker
    from qskd.datasets.manifest import load_manifest
    from qskd.detectors import save_detector

    annotations, images = make_shapes(ShapesConfig(images=4), tmp_path / "coco")
    document = json.loads(annotations.read_text())
    for category in document["categories"]:
        category["name"] = f"[/b]{category['name']}\n\x1b[31m$x^{{"
    annotations.write_text(json.dumps(document))
    prepare(annotations, images, str(tmp_path / "val"), quiet=True)
    manifest = load_manifest(str(tmp_path / "val"))
    data = [f"data.{split}={tmp_path}/val" for split in ("train", "val")]
    config = recipe(STUDENT, "distillation.method=none", *data, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    student = tmp_path / "student"
    save_detector(silent_student(config.student, manifest.labels, 1).eval(), student, config.student.resize)
    main_of = [str(student), str(images / document["images"][0]["file_name"]), "--threshold", "0.01"]
    with pytest.raises(SystemExit) as ended:
        main(["predict", *main_of, "--out", str(tmp_path / "out.png")])
    assert ended.value.code == 0
    assert (tmp_path / "out.png").stat().st_size > 1000
    tracker = Tracker.open(config, "train")
    write_report(config, manifest, [], student, tracker)
    import mlflow

    found = {a.path for a in mlflow.MlflowClient(tracker.uri).list_artifacts(tracker.run_id, "pictures")}
    assert {"pictures/samples.png", "pictures/explained"} <= found
    assert not caplog.records


def test_a_sweeps_page_holds_no_markup_of_a_names_own(tmp_path: Path) -> None:
    from pipelines.tuning.report.report import write_report
    from pipelines.tuning.trial.row import TrialRow

    evil = "<script>alert(1)</script>"
    rows = [
        TrialRow(
            n,
            "finished",
            {f"p{evil}": n},
            {"teacher": {"class_map": {evil: f"{n}{evil}"}}},
            reason=evil,
            curve=((1.0, 0.1 * n),),
        )
        for n in range(3)
    ]
    written = write_report(tmp_path, rows, Config(), f"name: x # {evil}", evil)
    for path in written:
        if path.suffix in (".html", ".md"):
            assert evil not in path.read_text(), path


# --- outputs that can't be written ----------------------------------------------------------------------------------
# As root, whom no permission stops: below a file, in a file system that takes none, and a name too long.
@pytest.mark.parametrize("parent", ["/dev/null/qskd", "/proc/qskd", "a" * 300])
def test_an_output_that_can_not_be_written_is_named_by_every_writer(
    parent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.cli import main
    from pipelines.inspection.predict import write_picture
    from pipelines.run.folder import Folder
    from pipelines.run.guards import alone_on
    from qskd.detectors.checkpoint import replacing
    from qskd.teacher.cache import write_rows
    from qskd.teacher.manifest import CacheManifest, CacheSizes, save_cache_manifest

    monkeypatch.chdir(tmp_path)
    named = parent[-60:]
    config = load(None, [f"output={parent}"])

    def enter(context: Any) -> None:
        with context:
            raise AssertionError("it was written")

    for verb, write in {
        "shapes, quickstart": lambda: make_shapes(ShapesConfig(images=1), parent),
        "predict, explain": lambda: write_picture(np.zeros((9, 9, 3), np.uint8), Path(parent, "x.png"), ()),
        "export": lambda: enter(replacing(f"{parent}/x")),
        "distill, train, tune": lambda: enter(alone_on(Folder(config))),
        "their records": lambda: Folder(config).write("config.yaml", "x"),
        "cache": lambda: write_rows(parent, "x.parquet", [], "f"),
        "its manifest": lambda: save_cache_manifest(parent, CacheManifest({}, CacheSizes(1, 1, 1, (1,)), 1, (), {})),
    }.items():
        with pytest.raises(QskdError, match="can't be written") as caught:
            write()
        assert named in str(caught.value), verb
    annotations, images = make_shapes(ShapesConfig(images=1), tmp_path / "coco")
    for words in (["prepare", str(annotations), str(images), parent], ["shapes", parent, "--images", "1"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr().err
        assert ended.value.code == 1
        assert said.startswith("error: ")
        assert named in said


def test_what_the_system_says_of_a_path_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), told_without_traceback():
        Path("/dev/null/x").read_text()
    assert "error: /dev/null/x: Not a directory" in capsys.readouterr().err
    with pytest.raises(BrokenPipeError), told_without_traceback():
        raise BrokenPipeError(32, "Broken pipe")
    with pytest.raises(QskdError, match="/proc/x: can't be written"), writing("/proc/x"):
        os.mkdir("/proc/x")
