"""Small students learn a few photographs of COCO by heart: boxes, classes, resizing, losses and evaluation agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.overfit import FAMILIES, SAMPLE, choose, main, make_config, make_shards, overfit
from qskd.errors import QskdError
from qskd.from_recipe import ground_truth

IMAGES, ANNOTATIONS = SAMPLE / "train2017", SAMPLE / "annotations" / "instances_train2017.json"
needs_sample = pytest.mark.skipif(not ANNOTATIONS.is_file(), reason=f"no sample of COCO at {SAMPLE}")


def write_dataset(folder: Path, images: list[dict[str, Any]]) -> dict[str, Any]:
    """Grey or coloured pictures, each with objects given as (category, width, iscrowd)."""
    listed, annotations = [], []
    for number, image in enumerate(images, 1):
        name = f"{number}.png"
        size = image.get("size", (64, 64))
        Image.new("L" if image.get("grey") else "RGB", size).save(folder / name)
        listed.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        for category, width, crowd in image["objects"]:
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": crowd}
            annotations.append({**entry, "bbox": [0, 0, width, 40], "area": width * 40})
    return {"images": listed, "annotations": annotations, "categories": [{"id": i, "name": str(i)} for i in (1, 5, 9)]}


def test_the_choice_has_a_greyscale_a_portrait_and_a_landscape_and_then_new_categories(tmp_path: Path) -> None:
    document = write_dataset(
        tmp_path,
        [
            {"objects": [(1, 40, 0)]},
            {"objects": [(1, 40, 0)], "size": (64, 96)},
            {"objects": [(1, 40, 0)], "size": (96, 64)},
            {"objects": [(1, 40, 0)], "grey": True},
            {"objects": [(5, 40, 0), (9, 40, 0)]},
        ],
    )
    assert choose(document, tmp_path, 4) == [4, 2, 3, 5]
    document["images"].reverse()
    assert choose(document, tmp_path, 5) == [4, 2, 3, 5, 1]


def test_crowds_small_objects_empty_and_full_images_are_not_chosen(tmp_path: Path) -> None:
    objects = [[(1, 40, 1)], [(1, 40, 0), (1, 31, 0)], [], [(1, 40, 0)] * 9, [(1, 40, 0)] * 8]
    document = write_dataset(tmp_path, [{"objects": entries} for entries in objects])
    assert choose(document, tmp_path, 1) == [5]
    with pytest.raises(QskdError, match="1 images"):
        choose(document, tmp_path, 2)


def test_images_that_are_not_there_are_not_chosen(tmp_path: Path) -> None:
    document = write_dataset(tmp_path, [{"objects": [(1, 40, 0)]}, {"objects": [(5, 40, 0)]}])
    (tmp_path / document["images"][0]["file_name"]).unlink()
    assert choose(document, tmp_path, 1) == [2]


@needs_sample
def test_the_eight_images_are_greyscale_and_colour_portrait_and_landscape_with_gapped_category_ids(
    tmp_path: Path,
) -> None:
    truth = ground_truth(make_shards(ANNOTATIONS, IMAGES, tmp_path, 8))
    names = {image["id"]: image["file_name"] for image in json.loads(ANNOTATIONS.read_text())["images"]}
    modes = {Image.open(IMAGES / names[number]).mode for number in truth.image_ids.tolist()}
    assert modes == {"L", "RGB"}
    assert (truth.heights > truth.widths).any()
    assert (truth.heights < truth.widths).any()
    assert len(truth.categories) == 80
    assert max(number for number, _ in truth.categories) == 90
    assert len(set(truth.category_ids.tolist())) >= 10


@pytest.mark.slow
@needs_sample
@pytest.mark.parametrize(("family", "steps"), [("conditional_detr", 200), ("deformable_detr", 80)])
def test_a_student_with_random_weights_learns_two_photographs_by_heart(family: str, steps: int, tmp_path: Path) -> None:
    """Without dropout, which such few steps don't forgive: AP50 0.85 (`python -m benchmarks.overfit` has it, and 400 steps)."""
    shards = make_shards(ANNOTATIONS, IMAGES, tmp_path, 2)
    proof = overfit(make_config(shards, family, steps, ["student.dropout=0"]), tmp_path / "student")
    assert not proof.complaint
    assert proof.steps == steps


@needs_sample
def test_a_student_that_learned_nothing_fails_the_proof_and_is_kept_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "student"
    assert main(["--family", "deformable_detr", "--steps", "1", "--count", "1", "--out", str(kept)]) == 1
    assert "FAILED: AP50" in capsys.readouterr().out
    assert (kept / "model.safetensors").is_file()


def test_every_family_has_its_own_dropout_but_one_that_could_not_learn_by_heart_with_it() -> None:
    taken = {family: make_config("shards", family).student.dropout for family in FAMILIES}
    assert taken.pop("table-transformer") == 0
    assert set(taken.values()) == {None}
    assert make_config("shards", "table-transformer", overrides=["student.dropout=0.1"]).student.dropout == 0.1


def test_missing_annotations_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--family", "deformable_detr", "--annotations", str(tmp_path / "none.json")]) == 1
    assert "none.json: no such file" in capsys.readouterr().err
