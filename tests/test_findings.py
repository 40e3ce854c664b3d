"""What looks wrong in a dataset is said when it is prepared, kept in its manifest, and an error where that is asked for."""

from __future__ import annotations

import copy
import json
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import recipe, silent_student
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.demo.quickstart import TEACHER
from pipelines.prepare import describe, prepare
from pipelines.run.resolve import resolve
from pipelines.training.plan import make_plan
from pipelines.tuning.driver import plan_without_cache
from qskd.checks import check_shards
from qskd.config import ResizeConfig
from qskd.datasets.coco import read_coco
from qskd.datasets.findings.finding import Finding
from qskd.datasets.findings.splits import MOST_KEPT, beyond_reach, packed_pictures, unpacked_pictures
from qskd.datasets.manifest import Manifest, load_manifest
from qskd.datasets.samples import Category, Sample
from qskd.datasets.shards import outlined, write_shards
from qskd.detectors import save_detector
from qskd.errors import QskdError

Document = dict[str, Any]
Change = Callable[[Document], Any]
WIDTH, HEIGHT = 120, 80
BOXES = [[5, 4, 30, 40], [70, 30, 45, 45], [2, 50, 60, 28], [80, 2, 38, 30], [40, 20, 60, 50]]  # [x, y, width, height]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/: six pictures, all different."""
    root = tmp_path_factory.mktemp("findings")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(1, 7):
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(root / "images" / f"{number}.png")
    (root / "images" / "copy.png").write_bytes((root / "images" / "2.png").read_bytes())
    return root


def document() -> Document:
    """Six images of five objects, two categories, nothing wrong."""
    images = [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in range(1, 7)]
    places = [(image["id"], box) for image in images for box in BOXES]
    annotations: list[Document] = [
        {"id": n, "image_id": image_id, "category_id": 1 + n % 2, "bbox": list(map(float, box))}
        for n, (image_id, box) in enumerate(places, 1)
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cup", "supercategory": "things"}, {"id": 2, "name": "pen"}],
    }


def written(root: Path, folder: Path, change: Change | None = None) -> Path:
    """The document, changed, as a file."""
    tree = copy.deepcopy(document())
    if change:
        change(tree)
    path = folder / "a.json"
    path.write_text(json.dumps(tree))
    return path


def prepared(root: Path, folder: Path, change: Change | None = None, **options: Any) -> Manifest:
    prepare(written(root, folder, change), root / "images", str(folder / "s"), quiet=True, **options)
    return load_manifest(str(folder / "s"))


def each_box(convert: Callable[[float, float, float, float], list[float]]) -> Change:
    def change(tree: Document) -> None:
        for entry in tree["annotations"]:
            entry["bbox"] = convert(*entry["bbox"])

    return change


def first(**values: Any) -> Change:
    """Of annotation 1."""
    return lambda tree: tree["annotations"][0].update(values)


def one_name(tree: Document) -> None:
    tree["images"][2]["file_name"] = "1.png"


def one_content(tree: Document) -> None:
    tree["images"][2]["file_name"] = "copy.png"


def parent(tree: Document) -> None:
    tree["categories"].append({"id": 0, "name": "things", "supercategory": "none"})


def backgrounds(tree: Document) -> None:
    tree["annotations"] = [entry for entry in tree["annotations"] if entry["image_id"] < 5]


def crowded(tree: Document) -> None:
    more = [{"id": 100 + n, "image_id": 4, "category_id": 1, "bbox": [n % 90, 5, 20, 30 + n // 90]} for n in range(120)]
    tree["annotations"] += more


def alike(tree: Document) -> None:
    tree["categories"].append({"id": 3, "name": "Cup "})
    tree["annotations"][0]["category_id"] = 3


def twice(tree: Document) -> None:
    tree["annotations"].append({**tree["annotations"][7], "id": 100})


def crowds_only(tree: Document) -> None:
    for entry in tree["annotations"]:
        entry["iscrowd"] = 1


# What is changed; the one finding there must be, how many of it, and words that it must hold.
WRONG: dict[str, tuple[Change, str, int, list[str]]] = {
    "one file under two ids": (one_name, "one-file-many-ids", 1, ["1.png", "images 1, 3"]),
    "one picture under two names": (one_content, "same-pictures", 1, ["image 2 (2.png)", "image 3 (copy.png)"]),
    "boxes relative, x y w h": (
        each_box(lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]), "relative-boxes", 30, ["all 30", "0..1"],
    ),
    "boxes in percent": (
        each_box(lambda x, y, w, h: [0.4 * x, 0.4 * y, 0.4 * w, 0.4 * h]), "boxes-in-one-corner", 30, ["upper left quarter"],
    ),
    "a box under a pixel": (first(bbox=[50, 40, 0.5, 20]), "boxes-under-a-pixel", 1, ["1 of 30", "image 1 (1.png)"]),
    "a box clipped": (first(bbox=[90, 40, 50, 20]), "boxes-clipped", 1, ["1 of 30", "20.0 px", "image 1, annotation 1"]),
    "an annotation to ignore": (first(ignore=1), "marked-to-ignore", 1, ["image 1, annotation 1", "iscrowd"]),
    "a difficult one": (first(attributes={"difficult": "1"}), "marked-to-ignore", 1, ["image 1, annotation 1"]),
    "a rotated box": (first(attributes={"rotation": 37.5}), "rotated-boxes", 1, ["annotation 1 (by 37.5)"]),
    "a box of another mode": (first(bbox_mode=0), "boxes-of-another-mode", 1, ["annotation 1 (0)"]),
    "Roboflow's parent": (parent, "unused-categories", 1, ["0 things (parent of others)", "--leave-out things"]),
    "two names that read the same": (alike, "categories-alike", 1, ["1 'cup' and 3 'Cup '"]),
    "an object that is there twice": (twice, "repeated-objects", 1, ["image 2 (2.png): category 1 at [2, 50, 62, 78] 2 times"]),
    "backgrounds": (backgrounds, "images-without-objects", 2, ["2 of 6", "image 5 (5.png)", "image 6 (6.png)"]),
    "no annotations": (lambda tree: tree.update(annotations=[]), "no-objects", 6, ["not one of 6 images"]),
    "crowds alone": (crowds_only, "no-objects", 6, ["not one of 6 images"]),
    "a crowded image": (crowded, "crowded-images", 1, ["100 objects", "at most 125", "image 4 (4.png): 125"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_looks_wrong_is_said_with_its_count_and_examples_and_kept_in_the_manifest(
    case: str, root: Path, tmp_path: Path
) -> None:
    change, name, count, words = WRONG[case]
    manifest = prepared(root, tmp_path, change)
    assert [(finding.name, finding.count) for finding in manifest.findings] == [(name, count)]
    (finding,) = manifest.findings
    assert finding.meaning
    assert finding.remedy
    said = describe(manifest, "s")
    assert all(word in said for word in [name, finding.meaning, f"what to do: {finding.remedy}", *words]), said


def test_a_dataset_in_order_has_no_findings(root: Path, tmp_path: Path) -> None:
    manifest = prepared(root, tmp_path)
    assert manifest.findings == ()
    assert describe(manifest, "s").endswith("nothing looks wrong")
    assert (manifest.most_objects, manifest.most_objects_in) == (5, 1)


READ = {
    "[x1, y1, x2, y2]": lambda x, y, w, h: [x, y, x + w, y + h],
    "[centre x, centre y, width, height]": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
    "[y1, x1, y2, x2]": lambda x, y, w, h: [y, x, y + h, x + w],
}


@pytest.mark.parametrize("reading", READ)
def test_boxes_in_another_format_are_told_by_the_reading_that_fits(reading: str, root: Path, tmp_path: Path) -> None:
    change = each_box(READ[reading])
    if not reading.startswith("[centre"):  # of the others some lie far outside, which stops by default, with the reason
        with pytest.raises(QskdError) as caught:
            prepared(root, tmp_path, change)
        assert "far outside its image" in str(caught.value)
        assert f"read as {reading}, 30 of 30 lie inside" in str(caught.value)
    found = {finding.name: finding for finding in prepared(root, tmp_path, change, on_error="skip").findings}
    assert f"read as {reading}, 30 of 30 lie inside" in found["boxes-in-another-format"].found
    assert "of 30 boxes reach outside their images, by up to" in found["boxes-in-another-format"].found


@pytest.mark.parametrize("reading", READ)
def test_relative_boxes_in_another_format_are_told_by_both(reading: str, root: Path, tmp_path: Path) -> None:
    shape = (HEIGHT, WIDTH) * 2 if reading.startswith("[y1") else (WIDTH, HEIGHT) * 2

    def relative(*box: float) -> list[float]:
        return [value / side for value, side in zip(READ[reading](*box), shape, strict=True)]

    found = {finding.name: finding for finding in prepared(root, tmp_path, each_box(relative)).findings}
    assert found["relative-boxes"].count == 30
    if not reading.startswith("[y1"):  # of squares, which relative numbers are of, either way round fits
        assert f"read as {reading} of numbers relative to the image's size" in found["boxes-in-another-format"].found


@pytest.mark.parametrize(
    "box", [[130, 10, 20, 20], [100, 10, 60, 20], [10, -50, 20, 60], [-90, 10, 320, 20], [0, 0, 1e300, 5]]
)
def test_a_box_far_outside_its_image_is_an_error_and_left_out_by_skip(
    box: list[float], root: Path, tmp_path: Path
) -> None:
    with pytest.raises(QskdError, match=r"a\.json: image 1, annotation 1: bbox .*outside its image"):
        prepared(root, tmp_path, first(bbox=box))
    manifest = prepared(root, tmp_path, first(bbox=box), on_error="skip")
    assert manifest.num_objects == 29
    assert [problem["dropped"] for problem in manifest.problems] == ["the annotation"]


@pytest.mark.parametrize("case", WRONG)
def test_strict_refuses_what_is_not_accepted_and_leaves_nothing(case: str, root: Path, tmp_path: Path) -> None:
    change, name, _, words = WRONG[case]
    with pytest.raises(QskdError) as caught:
        prepared(root, tmp_path, change, strict=True)
    assert all(word in str(caught.value) for word in [name, f"--accept {name}", *words])
    assert not (tmp_path / "s").exists() or os.listdir(tmp_path / "s") == []
    assert [each.name for each in prepared(root, tmp_path, change, strict=True, accept=[name]).findings] == [name]


def test_strict_tells_of_the_annotations_before_it_reads_pictures(tmp_path: Path, root: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(QskdError, match="unused-categories"):
        prepare(written(root, tmp_path, parent), tmp_path / "images", str(tmp_path / "s"), quiet=True, strict=True)


def test_a_dry_run_tells_what_looks_wrong_in_the_annotations(tmp_path: Path, root: Path) -> None:
    path = written(root, tmp_path, parent)
    words = ["prepare", str(path), str(root / "images"), str(tmp_path / "s"), "--dry-run"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert "unused-categories" in result.output
    assert CliRunner().invoke(app, [*words, "--strict"]).exit_code != 0
    assert CliRunner().invoke(app, [*words, "--strict", "--leave-out", "things"]).exit_code == 0


def test_a_category_can_be_left_out_with_its_annotations(root: Path, tmp_path: Path) -> None:
    manifest = prepared(root, tmp_path, parent, leave_out=["things", "pen"])
    assert [(category.id, category.name) for category in manifest.categories] == [(1, "cup")]
    assert (manifest.num_images, manifest.num_objects) == (6, 15)
    assert {problem["dropped"] for problem in manifest.problems} == {
        "it and its 0 annotations",
        "it and its 15 annotations",
    }
    with pytest.raises(QskdError, match="--leave-out thing: no category"):
        prepared(root, tmp_path, parent, leave_out=["thing"])


def test_the_command_that_makes_lost_shards_again_leaves_out_what_was_left_out(root: Path, tmp_path: Path) -> None:
    """With the category in it the shards are others, and a cache of a day's work is no longer theirs."""
    before = prepared(root, tmp_path, parent, leave_out=["things", "pen"])
    (tmp_path / "s" / before.shards[0].file).unlink()
    with pytest.raises(QskdError) as caught:
        check_shards(str(tmp_path / "s"), before)
    _, *words = shlex.split(caught.value.remedy.split("`")[1])
    assert "--on-error" not in words
    names = {before.source: str(written(root, tmp_path, parent)), "IMAGES": str(root / "images")}
    assert CliRunner().invoke(app, [names.get(word, word) for word in words]).exit_code == 0
    assert load_manifest(str(tmp_path / "s")).fingerprint == before.fingerprint


@dataclass
class Other:
    """A source of another kind, with a finding of its own."""

    findings: list[Finding] = field(default_factory=lambda: [Finding("turned", 2, "2 pictures are turned", ("x.jpg",))])
    source: str = "other"
    source_sha256: str = "0" * 64
    categories: tuple[Category, ...] = (Category(1, "cup"),)
    problems: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return 1

    def samples(self) -> Iterator[Sample]:
        box, one = np.array([[0.1, 0.1, 0.5, 0.6]], np.float32), np.ones(1, np.int64)
        yield Sample(1, "x.jpg", 9, 9, b"picture", box, one, one.astype(np.float32), np.zeros(1, np.bool_))


def test_any_source_may_add_findings_and_its_samples_are_looked_at_too(tmp_path: Path) -> None:
    manifest = write_shards(Other(), str(tmp_path))
    assert [finding.name for finding in load_manifest(str(tmp_path)).findings] == ["turned", "relative-boxes"]
    assert "turned: 2 pictures are turned; the first: x.jpg" in describe(manifest, "s")
    with pytest.raises(QskdError, match="2 pictures are turned"):
        write_shards(Other(), str(tmp_path / "b"), strict=True, accept=["relative-boxes"])


def test_a_manifest_from_before_findings_is_read(root: Path, tmp_path: Path) -> None:
    before = prepared(root, tmp_path)
    tree = json.loads(before.to_json())
    for name in ("most_objects", "most_objects_in", "findings", "pictures"):
        del tree[name]
    old = Manifest.from_json(json.dumps(tree), "manifest.json")
    assert old.fingerprint == before.fingerprint
    assert (old.most_objects, old.findings, old.pictures) == (None, (), "")


@pytest.mark.parametrize("pictures", ["!", "AAAA", "AAAAAAAAAAAAAAAAAAAAAA==" * 7])
def test_picture_hashes_that_are_none_are_refused(pictures: str, root: Path, tmp_path: Path) -> None:
    tree = json.loads(prepared(root, tmp_path).to_json()) | {"pictures": pictures}
    with pytest.raises(QskdError, match="not a manifest: `pictures`"):
        Manifest.from_json(json.dumps(tree), "manifest.json")


# -- everything left out


def test_a_skip_that_leaves_no_image_shows_the_first_problems(root: Path, tmp_path: Path) -> None:
    def backslashes(tree: Document) -> None:
        for image in tree["images"]:
            image["file_name"] = f"images\\{image['file_name']}"

    with pytest.raises(
        QskdError, match=r"no usable image; 6 problem\(s\), the first:\n +\S*a\.json: image 1 .*no such file"
    ):
        prepared(root, tmp_path, backslashes, on_error="skip")


def test_a_skip_that_leaves_no_annotation_shows_the_first_problems(root: Path, tmp_path: Path) -> None:
    def floats(tree: Document) -> None:
        for entry in tree["annotations"]:
            entry["image_id"] = str(entry["image_id"])

    with pytest.raises(
        QskdError, match=r"no usable annotation: all 30 were left out; 30 problem\(s\)[\s\S]*`image_id` is '1'"
    ):
        prepared(root, tmp_path, floats, on_error="skip")
    assert os.listdir(tmp_path / "s") == []
    path = written(root, tmp_path, floats)
    words = ["prepare", str(path), str(root / "images"), str(tmp_path / "s"), "--on-error", "skip", "--dry-run"]
    assert isinstance(CliRunner().invoke(app, words).exception, QskdError)


# -- at a training's start


def split(root: Path, folder: Path, name: str, numbers: range, change: Change | None = None) -> str:
    def chosen(tree: Document) -> None:
        tree["images"] = [image for image in tree["images"] if image["id"] in numbers]
        tree["annotations"] = [entry for entry in tree["annotations"] if entry["image_id"] in numbers]
        if change:
            change(tree)

    (folder / name).mkdir()
    prepared(root, folder / name, chosen)
    return str(folder / name / "s")


def notices_of(train: str, val: str, folder: Path, queries: int = 6, init: str = "") -> list[str]:
    config = recipe(
        {"queries": queries, "init": init}, f"data.train={train}", f"data.val={val}", f"output={folder}/runs"
    )
    return make_plan(resolve(config, "train"), "train", dry=True).data_notices


def test_pictures_in_both_splits_are_told_by_their_ids(root: Path, tmp_path: Path) -> None:
    train = split(root, tmp_path, "train", range(1, 5))
    apart, shared = split(root, tmp_path, "apart", range(5, 7)), split(root, tmp_path, "shared", range(4, 7))
    assert notices_of(train, apart, tmp_path) == []
    (said,) = notices_of(train, shared, tmp_path)
    assert "share 1 of 3 validation pictures, byte for byte (image 4 of val is image 4 of train)" in said
    (said,) = notices_of(train, train, tmp_path)
    assert "data.train and data.val are the same" in said


def test_of_many_pictures_the_same_part_is_kept_in_both_splits() -> None:
    contents = np.random.default_rng(0).integers(1, 2**64, MOST_KEPT + 50_000, np.uint64)
    train = unpacked_pictures(packed_pictures(contents, np.arange(len(contents))))
    val = unpacked_pictures(packed_pictures(contents[:2000], np.arange(2000)))
    assert len(train) == MOST_KEPT
    assert len(val) == 2000
    share = MOST_KEPT / len(contents)
    assert len(train.keys() & val.keys()) == pytest.approx(2000 * share, rel=0.1)
    assert all(train[content] == val[content] for content in train.keys() & val.keys())


def test_more_objects_than_queries_or_than_ap_counts_are_told(root: Path, tmp_path: Path) -> None:
    train, val = split(root, tmp_path, "train", range(1, 4)), split(root, tmp_path, "val", range(4, 7), crowded)
    (few, counted) = notices_of(train, val, tmp_path, queries=6)
    assert "data.val has images with up to 125 objects (image 4)" in few
    assert "data.train" not in few
    assert "student.queries=125" in few
    assert "AP counts 100 detections" in counted
    assert notices_of(train, val, tmp_path, queries=125) == [counted]
    assert "data.train has images with up to 5 objects (image 1)" in notices_of(train, val, tmp_path, queries=4)[0]


def test_of_a_student_from_a_checkpoint_the_checkpoints_queries_count(root: Path, tmp_path: Path) -> None:
    train, val = split(root, tmp_path, "train", range(1, 4)), split(root, tmp_path, "val", range(4, 7), crowded)
    made = silent_student(recipe({"queries": 7}).student, tuple(load_manifest(train).labels), 0)
    save_detector(made.eval(), tmp_path / "start", ResizeConfig(size=64))
    (few, _) = notices_of(
        train, val, tmp_path, init=str(tmp_path / "start"), queries=300
    )  # what a recipe says has no effect
    assert "data.val has images with up to 125 objects (image 4)" in few
    assert "at most the 7 queries of student.init" in few
    assert "student.queries" not in few


@pytest.mark.parametrize(
    ("queries", "most", "said"),
    [
        (7, 100, ["100 can be found: --max-detections 125", "the detector has 7 queries"]),
        (7, 200, ["the detector has 7 queries"]),
        (125, 200, []),
    ],
)
def test_evaluate_says_which_objects_can_not_be_found(
    queries: int, most: int, said: list[str], root: Path, tmp_path: Path
) -> None:
    val = load_manifest(split(root, tmp_path, "val", range(4, 7), crowded))
    found = beyond_reach("DATA", val, queries, most)
    assert len(found) == len(said)
    for notice, words in zip(found, said, strict=True):
        assert "up to 125 objects (image 4)" in notice
        assert words in notice


@pytest.mark.parametrize("change", [lambda tree: tree.update(annotations=[]), crowds_only], ids=["none", "crowds"])
def test_training_without_a_single_object_is_refused(change: Change, root: Path, tmp_path: Path) -> None:
    empty, whole = split(root, tmp_path, "empty", range(1, 4), change), split(root, tmp_path, "whole", range(4, 7))
    with pytest.raises(QskdError, match=r"empty/s: no object in 3 images[\s\S]*at least one object, to learn from"):
        notices_of(empty, whole, tmp_path)
    (said,) = notices_of(whole, empty, tmp_path)
    assert "data.val has no objects: AP can't be measured" in said
    fields = (f"data.train={whole}", f"data.val={empty}", f"teacher.path={TEACHER}")
    config = recipe(None, *fields, "teacher.class_map={cup: circle, pen: square}")
    with pytest.raises(QskdError, match="an AP to compare trials by"):
        plan_without_cache(resolve(config, "distill"))


def test_what_an_outline_tells_is_what_the_samples_tell(root: Path, tmp_path: Path) -> None:
    """But for what only pictures show."""
    for change, name, _, _ in WRONG.values():
        findings = outlined(read_coco(written(root, tmp_path, change), root / "images"))
        assert [finding.name for finding in findings] == ([name] if name != "same-pictures" else [])
