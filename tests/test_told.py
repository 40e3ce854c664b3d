"""A file of detections as a teacher: its boxes in every view, what it does not say, and what can't be learnt of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loader import Pictures
from test_teacher_cache import losses, make_cache, stream_of
from tiny import STUDENT, make_training

from pipelines.run.resolve import resolve
from pipelines.tuning.calibration import calibrate
from pipelines.tuning.driver import plan_without_cache
from qskd.boxes import cxcywh_to_xyxy
from qskd.checks import check_cache
from qskd.config import Config, ResizeConfig
from qskd.config.recipe import apply_overrides, build
from qskd.datasets.batch import train_batch
from qskd.datasets.loader import BatchLoader
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shards import write_shards
from qskd.detectors import load_detector
from qskd.detectors.teachers.asked import UNASKED_LOGIT
from qskd.errors import QskdError
from qskd.from_recipe import make_teacher, start_student, teacher_for_training, teacher_to_ask
from qskd.structures import SILENT_LOGIT, TeacherNeeds
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.identity import cache_identity
from qskd.teacher.told import results
from qskd.teacher.told.checks import check_told
from qskd.teacher.told.results import is_results, read_results
from qskd.teacher.told.teacher import ToldTeacher

torch.set_num_threads(1)
DATA = ("three", "eight", "nine")  # of `Pictures`, whose ids are 3, 8 and 9, and whose images are 100 on
COUNT = 22
BOTH = {
    100: [(3, [2, 3, 10, 8], 0.9), (8, [2, 3, 10, 8], 0.3), (9, [12, 4, 6, 9], 0.5)],
    103: [(9, [1, 1, 20, 20], 1.0)],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("shards"))
    write_shards(Pictures(COUNT), folder, rows_per_shard=8, rows_per_group=3)
    return folder


def entries(said: Mapping[int, Sequence[tuple[int, list[float], float]]]) -> list[dict[str, Any]]:
    return [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, found in said.items()
        for category, box, score in found
    ]


def objects_of(count: int = COUNT) -> dict[int, list[tuple[int, list[float], float]]]:
    """What a detector that is right says, the first object of each image twice, and beside it."""
    found: dict[int, list[tuple[int, list[float], float]]] = {}
    for sample in Pictures(count).samples():
        boxes = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in sample.boxes_xyxy.tolist()]
        said = [(int(kind), box, 0.8) for kind, box in zip(sample.category_ids, boxes, strict=True)]
        if said:
            kind, (left, top, width, height), _ = said[0]
            said += [(kind, [left + 1, top + 1, width, height], 0.4), (8, boxes[0], 0.05)]
        found[sample.image_id] = said
    return found


def write(path: Path, said: Any) -> Path:
    path.write_text(json.dumps(said))
    return path


def named(said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As `qskd label` writes them."""
    sizes = [{"id": each.image_id, "width": each.width, "height": each.height} for each in Pictures(COUNT).samples()]
    categories = [{"id": 9, "name": "NINE"}, {"id": 3, "name": "three"}, {"id": 8, "name": "eight"}]
    return {"images": sizes, "categories": categories, "annotations": [dict(one, id=i) for i, one in enumerate(said)]}


def config_of(shards: str, path: Path, *overrides: str) -> Config:
    tree = {
        "data": {"train": shards, "views": {"count": 2, "crop_probability": 0.5}},
        "teacher": {"path": str(path), "cache": {"path": str(path.parent / "cache"), "precision": "float32"}},
        "student": STUDENT,
        "distillation": {
            "features": {"weight": 0},
            "selection": {"boundaries": [0.0], "band_weights": [0.0, 1.0]},
        },
    }
    return build(apply_overrides(tree, overrides))


def teacher_of(config: Config) -> ToldTeacher:
    teacher = make_teacher(config, load_manifest(config.data.train).labels)
    assert isinstance(teacher, ToldTeacher)
    return teacher


def asked(config: Config, rows: Sequence[tuple[int, int, int]]) -> Any:
    teacher = teacher_of(config)
    loader = BatchLoader(config.data.train, "", config.data.views, teacher.resize)
    arrays = loader.load("train", np.array(rows, np.int32))
    return teacher.said_of(arrays, train_batch(arrays), TeacherNeeds())


def test_a_query_is_a_box_and_what_the_file_does_not_say_is_certainly_not(shards: str, tmp_path: Path) -> None:
    whole = ("data.views.flip_probability=0", "data.views.crop_probability=0")
    config = config_of(shards, write(tmp_path / "r.json", entries(BOTH)), *whole)
    record = asked(config, [(0, 0, 0), (0, 3, 0), (0, 1, 0)])
    assert record.logits.shape == (1, 3, 3, 3)  # the most boxes of an image; two entries of one box are one query
    first = record.logits[0, 0].sigmoid()
    assert first[0].tolist() == pytest.approx([0.9, 0.3, 0.0], abs=1e-6)
    assert record.logits[0, 0, 0, 2] == UNASKED_LOGIT
    assert first[1].tolist() == pytest.approx([0.0, 0.0, 0.5], abs=1e-6)
    assert (record.logits[0, 0, 2] == SILENT_LOGIT).all()
    assert record.logits[0, 1, 0].isfinite().all()  # of a score of 1 too
    assert (record.logits[0, 2] == SILENT_LOGIT).all()
    (sample,) = (each for each in Pictures(1).samples())
    size = torch.tensor([sample.width, sample.height] * 2)
    corners = cxcywh_to_xyxy(record.boxes_cxcywh[0, 0, :2]) * size
    assert torch.allclose(corners, torch.tensor([[2.0, 3, 12, 11], [12, 4, 18, 13]]), atol=1e-4)


def test_boxes_are_seen_in_every_view_as_its_objects_are(shards: str, tmp_path: Path) -> None:
    config = config_of(shards, write(tmp_path / "r.json", entries(objects_of())))
    teacher = teacher_of(config)
    loader = BatchLoader(shards, "", config.data.views, ResizeConfig(size=32))
    turned = 0
    for shard, rows in enumerate(load_manifest(shards).shard_rows):
        arrays = loader.load("train", np.array([(shard, row, view) for row in range(rows) for view in (0, 1)]))
        record = teacher.said_of(arrays, train_batch(arrays), TeacherNeeds())
        for line, count in enumerate(arrays["counts"].tolist()):
            sure = (record.logits[0, line].amax(-1).sigmoid() - 0.8).abs() < 1e-5
            found = record.boxes_cxcywh[0, line][sure]
            for box in torch.from_numpy(arrays["boxes_cxcywh"][line, :count]):
                assert (found - box).abs().amax(-1).min() < 1e-5
                turned += 1
    assert turned > 40


@pytest.mark.parametrize("form", ["list", "named", "one line of a list"])
def test_both_forms_of_file_say_the_same(shards: str, tmp_path: Path, form: str) -> None:
    said = entries(objects_of())
    plain = read_results(str(write(tmp_path / "plain.json", said)))
    text = {
        "list": json.dumps(said, indent=1),
        "named": json.dumps(named(said)),
        "one line of a list": json.dumps(said),
    }
    other = tmp_path / "other.json"
    other.write_text(text[form])
    found = read_results(str(other))
    for name in ("image_ids", "boxes_xyxy", "scores", "category_ids"):
        assert np.array_equal(getattr(found, name), getattr(plain, name))
    records = [
        asked(config_of(shards, tmp_path / name), [(0, row, 1) for row in range(8)])
        for name in ("plain.json", "other.json")
    ]
    assert torch.equal(records[0].logits, records[1].logits)
    assert torch.equal(records[0].boxes_cxcywh, records[1].boxes_cxcywh)


def test_a_file_that_is_read_as_a_whole_says_what_one_that_is_read_by_pieces_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def irregular(path: str, columns: Any) -> Any:
        raise results.Irregular

    for number, said in enumerate((entries(objects_of()), named(entries(objects_of())))):
        pieces = results._read(str(write(tmp_path / f"{number}.json", said)), 0, 0)
        with monkeypatch.context() as patch:
            patch.setattr(results, "_piecewise", irregular)
            whole = results._read(pieces.path, 0, 1)
        assert pieces.sha256 == whole.sha256
        assert pieces.categories == whole.categories
        assert pieces.sizes == whole.sizes
        for name in ("image_ids", "boxes_xyxy", "scores", "category_ids"):
            assert np.array_equal(getattr(pieces, name), getattr(whole, name))


@pytest.mark.parametrize("derived", ["flip", "none", "flip_and_crop"])
def test_a_student_learns_its_predictions_from_a_cache_in_every_view(shards: str, derived: str, tmp_path: Path) -> None:
    config = config_of(shards, write(tmp_path / "r.json", entries(objects_of())), f"data.views.derived={derived}")
    teacher, data = teacher_of(config), load_manifest(shards)
    check_told(config)
    manifest = make_cache(config, teacher, teacher.resize, cache_identity(config, data))
    assert check_cache(config, data).sizes.channels == ()
    check_told(config, manifest)
    stream = stream_of(shards, config.teacher.cache.path, None)
    columns = ("image_id", "logits", "boxes_cxcywh")
    stream = replace(stream, views=config.data.views, teacher_columns=columns)
    found = losses(config, CachedTeacher(manifest.sizes, min_visible=config.data.views.min_visible), stream)
    assert all(np.isfinite(list(terms.values())).all() for terms in found)
    assert "agfd" not in found[0]
    assert max(terms["lapd_class"] for terms in found) > 0
    assert max(terms["lapd_giou"] for terms in found) > 0


def test_a_mirrored_row_is_what_the_file_says_of_the_mirrored_view(shards: str, tmp_path: Path) -> None:
    config = config_of(shards, write(tmp_path / "r.json", entries(objects_of())))
    plain, turned = (
        config.data.views.model_copy(update={"flip_probability": share, "crop_probability": 0.0})
        for share in (0.0, 1.0)
    )
    records = []
    for views in (plain, turned):
        each = config.model_copy(update={"data": config.data.model_copy(update={"views": views})})
        records.append(asked(each, [(0, row, 0) for row in range(8)]))
    boxes = records[0].boxes_cxcywh.clone()
    boxes[..., 0] = 1 - boxes[..., 0]
    assert torch.allclose(boxes, records[1].boxes_cxcywh, atol=1e-6)
    assert torch.equal(records[0].logits, records[1].logits)


def test_an_object_that_the_file_knows_no_box_for_teaches_nothing(shards: str, tmp_path: Path) -> None:
    """Places that stand empty are no queries: none is a positive."""
    config = config_of(shards, write(tmp_path / "r.json", entries(BOTH)), "data.views.derived=none")
    teacher = teacher_of(config)
    manifest = make_cache(config, teacher, teacher.resize)
    reader = BatchLoader(shards, "", config.data.views, ResizeConfig(size=64), None)
    cache = TeacherCacheReader(config.teacher.cache.path)
    arrays = reader.load("train", np.array([(0, row, 0) for row in range(8)]))
    arrays |= cache.collate(cache.read(0, 0, range(8)))
    training = make_training(config, CachedTeacher(manifest.sizes), labels=DATA)  # type: ignore[arg-type]
    batch = train_batch(arrays)
    record = CachedTeacher(manifest.sizes).record(batch, TeacherNeeds())
    assert record.absent is not None
    assert record.absent[0, 1].all()
    assert not record.absent[0, 0, :2].any()
    terms = training.train_step(batch)
    assert np.isfinite(terms["lapd_class"].item())
    nothing = {name: value[[1, 2, 4, 5]] if len(value) == 8 else value for name, value in arrays.items()}
    assert training.train_step(train_batch(nothing))["lapd_giou"].item() == 0


def test_features_are_refused_before_anything_starts(shards: str, tmp_path: Path) -> None:
    config = config_of(shards, write(tmp_path / "r.json", entries(BOTH)), "distillation.features.weight=1")
    with pytest.raises(QskdError, match=r"(?s)reads its memory and attention.*features\.weight=0"):
        check_told(config)
    manifest = make_cache(config_of(shards, tmp_path / "r.json"), teacher_of(config), ResizeConfig(size=32))
    with pytest.raises(QskdError, match=r"(?s)boxes and classes alone.*features\.weight=0"):
        make_training(config, CachedTeacher(manifest.sizes), labels=DATA)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("student.inherit=true", "a teacher with layers"),
        ("data.unlabeled=[photos]", "knows nothing of"),
        ("teacher.cache.columns=[states]", "take them out"),
        ("teacher.levels=[0]", "which has no maps"),
        ("teacher.cache.memory_share=0.9", "which has no memory"),
        ("teacher.cache.cells=attended", "which has no memory"),
    ],
)
def test_what_a_file_cannot_do_is_named(shards: str, tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(QskdError, match=said):
        check_told(config_of(shards, write(tmp_path / "r.json", entries(BOTH)), override))


def test_it_is_no_detector_to_run(shards: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", entries(BOTH))
    with pytest.raises(QskdError, match="no detector that can be run"):
        load_detector(path)
    config = config_of(shards, path)
    assert teacher_to_ask(config, DATA) is None
    with pytest.raises(QskdError, match="can't be asked about pictures"):
        teacher_of(config)(torch.zeros(1, 8, 8, 3), torch.tensor([[8, 8]]), TeacherNeeds())
    with pytest.raises(QskdError, match="can't be asked in a training step"):
        teacher_for_training(config_of(shards, path, "teacher.cache.path="), DATA, None)
    with pytest.raises(QskdError, match="no detector that can be run"):
        start_student(config_of(shards, path, "student.inherit=true"), DATA)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([], "no detection in it"),
        ({"a": 1}, "JSON, but"),
        ([3], "entry 1: 3"),
        ([{"image_id": 1}], "entry 1: .*image_id and category_id"),
        ([{"image_id": "1", "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}], "whole numbers"),
        ([{"image_id": 1, "category_id": 3, "bbox": [0, 0, 1], "score": 1}], "left, top, width and height"),
        ([{"image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1e300], "score": 1}], "left, top, width and height"),
        ([{"image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1]}], "score: 0 to 1"),
        ([{"image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 7}], "score: 0 to 1"),
    ],
)
def test_entries_that_are_none_are_named(tmp_path: Path, said: Any, words: str) -> None:
    with pytest.raises(QskdError, match=f"(?s){words}"):
        read_results(str(write(tmp_path / "r.json", said)))


def test_a_file_of_other_images_or_classes_is_named(shards: str, tmp_path: Path) -> None:
    def refusal(said: Any, words: str) -> None:
        with pytest.raises(QskdError, match=words):
            asked(config_of(shards, write(tmp_path / "r.json", said)), [(0, 0, 0)])

    refusal(entries({100: [(4, [2, 3, 4, 4], 0.9)]}), "image 100: category_id 4")
    refusal(entries({100: [(3, [500, 3, 4, 4], 0.9)]}), "image 100: no box within its")
    other = named(entries(BOTH))
    other["images"][0]["width"] = 7
    refusal(other, "image 100: 7 x")
    lost = named(entries(BOTH))
    del lost["categories"][0]
    refusal(lost, "category_id 9")
    strange = named(entries(BOTH))
    strange["categories"][1]["name"] = "cow"
    refusal(strange, "no label for 1 dataset class")
    with pytest.raises(QskdError, match="can't be read"):
        read_results(str(tmp_path / "none.json"))
    (tmp_path / "torn.json").write_text('[{"image_id": 1,')
    with pytest.raises(QskdError, match="not JSON"):
        read_results(str(tmp_path / "torn.json"))


def test_a_class_that_is_left_to_nobody_is_silent(shards: str, tmp_path: Path) -> None:
    for form in (entries(BOTH), named(entries(BOTH))):
        path = write(tmp_path / "r.json", form)
        record = asked(config_of(shards, path, "teacher.class_map={nine: null}"), [(0, 0, 0), (0, 3, 0)])
        assert record.silent.tolist() == [False, False, True]


def test_a_sweep_is_planned_without_its_cache(shards: str, tmp_path: Path) -> None:
    """Which is made before its trials: that a recipe has none yet is no fault."""
    path = write(tmp_path / "r.json", entries(objects_of()))
    config = resolve(config_of(shards, path, f"data.val={shards}", f"output={tmp_path}/runs"), "distill")
    assert plan_without_cache(config).train.num_images == COUNT
    with pytest.raises(QskdError, match="leave --dry-run out"):
        calibrate(config)


def test_another_file_is_another_cache(shards: str, tmp_path: Path) -> None:
    data = load_manifest(shards)
    first = cache_identity(config_of(shards, write(tmp_path / "r.json", entries(BOTH))), data)
    second = cache_identity(config_of(shards, write(tmp_path / "s.json", entries(objects_of()))), data)
    assert first["teacher.results_sha256"] != second["teacher.results_sha256"]
    assert is_results("a/B.JSON")
    assert not is_results("jozhang97/deta-json")


def test_a_view_of_an_image_that_the_file_does_not_name_has_no_box(shards: str, tmp_path: Path) -> None:
    record = asked(config_of(shards, write(tmp_path / "r.json", entries(BOTH))), [(0, 2, 0)])
    assert (record.logits == SILENT_LOGIT).all()
