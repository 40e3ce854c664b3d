"""YOLOS as a teacher: its boxes and classes as transformers has them, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from checkpoints import change
from PIL import Image
from test_loader import Pictures
from test_teacher_cache import losses, make_cache, stream_of
from tiny import STUDENT, recipe

import qskd
from pipelines.health.checkpoint import model_checks
from pipelines.reporting.cards import figures
from qskd.checks import check_cache
from qskd.config import Config, ResizeConfig
from qskd.config.recipe import apply_overrides, build
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shards import write_shards
from qskd.detectors import load_detector, read_preprocessing
from qskd.errors import QskdError
from qskd.from_recipe import make_teacher, start_student
from qskd.pictures.explain import Subject, explain
from qskd.pictures.explained import explanation_picture
from qskd.structures import TeacherNeeds
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.identity import cache_identity
from qskd.teacher.told.checks import check_told

torch.set_num_threads(1)
LABELS = ("nine", "three", "eight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("yolos") / "model"
    config = hf.YolosConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32},
        **{"image_size": [64, 64], "num_detection_tokens": 9, "id2label": dict(enumerate(LABELS))},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.YolosForObjectDetection(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    model.save_pretrained(path)
    hf.YolosImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("shards"))
    write_shards(Pictures(22), path, rows_per_shard=8, rows_per_group=3)
    return path


def config_of(shards: str, folder: Path, *overrides: str) -> Config:
    tree: dict[str, Any] = {
        "data": {"train": shards, "views": {"count": 2, "crop_probability": 0.5}},
        "teacher": {"path": str(folder), "resize": {"size": 64}},
        "student": STUDENT,
        "distillation": {
            "features": {"weight": 0},
            "selection": {"boundaries": [-0.9], "band_weights": [0.0, 1.0]},
        },
    }
    return build(apply_overrides(tree, overrides))


def test_boxes_and_probabilities_are_those_of_transformers(folder: Path) -> None:
    theirs, pixels = hf.AutoModelForObjectDetection.from_pretrained(folder).eval(), torch.randn(2, 3, 64, 96)
    mask = torch.ones(2, 64, 96, dtype=torch.bool)
    detector = load_detector(folder)
    with torch.no_grad():
        said, expected = detector(pixels, mask), theirs(pixels)
    assert detector.labels == LABELS
    assert torch.equal(said.boxes_cxcywh[-1], expected.pred_boxes)
    assert torch.allclose(said.logits[-1].sigmoid(), expected.logits.softmax(-1)[..., :-1], atol=1e-6)
    assert said.no_object is not None
    assert torch.allclose(said.no_object[-1].exp(), expected.logits.softmax(-1)[..., -1], atol=1e-6)
    assert said.memory == said.attend(torch.zeros(2, 3, dtype=torch.int64)) == ()


def test_an_image_is_seen_as_by_itself_whatever_it_is_batched_with(folder: Path) -> None:
    detector, pixels = load_detector(folder), torch.randn(3, 3, 70, 90)
    mask = torch.zeros(3, 70, 90, dtype=torch.bool)
    sizes = [(64, 80), (70, 90), (50, 40)]
    for image, (height, width) in enumerate(sizes):
        mask[image, :height, :width] = True
    with torch.no_grad():
        together = detector(pixels * mask[:, None], mask)
        for image, (height, width) in enumerate(sizes):
            alone = pixels[image : image + 1, :, :height, :width]
            said = detector(alone, torch.ones(1, height, width, dtype=torch.bool), least=(height, width))
            assert torch.allclose(said.boxes_cxcywh[:, 0], together.boxes_cxcywh[:, image], atol=1e-6)
            assert torch.allclose(said.logits[:, 0], together.logits[:, image], atol=1e-5)
    with pytest.raises(QskdError, match="sides of 16 at least"):
        detector(torch.zeros(1, 3, 8, 64), torch.ones(1, 8, 64, dtype=torch.bool))


def test_cached_and_online_give_the_same_losses_of_predictions(shards: str, folder: Path, tmp_path: Path) -> None:
    precision = "teacher.cache.precision=float32"
    config = config_of(shards, folder, f"teacher.cache.path={tmp_path}/cache", precision)
    teacher, data = make_teacher(config, load_manifest(shards).labels), load_manifest(shards)
    assert teacher is not None
    check_told(config)
    online = losses(config, teacher, stream_of(shards, "", None))
    assert "agfd" not in online[0]
    assert max(terms["lapd_giou"] for terms in online) > 0
    manifest = make_cache(config, teacher, teacher.resize, cache_identity(config, data))
    check_told(config, check_cache(config, data))
    stream = stream_of(shards, config.teacher.cache.path, None)
    for mine, theirs in zip(losses(config, CachedTeacher(manifest.sizes), stream), online, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_features_inheritance_and_a_student_are_refused_by_name(shards: str, folder: Path) -> None:
    with pytest.raises(QskdError, match=r"(?s)says boxes and classes alone.*features\.weight=0"):
        check_told(config_of(shards, folder, "distillation.features.weight=1"))
    every = ("distillation.predictions.teacher_layers=same_index", "distillation.predictions.student_layers=all")
    with pytest.raises(QskdError, match="reads its every layer"):
        check_told(config_of(shards, folder, *every))
    with pytest.raises(QskdError, match="YOLOS can only teach"):
        recipe({"family": "yolos"})
    with pytest.raises(QskdError, match="YOLOS, of which no part fits"):
        start_student(config_of(shards, folder, "student.inherit=true"), load_manifest(shards).labels)
    with pytest.raises(QskdError, match="YOLOS, which can only teach"):
        qskd.export(folder, folder.parent / "out", size=64)
    with pytest.raises(QskdError, match="YOLOS, which can only teach"):
        start_student(recipe({"init": str(folder)}), LABELS)


def test_label_evaluate_predict_doctor_and_the_card_take_it(shards: str, folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    Image.fromarray(picture).save(photos / "a.png")
    labels = qskd.label(folder, photos, tmp_path / "out.json", like=shards, threshold=0.0)
    assert sum(labels.objects.values()) > 0
    assert qskd.evaluate(folder, shards, workers=0).metrics["AP"] >= 0
    (one,) = qskd.predict(folder, picture, threshold=0.0)
    assert set(one.labels) <= set(LABELS)
    checks = {check.name: check for check in model_checks(str(folder))}
    assert checks["family"].found == "YOLOS (yolos), which is no DETR: it says boxes and classes, and has no maps"
    assert "of predictions alone" in checks["as a teacher"].found
    assert checks["as a student"].found == "no: it can only teach"
    rows, _ = figures({"teacher": (load_detector(folder), {})}, {"teacher": ResizeConfig(size=64)}, recipe())
    assert rows[0].parameters == sum(p.numel() for p in load_detector(folder).parameters())


def test_its_queries_are_explained_and_no_mask_is_drawn(folder: Path) -> None:
    subject = Subject("a", np.random.default_rng(0).integers(0, 255, (60, 70, 3), np.uint8))
    config = config_of_folder(folder)
    shown = explain(subject, config, LABELS, make_teacher(config, LABELS), {})
    (seen,) = shown.seen
    assert len(seen.panels(shown)) == 1
    assert explanation_picture(shown, "YOLOS").ndim == 3


def test_its_own_image_processor_is_read_and_odd_sizes_are_refused(folder: Path, tmp_path: Path) -> None:
    assert read_preprocessing(folder).resize == ResizeConfig(mode="shortest_edge", size=64, longest=96)
    record_of = make_teacher(config_of_folder(folder), LABELS)
    assert record_of is not None
    record = record_of(torch.zeros(1, 70, 90, 3, dtype=torch.uint8), torch.tensor([[70, 90]]), TeacherNeeds())
    assert record.logits.shape == (1, 1, 9, 3)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    change(copy, {"image_size": [64, 8]})
    with pytest.raises(QskdError, match="two sides of whole patches"):
        load_detector(copy)


def config_of_folder(folder: Path) -> Config:
    return build({"teacher": {"path": str(folder)}, "distillation": {"features": {"weight": 0}}})
