"""The synthetic dataset: deterministic by image, boxes tight round what is drawn, a valid COCO dataset."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from qskd.datasets.coco import read_coco
from qskd.datasets.shapes import _OUTLINES, CATEGORY_IDS, EASY, TWINS, ShapesConfig, _mask, make_shapes, render
from qskd.errors import QskdError

HARD = ShapesConfig(
    images=12,
    size=96,
    max_objects=8,
    classes="hard",
    crowding=0.5,
    occlusion=0.6,
    clutter=1.0,
    noise=1.0,
    max_object=40,
)


def test_an_image_depends_only_on_configuration_and_number() -> None:
    alone, objects = render(HARD, 7)
    again, same_objects = render(HARD.model_copy(update={"images": 9999, "first_image": 5}), 7)
    np.testing.assert_array_equal(alone, again)
    assert objects == same_objects
    assert not np.array_equal(alone, render(HARD, 8)[0])
    assert not np.array_equal(alone, render(HARD.model_copy(update={"seed": 1}), 7)[0])


def test_an_image_is_the_same_in_another_process() -> None:
    code = "from qskd.datasets.shapes import *; p, o = render(ShapesConfig(), 3); print(int(p.astype(int).sum()), o)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    pixels, objects = render(ShapesConfig(), 3)
    assert printed.strip() == f"{int(pixels.astype(int).sum())} {objects}"


def test_boxes_are_tight_round_the_pixels_a_shape_changed() -> None:
    """One object, no noise: what differs from a picture drawn without objects is the shape."""
    quiet = ShapesConfig(min_objects=1, max_objects=1, noise=0.0, clutter=0.0)
    for index in range(60):
        pixels, (found,) = render(quiet, index)
        left, top, width, height = found["bbox"]
        x0, y0, x1, y1 = int(left), int(top), int(np.ceil(left + width)), int(np.ceil(top + height))
        # Neighbours differ little in the smooth background and much at the shape's edge.
        steps_x = np.abs(np.diff(pixels.astype(int), axis=1)).sum(axis=2) > 45
        steps_y = np.abs(np.diff(pixels.astype(int), axis=0)).sum(axis=2) > 45
        columns, rows = np.flatnonzero(steps_x.any(axis=0)), np.flatnonzero(steps_y.any(axis=1))
        assert x0 - 1 <= columns[0] <= x0 + 1
        assert x1 - 3 <= columns[-1] <= x1
        assert y0 - 1 <= rows[0] <= y0 + 1
        assert y1 - 3 <= rows[-1] <= y1
        assert 0 < found["area"] <= width * height


def test_objects_keep_to_the_limits() -> None:
    config = ShapesConfig(min_objects=2, max_objects=3, min_object=14, max_object=20)
    for index in range(100):
        _, objects = render(config, index)
        assert len(objects) <= 3
        for found in objects:
            left, top, width, height = found["bbox"]
            assert min(left, top) >= 0
            assert max(left + width, top + height) <= 64
            assert min(width, height) >= 5
            assert max(width, height) <= 21


@pytest.mark.parametrize("name", EASY + TWINS)
def test_every_shape_fits_its_circle_and_is_one_solid_outline(name: str) -> None:
    outline = _OUTLINES[name]
    assert np.linalg.norm(outline, axis=1).max() <= 1 + 1e-9
    mask, _ = _mask(outline * 30 + 40)
    share = (np.asarray(mask) > 0).sum() / 9 / (np.pi * 30**2)
    following = np.roll(outline, -1, axis=0)
    area = abs((outline[:, 0] * following[:, 1] - outline[:, 1] * following[:, 0]).sum()) / 2 / np.pi  # shoelace
    assert share == pytest.approx(area, rel=0.08)


def test_classes_differ_when_small() -> None:
    """At 12 px no two easy classes are the same picture, whatever the turn: their sorted-by-angle profiles differ."""
    angles = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    masks = {
        name: [
            np.asarray(
                _mask(_OUTLINES[name] @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) * 6 + 8)[0].resize(
                    (36, 36)
                )
            )
            > 127
            for a in angles
        ]
        for name in EASY
    }
    for one in EASY:
        for other in EASY:
            if one < other:
                overlap = max((masks[one][0] & m).sum() / (masks[one][0] | m).sum() for m in masks[other])
                assert overlap < 0.93, (one, other, overlap)


def test_hidden_objects_are_neither_drawn_nor_annotated() -> None:
    crowded = ShapesConfig(min_objects=30, max_objects=30, occlusion=1.0, crowding=1.0, size=64)
    counts = [len(render(crowded, index)[1]) for index in range(10)]
    assert max(counts) < 30
    assert min(counts) > 5


def test_the_folder_is_a_coco_dataset(tmp_path: Path) -> None:
    clean = HARD.model_copy(update={"noise": 0.0})
    annotations, images = make_shapes(clean, tmp_path)
    dataset = read_coco(annotations, images)
    samples = list(dataset.samples())
    assert dataset.problems == []
    assert [category.name for category in dataset.categories] == list(EASY + TWINS)
    assert [category.id for category in dataset.categories] == list(CATEGORY_IDS)
    assert len(samples) == 12
    assert {(sample.width, sample.height) for sample in samples} == {(96, 96)}
    decoded = np.asarray(Image.open(images / samples[3].file_name)).astype(int)
    assert np.abs(decoded - render(clean, 3)[0]).mean() < 4  # JPEG


def test_a_longer_dataset_begins_with_the_shorter_and_parts_can_be_made_apart(tmp_path: Path) -> None:
    short, long = ShapesConfig(images=4), ShapesConfig(images=8)
    part = ShapesConfig(images=4, first_image=4)
    folders = [make_shapes(config, tmp_path / str(n))[1] for n, config in enumerate((short, long, part))]
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[1] == contents[0] | contents[2]
    assert not contents[0].keys() & contents[2].keys()


def test_a_folder_made_before_is_kept_and_another_dataset_is_not_overwritten(tmp_path: Path) -> None:
    annotations, images = make_shapes(ShapesConfig(images=2), tmp_path)
    before = annotations.stat().st_mtime_ns
    assert make_shapes(ShapesConfig(images=2), tmp_path) == (annotations, images)
    assert annotations.stat().st_mtime_ns == before
    with pytest.raises(QskdError, match="another dataset"):
        make_shapes(ShapesConfig(images=3), tmp_path)
    annotations.write_text(json.dumps({"images": []}))
    with pytest.raises(QskdError, match="another dataset"):
        make_shapes(ShapesConfig(images=2), tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"min_objects": 6}, {"min_object": 31}, {"max_object": 61}, {"crowding": 1.5}, {"colour": 1}, {"images": 0}],
)
def test_impossible_configurations_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ShapesConfig.model_validate(wrong)
