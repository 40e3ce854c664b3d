"""What looks wrong in datasets of every format is said with its place in their files; names of others break no line."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from test_formats import names, picture, voc_object, voc_xml, write
from test_formats_hugging_face import image, parquet

from pipelines.cli import main
from qskd.datasets.classes import map_classes, ready_class_map
from qskd.datasets.formats.opening import open_dataset
from qskd.datasets.formats.reading import read_class_names
from qskd.datasets.shards import outlined
from qskd.errors import QskdError
from qskd.printable import printable
from qskd.untrusted import parse_yaml

WIDTH, HEIGHT = 40, 20
CORNERS = [
    (1, 2, 21, 12),
    (20, 4, 38, 18),
    (25, 10, 39, 19),
    (12, 5, 39, 16),
]  # x1, y1, x2, y2 of four pictures' objects


def yolo_lines(root: Path, *lines: str) -> Path:
    """A data.yaml whose pictures have a line each."""
    for number, line in enumerate(lines):
        picture(root / "images" / f"{number}.png")
        write(root / "labels" / f"{number}.txt", line)
    return write(root / "data.yaml", "train: images\nnames: [cat, dog]\n")


def voc_boxes(root: Path, boxes: Sequence[tuple[float, float, float, float]], name: str = "cat") -> Path:
    for number, box in enumerate(boxes):
        picture(root / f"{number}.png")
        write(root / f"{number}.xml", voc_xml(f"{number}.png", voc_object(name, box)))
    return root


def corners_in_yolo(root: Path) -> tuple[Path, str]:
    relative = [(x1 / WIDTH, y1 / HEIGHT, x2 / WIDTH, y2 / HEIGHT) for x1, y1, x2, y2 in CORNERS]
    return yolo_lines(root, *[f"0 {' '.join(map(str, box))}\n" for box in relative]), ".txt: line 1"


def sizes_in_voc(root: Path) -> tuple[Path, str]:
    return voc_boxes(root, [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in CORNERS]), ".xml: object 1 (cat)"


def corners_in_hugging_face(root: Path) -> tuple[Path, str]:
    rows = [{"image": image(), "objects": {"bbox": [list(map(float, box))], "category": [0]}} for box in CORNERS]
    return parquet(root / "train.parquet", rows), ": row "


@pytest.mark.parametrize(
    ("make", "box_format", "reading", "remedy"),
    [
        (corners_in_yolo, None, "[x1, y1, x2, y2]", "[centre x, centre y, width, height] relative"),
        (sizes_in_voc, None, "[x, y, width, height]", "[x1, y1, x2, y2] in pixels"),
        (corners_in_hugging_face, "cxcywh", "[x1, y1, x2, y2]", "--box-format xyxy"),
    ],
)
def test_boxes_of_other_formats_in_another_order_are_told_with_their_places(
    make: Callable[[Path], tuple[Path, str]], box_format: str | None, reading: str, remedy: str, tmp_path: Path
) -> None:
    source, place = make(tmp_path)
    dataset = open_dataset(source, None, "skip", box_format=box_format)
    (finding,) = [each for each in dataset.findings if each.name.startswith("boxes-")]
    assert finding.name == "boxes-in-another-format"
    assert f"read as {reading}, 4 of 4 lie inside" in finding.found
    assert remedy in finding.remedy
    assert finding.examples
    assert all(place in example for example in finding.examples), finding.examples


def test_boxes_of_other_formats_that_are_right_or_clipped_are_not_called_another_format(tmp_path: Path) -> None:
    assert open_dataset(voc_boxes(tmp_path / "voc", CORNERS), None).findings == []
    assert (
        open_dataset(yolo_lines(tmp_path / "yolo", "0 0.5 0.5 0.5 0.5\n", "0 0.3 0.4 0.2 0.6\n"), None).findings == []
    )
    clipped = open_dataset(yolo_lines(tmp_path / "cut", "0 0.9 0.5 0.4 0.5\n", "0 0.3 0.4 0.2 0.6\n"), None).findings
    assert [finding.name for finding in clipped] == ["boxes-clipped"]
    assert clipped[0].examples == (f"{tmp_path}/cut/labels/0.txt: line 1",)


def test_a_line_of_yolos_that_is_there_twice_is_a_finding(tmp_path: Path) -> None:
    findings = outlined(
        open_dataset(yolo_lines(tmp_path, "0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5\n"), None)
    )
    (finding,) = findings
    assert (finding.name, finding.count) == ("repeated-lines", 1)
    assert finding.examples == (f"{tmp_path}/labels/0.txt: line 3, as line 1",)


def test_class_names_that_read_the_same_are_named_with_their_ids(tmp_path: Path) -> None:
    voc_boxes(tmp_path, [CORNERS[0]], "circle")
    write(tmp_path / "1.xml", voc_xml("1.png", voc_object("Circle", CORNERS[1])))
    picture(tmp_path / "1.png")
    (finding,) = outlined(open_dataset(tmp_path, None))
    assert (finding.name, finding.examples) == ("categories-alike", ("0 'Circle' and 1 'circle'",))


# -- datasets in which everything is broken


@pytest.mark.parametrize(
    "text", ["", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "<annotation><object/></annotation>"]
)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_voc_without_one_good_file_shows_the_first_reasons(text: str, on_error: str, tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / f"{number}.png")
        write(tmp_path / f"{number}.xml", text)
    with pytest.raises(QskdError, match=r"4 problem\(s\), the first:\n +\S*0\.xml.*: .*\n +\S*1\.xml"):
        open_dataset(tmp_path, None, on_error)  # type: ignore[arg-type]


def test_hugging_face_rows_without_one_good_show_the_first_reasons(tmp_path: Path) -> None:
    box = [1.0, 2.0, 10.0, 5.0]
    words = [{"image": image(), "objects": {"bbox": [box, box], "category": ["cat"]}} for _ in range(4)]
    source = parquet(tmp_path / "words" / "train.parquet", words, None)
    with pytest.raises(
        QskdError, match=r"4 problem\(s\), the first:\n +\S*train.parquet: row 0: 2 boxes and 1 classes\n"
    ):
        open_dataset(source, None, "skip")
    numbers = [{"image": image(), "objects": {"bbox": [box, box], "category": [0]}} for _ in range(4)]
    dataset = open_dataset(parquet(tmp_path / "numbers" / "train.parquet", numbers), None, "skip")
    with pytest.raises(QskdError, match=r"no usable annotation.*\n +\S*train.parquet: row 0: 2 boxes and 1 classes\n"):
        outlined(dataset)


def test_yolo_whose_lines_are_all_broken_is_not_a_set_of_backgrounds(tmp_path: Path) -> None:
    dataset = open_dataset(yolo_lines(tmp_path, "0 1 2 3\n", "0 30 10 20 15\n"), None, "skip")
    with pytest.raises(
        QskdError, match=r"no usable annotation: all 2 were left out.*\n +\S*0.txt: line 1: 4 numbers\n"
    ):
        outlined(dataset)


# -- names that YAML reads otherwise


@pytest.mark.parametrize(
    "text", ["names:\n  0: circle\n  1: square\n", "0: circle\n1: square\n", "- circle\n- square\n"]
)
def test_a_mapping_of_unquoted_numbers_is_read_in_a_file_of_names(text: str, tmp_path: Path) -> None:
    assert read_class_names(write(tmp_path / "names.yaml", text)) == {0: "circle", 1: "square"}
    voc_boxes(tmp_path / "voc", CORNERS, "square")
    dataset = open_dataset(tmp_path / "voc", None, classes=tmp_path / "names.yaml")
    assert names(dataset) == {0: "circle", 1: "square"}


@pytest.mark.parametrize("word", ["no", "yes", "1", "010", "null", "1.5", "2024-01-31"])
@pytest.mark.parametrize("form", ["names: [circle, {}]\n", "names:\n  0: circle\n  1: {}\n"])
def test_a_name_that_yaml_reads_as_something_else_is_to_be_written_in_quotes(
    form: str, word: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "names.yaml", form.format(word))
    with pytest.raises(QskdError, match="write it in quotes"):
        read_class_names(path)
    data = yolo_lines(tmp_path, "0 0.5 0.5 0.5 0.5\n")
    with pytest.raises(QskdError, match="write it in quotes"):
        open_dataset(write(data, f"train: images\n{form.format(word)}"), None)
    path.write_text(form.format(f'"{word}"'))
    assert read_class_names(path) == {0: "circle", 1: word}


# -- names that are odd on a terminal

ODD = [
    "\u202egnp",
    "red\x1b[31m",
    "two\nlines",
    "a\ttab",
    "Circle ",
    "no",
    "1",
    "caf\xe9",
    "\ufeffmark",
    "\x85",
    "a: b",
    "'\u2028",
]


def test_an_offered_class_map_is_shown_whole_and_reads_as_the_very_names() -> None:
    for entries in ({name: name for name in ODD[:6]}, dict.fromkeys(ODD[6:])):
        said = ready_class_map(entries)
        assert printable(said) == said
        recipe, _, option = said.partition("  or: --set ")
        assert parse_yaml(recipe, "pasted")["teacher"]["class_map"] == entries
        ((word),) = shlex.split(option)
        assert parse_yaml(word.partition("=")[2], "typed") == entries
        assert all(line.startswith("    ") for line in recipe.splitlines())


def test_a_message_about_classes_has_no_line_that_a_name_made() -> None:
    with pytest.raises(QskdError) as caught:
        map_classes(["cat", "two\nerror: all is lost"], ["cat", "dog\nnext: line"], {})
    assert not any(line.startswith(("error", "next")) for line in str(caught.value).splitlines())


def test_a_file_name_with_a_line_feed_or_escape_codes_keeps_to_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = picture(tmp_path / "a\nb\x1b[31m.png")
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(tmp_path), str(odd), "--dry-run"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert said.count("\n") == 1
    assert r"a\nb\x1b[31m.png" in said


def test_an_error_about_a_file_with_a_line_feed_in_its_name_begins_no_line_of_its_own(tmp_path: Path) -> None:
    source = yolo_lines(tmp_path, "0 0.5 0.5 0.5 0.5\n")
    picture(tmp_path / "images" / "a\nerror: b.png")
    write(tmp_path / "labels" / "a\nerror: b.txt", "7 0.5 0.5 0.5 0.5\n")
    with pytest.raises(QskdError) as caught:
        open_dataset(source, None)
    first, *others = str(caught.value).splitlines()
    assert r"a\nerror: b.txt: line 1: class 7" in first
    assert [line.partition(":")[0] for line in others] == ["  expected", "  what to do"]
