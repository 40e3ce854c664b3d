"""Views that are derived: the student sees fresh flips, and what the teacher said of one view is mirrored with it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import make_targets, near, random_logits
from test_loader import Pictures
from test_teacher_cache import EVERYTHING, LABELS, decoded, random_record, random_sizes
from tiny import arrays, random_teacher, recipe, silent_student
from torch import Tensor

from benchmarks.local_cache import make_cache
from pipelines.demo.quickstart import TEACHER
from pipelines.feed.stream import StreamConfig, local_stream
from qskd import checks
from qskd.config import FACTS, Config, DetectionLossConfig, ResizeConfig, ViewConfig
from qskd.config.recipe import load, replace_fields
from qskd.datasets.batch import train_batch
from qskd.datasets.loader import BatchLoader
from qskd.datasets.order.schedule import Schedule
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.datasets.shards import ShardReader, write_shards
from qskd.datasets.views import is_mirrored, make_view, source_view
from qskd.detectors import save_detector
from qskd.errors import QskdError
from qskd.from_recipe import make_teacher
from qskd.losses.matching import assign
from qskd.structures import SILENT_LOGIT, TeacherNeeds, TeacherRecord
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.attention import Attention
from qskd.teacher.columns.column import Column
from qskd.teacher.columns.table import ARRAYS, columns_for, encode, largest_errors, mirrored
from qskd.teacher.online import Choose, OnlineTeacher
from qskd.teacher.positives import Agreement, mirrored_arrays, positives

SQUARE = ResizeConfig(size=64)
FLIPS = ViewConfig(crop_probability=0.5, derived="flip")


def turned(record: TeacherRecord, which: Tensor) -> TeacherRecord:
    """By hand: the record of images [B] of which those in `which` are mirrored, each map within its real part."""

    def maps(map_: Tensor, valid: Tensor) -> Tensor:
        found = map_.clone()
        for image in which.nonzero().flatten().tolist():
            width = int(valid[image].any(0).sum())
            found[image, ..., :width] = map_[image, ..., :width].flip(-1)
        return found

    boxes = record.boxes_cxcywh.clone()
    boxes[:, which, :, 0] = 1 - boxes[:, which, :, 0]
    both = (
        tuple(maps(m, v) for m, v in zip(each, record.memory_valid, strict=False))
        for each in (record.memory, record.attention)
    )
    memory, attention = both
    return replace(record, boxes_cxcywh=boxes, memory=memory, attention=attention)


class EvenTeacher(OnlineTeacher):
    """Exactly mirror-equivariant: it looks at an image with its darker half on the left, and mirrors what it then says."""

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        needs: TeacherNeeds,
        choose: Choose | None = None,
        least: tuple[int, int] | None = None,
    ) -> TeacherRecord:
        seen, which = images.clone(), torch.zeros(len(images), dtype=torch.bool)
        for image, (_, width) in enumerate(sizes.tolist()):
            columns = images[image].double().sum((0, 2))[:width]
            if columns[: width // 2].sum() > columns[width - width // 2 :].sum():
                which[image] = True
                seen[image, :, :width] = images[image, :, :width].flip(1)
        back = choose and (lambda record: choose(turned(record, which)))
        return turned(super().forward(seen, sizes, needs, back, least), which)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("shards"))
    write_shards(Pictures(22), folder, rows_per_shard=8, rows_per_group=3)
    return folder


@pytest.fixture(scope="module")
def even() -> OnlineTeacher:
    teacher = random_teacher("refined", LABELS, LABELS)
    return EvenTeacher(teacher.detector, tuple(teacher.get_buffer("class_slots").tolist()), teacher.preprocessing)


@pytest.fixture(scope="module")
def cache(data: str, even: OnlineTeacher, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of one view."""
    path = str(tmp_path_factory.mktemp("cache"))
    make_cache(with_cache(data, path), even, SQUARE)
    return path


def with_cache(data: str, path: str) -> Config:
    settings = {"path": path, "precision": "float32", "attention_giou_floor": -0.9, "batch_size": 4}
    views = FLIPS.model_dump(exclude={"derived"})
    return recipe(data={"train": data, "views": views}, teacher={"cache": settings})


def stream_of(data: str, cache: str, epochs: int = 4) -> StreamConfig:
    rows = ShardReader(data).manifest.shard_rows
    schedule = Schedule(rows, (), 3, epochs, batch_size=5, window_images=16, views=1, fresh_views=True)
    return StreamConfig(data, "", schedule, FLIPS, SQUARE, None, 2**28, cache, EVERYTHING if cache else ())


@pytest.mark.parametrize("precision", ["int8", "float16", "float32"])
def test_a_mirrored_row_is_the_row_of_the_mirrored_record(precision: str) -> None:
    record, ids = random_record()
    sizes = random_sizes(record)
    real = encode(turned(record, torch.ones(3, dtype=torch.bool)), ids, precision)
    rows = encode(record, ids, precision)
    for row, true in zip(rows, real, strict=True):
        before = [getattr(row, name).copy() for name in ARRAYS]
        found = mirrored(row, sizes, EVERYTHING)
        assert found.image_id == true.image_id
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(found, name), getattr(true, name), err_msg=name)
            assert getattr(found, name).dtype == getattr(true, name).dtype
        assert not np.array_equal(found.memory, row.memory)
        np.testing.assert_equal([getattr(row, name) for name in ARRAYS], before)


def test_columns_that_were_not_read_need_no_mirroring() -> None:
    record, ids = random_record()
    (row, *_) = encode(record, ids, "int8")
    nothing = {name: np.zeros(0, np.float32) for name in ARRAYS if name not in ("logits", "boxes_cxcywh")}
    alone = mirrored(replace(row, **nothing), random_sizes(record), columns_for(TeacherNeeds()))
    np.testing.assert_array_equal(alone.boxes_cxcywh[..., 0], 1 - row.boxes_cxcywh[..., 0])


def test_an_even_teachers_derived_records_are_what_it_says_of_the_flipped_views(
    data: str, even: OnlineTeacher, cache: str
) -> None:
    needs = TeacherNeeds(memory=True, attention=True)
    online, cached = local_stream(stream_of(data, "")), local_stream(stream_of(data, cache))
    turned_round = 0
    for asked, read in zip(online, cached, strict=True):
        assert asked.arrays["images"].tobytes() == read.arrays["images"].tobytes()
        batch = train_batch(read.arrays)
        real = even.record(train_batch(asked.arrays), needs)
        found = CachedTeacher(even.sizes(False)).record(batch, needs)
        torch.testing.assert_close(found.logits, real.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.boxes_cxcywh, real.boxes_cxcywh, rtol=0, atol=1e-5)
        for mine, theirs in zip(found.memory, real.memory, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
        assert found.attention_queries is not None
        queries = found.attention_queries.clamp(min=0)[:, :, None, None]
        known = (found.attention_queries >= 0)[:, :, None, None]
        for mine, theirs in zip(found.attention, real.attention, strict=True):
            same = theirs.gather(1, queries.expand(-1, -1, *theirs.shape[2:]))
            torch.testing.assert_close(mine * known, same * known, rtol=0, atol=1e-5)
        places = zip(asked.arrays["image_ids"].tolist(), asked.arrays["views"].tolist(), strict=True)
        turned_round += sum(is_mirrored(FLIPS, image, view) for image, view in places)
    assert turned_round > 10


@pytest.mark.parametrize("family", list(FACTS))
def test_of_every_family_a_derived_record_is_the_real_one(family: str) -> None:
    plain = random_teacher(family)
    teacher = EvenTeacher(plain.detector, tuple(plain.get_buffer("class_slots").tolist()), plain.preprocessing)
    seen, needs = arrays([2, 1, 3]), TeacherNeeds(memory=True, attention=True)
    before, real = (teacher.record(train_batch(each), needs) for each in (seen, mirrored_arrays(seen)))
    assert largest_errors(before, real)["boxes_cxcywh"] > 0.01
    sizes = teacher.sizes(False)
    rows = [mirrored(row, sizes, EVERYTHING) for row in encode(before, seen["image_ids"].tolist(), "float32")]
    errors = largest_errors(decoded(rows, sizes), real)
    assert {"memory", "attention"} <= errors.keys()
    assert max(errors.values()) < 1e-6, errors


def test_a_derived_view_has_its_source_s_crop_and_a_flip_of_seed_image_and_epoch() -> None:
    policy = ViewConfig(count=3, crop_probability=0.7, derived="flip", seed=5)
    plain = policy.model_copy(update={"derived": "none"})
    flips = np.zeros((50, 30), bool)
    for image in range(50):
        for epoch in range(30):
            view = make_view(policy, image, epoch)
            assert view.crop_xyxy == make_view(plain, image, epoch % 3).crop_xyxy
            assert source_view(policy, epoch) == epoch % 3
            assert make_view(policy, image, epoch).flip == view.flip
            flips[image, epoch] = view.flip
        assert [make_view(policy, image, epoch) for epoch in range(3)] == [make_view(plain, image, e) for e in range(3)]
    assert 0.45 < flips.mean() < 0.55
    assert flips.mean(0).min() > 0
    assert len({tuple(line) for line in flips.tolist()}) == 50
    assert flips.tolist() != [
        [make_view(policy.model_copy(update={"seed": 6}), i, e).flip for e in range(30)] for i in range(50)
    ]
    never = policy.model_copy(update={"flip_probability": 0.0})
    assert not any(make_view(never, image, epoch).flip for image in range(50) for epoch in range(9))


def test_workers_and_a_resumed_run_see_the_same_flips_and_records(data: str, cache: str) -> None:
    config = stream_of(data, cache)
    whole = [share.arrays for share in local_stream(config)]
    halves = [list(local_stream(config, world_size=2, rank=rank)) for rank in (0, 1)]
    for one, *shares in zip(whole, *halves, strict=True):
        parts = [share.arrays for share in shares]
        for name in ("images", "teacher_memory_0", "teacher_boxes_cxcywh", "image_ids", "views"):
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), one[name], err_msg=name)
        for image, boxes in enumerate(line for part in parts for line in part["boxes_cxcywh"]):
            np.testing.assert_array_equal(boxes, one["boxes_cxcywh"][image, : len(boxes)])
    longer = replace(config, schedule=replace(config.schedule, epochs=9))
    for share, one in zip(local_stream(longer, start_step=6), whole[6:], strict=False):
        assert share.arrays.keys() == one.keys()
        assert all(share.arrays[name].tobytes() == one[name].tobytes() for name in one)


def test_a_training_with_flips_shows_each_epoch_in_another_way_and_reads_one_view(data: str, cache: str) -> None:
    seen: dict[int, set[bytes]] = {}
    for share in local_stream(stream_of(data, cache, epochs=8)):
        for image_id, pixels in zip(share.arrays["image_ids"].tolist(), share.arrays["images"], strict=True):
            seen.setdefault(image_id, set()).add(pixels.tobytes())
    assert all(len(pixels) <= 2 for pixels in seen.values())
    assert np.mean([len(pixels) == 2 for pixels in seen.values()]) > 0.8


def test_flips_are_fresh_in_every_epoch_unless_the_recipe_says_no_or_there_are_none_to_draw() -> None:
    assert ViewConfig().derived_taken == "flip"
    assert ViewConfig(derived="none").derived_taken == "none"
    assert ViewConfig(derived="flip_and_crop").derived_taken == "flip_and_crop"
    assert {ViewConfig(flip_probability=chance).derived_taken for chance in (0.0, 1.0)} == {"none"}


def test_a_column_that_cannot_be_mirrored_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_enough(load(None, ["data.views.derived=flip"]))
    monkeypatch.setattr(Attention, "mirrored", Column.mirrored)
    with pytest.raises(QskdError, match=r"data.views.derived: flip, and the column attention of the cache"):
        checks.check_enough(load(None))
    checks.check_enough(load(None, ["data.views.derived=none"]))


@pytest.mark.parametrize(
    ("overrides", "said", "remedy"),
    [([f"distillation.method={name}"], name, "another method") for name in ("crosskd", "kd-detr", "perturbed")]
    + [
        (["distillation.predictions.pairing=index"], "qskd, which learns query by query", "pairing: rank"),
        (["distillation.also={crosskd: {}}"], r"also\.crosskd\.method: crosskd, which asks", "another method"),
    ],
)
@pytest.mark.parametrize("derived", [[], ["data.views.derived=flip_and_crop"]])
def test_what_a_mirrored_record_can_not_teach_is_refused_with_the_method(
    overrides: list[str], said: str, remedy: str, derived: list[str]
) -> None:
    """The decoder's answer to mirrored memory, and query i for query i."""
    with pytest.raises(QskdError, match=rf"(?s)data\.views\.derived: flip.*{said}.*derived=none.*{remedy}"):
        checks.check_enough(load(None, overrides + derived))
    checks.check_enough(load(None, [*overrides, "data.views.derived=none"]))
    checks.check_enough(load(None, [*overrides, "data.views.flip_probability=0"]))


# ---- of a teacher that has learnt something: the package's own


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    from pipelines.prepare import prepare

    folder = tmp_path_factory.mktemp("shapes")
    annotations, images = make_shapes(ShapesConfig(images=48, seed=9), folder / "coco")
    prepare(annotations, images, str(folder / "train"), quiet=True)
    return str(folder / "train")


def shapes_recipe(shapes: str, **views: Any) -> Config:
    teacher = {
        "path": str(TEACHER),
        "cache": {"path": str(Path(shapes).parent / "cache"), "attention_giou_floor": -1.0},
    }
    return recipe(data={"train": shapes, "views": views}, teacher=teacher, compute={"device": "cpu"})


def test_the_package_s_teacher_derives_predictions_but_not_memory(shapes: str) -> None:
    from pipelines.caching.derived import allowed, verify_derived

    config = shapes_recipe(shapes, derived="flip")
    found = verify_derived(config, 48)
    assert found["objects"] > 100
    assert found["iou_derived"] == pytest.approx(found["iou_real"], abs=0.03)
    assert found["confidence_derived"] == pytest.approx(found["confidence_real"], abs=0.03)
    assert found["iou_real"] > 0.7
    assert 0.2 < found["memory_unexplained"] < 0.7
    assert found["attention_overlap"] > 0.5
    assert allowed(config, found) == "allowed: data.views.derived=flip"


def test_a_teacher_that_crops_ruin_is_told_with_both_numbers_and_the_field(shapes: str) -> None:
    from pipelines.caching.looks import look_at_crops
    from pipelines.caching.plan import make_cache_plan

    def look(**views: Any) -> tuple[ViewConfig, Any]:
        config = shapes_recipe(shapes, **views)
        teacher = make_teacher(config, ShardReader(shapes).manifest.labels)
        assert teacher is not None
        return config.data.views, look_at_crops(make_cache_plan(config), teacher)

    views, small = look(crop_probability=1.0, crop_min_scale=0.5)
    assert small.images == 32
    assert small.ruined
    said = small.describe(views)
    assert f"{small.iou:.2f}" in said
    assert f"{small.whole_iou:.2f}" in said
    assert "data.views.crop_min_scale (0.5)" in said
    views, large = look(crop_probability=1.0, crop_min_scale=0.98)
    assert not large.ruined
    assert "data.views" not in large.describe(views)
    assert look()[1] is None
    assert look(crop_probability=1.0, derived="flip_and_crop")[1] is None  # whole images are cached, it sees no crop


def test_the_cache_job_says_whether_its_teacher_sees_a_mirrored_image_as_it_sees_the_image(
    shapes: str, tmp_path: Path
) -> None:
    from pipelines.caching.derived import look_at_flips
    from pipelines.caching.plan import make_cache_plan

    def look(path: Path, **views: Any) -> Any:
        config = shapes_recipe(shapes, **views)
        config = replace_fields(config, {"teacher.path": str(path)}, "test")
        teacher = make_teacher(config, ShardReader(shapes).manifest.labels)
        assert teacher is not None
        return look_at_flips(make_cache_plan(config), teacher)

    fine, said = look(TEACHER)
    assert fine
    assert "What to do" not in said
    assert look(TEACHER, derived="none") is None
    student = recipe().student
    untrained = silent_student(student, ShardReader(shapes).manifest.labels, 0).eval()
    save_detector(untrained, tmp_path / "untrained", student.resize)  # its memory is of positions more than of pictures
    fine, said = look(tmp_path / "untrained")
    assert not fine
    assert "derived memory leaves" in said
    assert "What to do: set data.views.derived=flip with distillation.features.derived_weight=0" in said


def test_a_look_at_crops_stops_no_job(shapes: str, tmp_path: Path) -> None:
    from pipelines.caching.looks import look_at_crops
    from pipelines.caching.plan import make_cache_plan

    broken = tmp_path / "train"
    shutil.copytree(shapes, broken)
    for shard in broken.glob("*.parquet"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 4 : len(data) // 4 + 64] = bytes(64)
        shard.write_bytes(bytes(data))
    config = shapes_recipe(str(broken), crop_probability=1.0)
    teacher = make_teacher(config, ShardReader(shapes).manifest.labels)
    assert teacher is not None
    assert look_at_crops(make_cache_plan(config), teacher) is None


def test_positives_are_the_matched_queries_of_classes_that_the_teacher_knows() -> None:
    targets = make_targets([2, 0, 3], seed=1)
    boxes, logits = near(targets, 6, seed=2), random_logits(1, 3, 6, 5, seed=3)
    record = TeacherRecord(logits, boxes[None])
    costs = DetectionLossConfig()
    found = positives(record, targets, costs)
    (pairs,) = assign([(logits, boxes[None])], targets, costs)
    expected = []
    for image, count in enumerate(targets.counts):
        for slot in range(count):
            query, label = int(pairs[-1][image, slot]), int(targets.labels[image, slot])
            expected.append(float(logits[0, image, query, label].sigmoid()))
    assert found.confidences.tolist() == pytest.approx(expected)
    label = int(targets.labels[0, 0])
    silent = logits.clone()
    silent[..., label] = SILENT_LOGIT
    fewer = positives(replace(record, logits=silent), targets, costs)
    assert len(fewer.ious) == int((targets.labels != label)[targets.valid].sum()) < 5


def test_agreement_is_whole_with_itself_and_names_each_way_to_differ() -> None:
    record, _ = random_record()
    targets = make_targets([2, 1, 1], seed=1, classes=4)
    costs = DetectionLossConfig()
    queries = torch.arange(7).expand(3, -1)
    looks = tuple(torch.rand(3, 7, *valid.shape[1:]) * valid[:, None] for valid in record.memory_valid)
    total = sum(look.sum((2, 3), keepdim=True) for look in looks)
    record = replace(record, attention_queries=queries, attention=tuple(look / total for look in looks))

    def measured(derived: TeacherRecord) -> dict[str, float]:
        sums = Agreement(costs)
        sums.add(derived, record, targets)
        sums.add(derived, record, targets)
        return sums.summary()

    same = measured(record)
    assert same["objects"] == 8
    assert same["iou_derived"] == same["iou_real"]
    assert (same["memory_unexplained"], same["attention_overlap"]) == (0.0, pytest.approx(1.0, abs=1e-5))
    assert measured(replace(record, memory=tuple(-m for m in record.memory)))["memory_unexplained"] > 1
    assert measured(replace(record, boxes_cxcywh=record.boxes_cxcywh * 0.5))["iou_derived"] != same["iou_real"]
    shuffled = tuple(look.flip(1) for look in record.attention)
    assert measured(replace(record, attention=shuffled))["attention_overlap"] < 0.95


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({}, [], "allowed: data.views.derived=flip"),
        ({"iou_derived": 0.5}, ["data.views.derived=none"], "not allowed: .*iou -0.300"),
        ({"confidence_real": 0.4}, ["data.views.derived=flip"], "data.views.derived: .*confidence .0.300"),
        (
            {"memory_unexplained": 0.9},
            ["data.views.derived=none"],
            "allowed in part: .*distillation.features.weight=0",
        ),
        (
            {"memory_unexplained": 0.9},
            ["data.views.derived=flip"],
            "distillation.features.weight: derived memory leaves 0.90",
        ),
        ({"memory_unexplained": 0.9}, ["data.views.derived=flip", "distillation.features.weight=0"], "allowed: data"),
        ({"memory_unexplained": 0.9}, ["data.views.derived=flip", "distillation.features.derived_weight=0"], "allowed"),
        ({"iou_derived": 0.5}, [], "data.views.derived: .*iou -0.300"),
        (
            {"memory_unexplained": 0.9},
            ["data.views.derived=none", "distillation.method=mimic"],
            "not allowed with mimic: .*derived=none",
        ),
        (
            {"memory_unexplained": 0.9},
            ["data.views.derived=flip", "distillation.method=mimic"],
            "data.views.derived: derived memory leaves 0.90",
        ),
        ({"objects": 0.0}, [], "--verify-derived: no object"),
    ],
)
def test_the_recipe_takes_what_the_agreement_allows(changes: dict[str, float], overrides: list[str], said: str) -> None:
    from pipelines.caching.derived import allowed

    fine = {"objects": 9.0, "iou_real": 0.8, "iou_derived": 0.8, "confidence_real": 0.7, "confidence_derived": 0.7}
    try:
        found = allowed(load(None, overrides), {**fine, "memory_unexplained": 0.4, **changes})
    except QskdError as error:
        found = str(error)
        assert not said.startswith(("allowed", "not"))
    assert re.match(said, found), found


def test_mirrored_pixels_are_those_of_the_mirrored_view(data: str) -> None:
    aspect = ResizeConfig(mode="shortest_edge", size=64, longest=96)
    rows = np.array([(0, 1, 0), (1, 3, 0), (2, 5, 0)], np.int32)
    plain, flipped = (
        BatchLoader(data, "", ViewConfig(flip_probability=p), aspect).load("train", rows) for p in (0.0, 1.0)
    )
    found = mirrored_arrays(plain)
    assert found["images"].tobytes() == flipped["images"].tobytes() != plain["images"].tobytes()
    np.testing.assert_allclose(found["boxes_cxcywh"], flipped["boxes_cxcywh"], atol=1e-6)
