"""Predictions equal those of plain transformers on the saved folder: what is measured is what is exported."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FAMILIES, LABELS, SIZE, recipe, shake, silent_student
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from pipelines.inspection import explain, predict
from qskd.config import ResizeConfig
from qskd.datasets.pictures.joining import pad
from qskd.datasets.views import View, view_image
from qskd.detectors import Detector, Preprocessing, load_detector, read_preprocessing, save_detector
from qskd.errors import QskdError
from qskd.evaluation.inference import predict_batch, predict_image

SQUARE = ResizeConfig(size=SIZE)
KEEP_ASPECT = ResizeConfig(mode="shortest_edge", size=48, longest=80)


def picture(height: int = 90, width: int = 120, seed: int = 0) -> np.ndarray:
    """Smooth colours and a few rectangles: resizing filters differ visibly on it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    image = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    image[10:40, 20:70] = rng.integers(0, 256, 3)
    return image


@pytest.fixture(scope="module", params=FAMILIES)
def detector(request: pytest.FixtureRequest) -> Detector:
    made = silent_student(recipe(FAMILIES[request.param]).student, LABELS, seed=3)
    shake(made, 3)
    return made.eval()


@pytest.mark.parametrize("size", [(90, 120), (131, 47), (SIZE, SIZE)])
def test_equals_transformers_on_the_saved_folder(detector: Detector, size: tuple[int, int], tmp_path: Path) -> None:
    save_detector(detector, tmp_path / "saved", SQUARE)
    image = picture(*size)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "saved").eval()
    inputs = processor(images=Image.fromarray(image), return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    (expected,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[size])

    found = predict_image(load_detector(tmp_path / "saved"), image, read_preprocessing(tmp_path / "saved"), range(3))
    order = expected["scores"].argsort(descending=True, stable=True)
    assert len(found.scores) == 6 * 3  # every (query, class) pair: fewer than 100
    assert len(set(found.scores.tolist())) == 18  # no ties: the order is one
    np.testing.assert_allclose(found.scores, expected["scores"][order], atol=1e-6)
    np.testing.assert_allclose(found.boxes_xyxy, expected["boxes"][order], atol=1e-3)
    np.testing.assert_array_equal(found.category_ids, expected["labels"][order])


def test_best_first_and_none_below_the_threshold(detector: Detector) -> None:
    everything = predict_image(detector, picture(), Preprocessing(SQUARE), range(3))
    assert (np.diff(everything.scores) <= 0).all()
    threshold = float(np.median(everything.scores))
    some = predict_image(detector, picture(), Preprocessing(SQUARE), range(3), threshold)
    assert 0 < len(some.scores) < len(everything.scores)
    kept = everything.scores >= threshold
    for name, value in vars(everything).items():
        np.testing.assert_array_equal(getattr(some, name), value[kept], err_msg=name)
    none = predict_image(detector, picture(), Preprocessing(SQUARE), range(3), threshold=1.0)
    assert none.boxes_xyxy.shape == (0, 4)


def test_slots_choose_and_order_the_classes(detector: Detector) -> None:
    everything = predict_image(detector, picture(), Preprocessing(SQUARE), range(3))
    chosen = predict_image(detector, picture(), Preprocessing(SQUARE), (2, 0))
    for position, slot in enumerate((2, 0)):
        own, mine = everything.category_ids == slot, chosen.category_ids == position
        np.testing.assert_allclose(chosen.scores[mine], everything.scores[own], rtol=1e-6)
        np.testing.assert_array_equal(chosen.boxes_xyxy[mine], everything.boxes_xyxy[own])
    assert set(chosen.category_ids.tolist()) == {0, 1}


IMAGES = [picture(90, 120, 0), picture(131, 47, 1), picture(64, 64, 2)]


def batch_of(resize: ResizeConfig) -> dict[str, np.ndarray]:
    pixels, sizes = pad([view_image(image, View.IDENTITY, resize) for image in IMAGES])
    original_sizes = np.array([image.shape[:2] for image in IMAGES])
    return {"images": pixels, "sizes": sizes, "original_sizes": original_sizes, "image_ids": np.array([5, 3, 9])}


def test_a_batch_equals_each_image_alone(detector: Detector) -> None:
    together = predict_batch(detector, batch_of(SQUARE), Preprocessing(SQUARE), (70, 80, 90))
    assert together.image_ids.tolist() == [5] * 18 + [3] * 18 + [9] * 18
    for image_id, image in zip((5, 3, 9), IMAGES, strict=True):
        alone = predict_image(detector, image, Preprocessing(SQUARE), range(3))
        mine = together.image_ids == image_id
        np.testing.assert_allclose(together.scores[mine], alone.scores, atol=1e-6)
        np.testing.assert_array_equal(together.category_ids[mine], np.array([70, 80, 90])[alone.category_ids])
        np.testing.assert_allclose(together.boxes_xyxy[mine], alone.boxes_xyxy, atol=1e-3)


def test_a_padded_batch_equals_transformers(detector: Detector, tmp_path: Path) -> None:
    save_detector(detector, tmp_path / "saved", KEEP_ASPECT)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "saved").eval()
    inputs = processor(images=[Image.fromarray(image) for image in IMAGES], return_tensors="pt")
    assert not inputs["pixel_mask"].all()
    with torch.no_grad():
        outputs = model(**inputs)
    target_sizes = [image.shape[:2] for image in IMAGES]
    expected = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=target_sizes)
    found = predict_batch(detector, batch_of(KEEP_ASPECT), Preprocessing(KEEP_ASPECT), range(3))
    for number, (image_id, its) in enumerate(zip((5, 3, 9), expected, strict=True)):
        mine = slice(18 * number, 18 * (number + 1))
        assert set(found.image_ids[mine].tolist()) == {image_id}
        np.testing.assert_allclose(found.scores[mine], its["scores"], atol=1e-6)
        np.testing.assert_array_equal(found.category_ids[mine], its["labels"])
        np.testing.assert_allclose(found.boxes_xyxy[mine], its["boxes"], atol=1e-3)


def test_an_empty_batch_has_no_detections(detector: Detector) -> None:
    empty: dict[str, np.ndarray] = {
        "images": np.zeros((0, 1, 1, 3), np.uint8),
        "sizes": np.zeros((0, 2), np.int32),
        "original_sizes": np.zeros((0, 2), np.int32),
        "image_ids": np.zeros(0, np.int64),
    }
    found = predict_batch(detector, empty, Preprocessing(SQUARE), range(3))
    assert found.boxes_xyxy.shape == (0, 4)


@pytest.mark.parametrize("part", ["class", "bbox"])
def test_a_detector_whose_outputs_are_no_numbers_is_told_and_finds_not_nothing(part: str, detector: Detector) -> None:
    broken = copy.deepcopy(detector)
    with torch.no_grad():
        for name, parameter in broken.model.named_parameters():
            if part in name:
                parameter.fill_(torch.nan)
    with pytest.raises(QskdError, match="scores or boxes that are no numbers, in image 0"):
        predict_image(broken, IMAGES[0], Preprocessing(SQUARE), range(3), 0.5)


def test_top_k_bounds_each_image_not_the_batch(detector: Detector) -> None:
    found = predict_batch(detector, batch_of(SQUARE), Preprocessing(SQUARE), range(3), top_k=4)
    assert found.image_ids.tolist() == [5] * 4 + [3] * 4 + [9] * 4


def test_a_crowd_above_the_threshold_is_found_whole_by_a_detector_of_many_queries() -> None:
    """The 100 best are what AP is measured on: of 130 cars in a picture they would be 100."""
    sizes = recipe({**FAMILIES["deformable"], "queries": 130}).student
    many = silent_student(sizes, LABELS, seed=3).eval()
    with torch.no_grad():
        for name, part in many.model.named_parameters():
            if name.startswith("class_embed") and name.endswith("bias"):
                part.copy_(torch.tensor([3.0, -9.0, -9.0]))  # each query has one class that reaches 0.5
    assert len(predict_image(many, picture(), Preprocessing(SQUARE), range(3), 0.5).scores) == 130
    assert len(predict_image(many, picture(), Preprocessing(SQUARE), range(3)).scores) == 100


def test_two_images_are_not_drawn_into_one_file(tmp_path: Path) -> None:
    both = predict.targets([tmp_path / "a.jpg", tmp_path / "a.png"], None)
    assert [target.name for _, target in both] == ["a.jpg.boxes.png", "a.png.boxes.png"]
    assert len(predict.targets([tmp_path / "a.jpg", tmp_path / "b.jpg"], None)) == 2
    with pytest.raises(QskdError, match="would both be drawn there"):
        explain.targets(["one/7.jpg", "two/7.jpg"], None)
