"""Crops that are derived: the student sees fresh ones, and what the teacher said of the whole image is cut to them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference import corners, make_targets, near, random_boxes, random_logits
from test_derived_views import shapes as shapes
from test_derived_views import shapes_recipe
from test_features import make_record, random_maps
from test_loader import Pictures
from test_teacher_cache import EVERYTHING, LABELS, random_record
from tiny import random_teacher, recipe
from torch import Tensor

from benchmarks.local_cache import make_cache
from pipelines.feed.stream import StreamConfig, local_stream
from qskd import checks
from qskd.config import DetectionLossConfig, ResizeConfig, ViewConfig
from qskd.config.recipe import load
from qskd.datasets.batch import train_batch
from qskd.datasets.order.schedule import Schedule
from qskd.datasets.samples import Sample
from qskd.datasets.shards import ShardReader, write_shards
from qskd.datasets.views import View, derived_crop, is_mirrored, make_view, view_boxes
from qskd.distillation.method import Facts, Lesson
from qskd.distillation.qskd.agfd import AttentionGuidedFeatureDistillation
from qskd.distillation.qskd.method import QSKD
from qskd.distillation.qskd.settings import FeatureDistillationConfig, Settings
from qskd.errors import QskdError
from qskd.losses.matching import assign
from qskd.structures import SILENT_LOGIT, DetectorOutput, LossTerm, TeacherNeeds, TeacherRecord
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.memory import Memory
from qskd.teacher.crops import cropped
from qskd.teacher.online import Choose, OnlineTeacher

SQUARE = ResizeConfig(size=64)
CROPS = ViewConfig(crop_probability=0.7, crop_min_scale=0.4, derived="flip_and_crop", seed=3)
WHOLE = (0.0, 0.0, 1.0, 1.0)


def slow_cell(map_: Tensor, high: int, wide: int, y: float, x: float) -> Tensor:
    """[C, H, W], of which high x wide cells are real, at a place in cells (0.5 is the first one's centre): bilinear."""
    y, x = min(max(y, 0.5), high - 0.5) - 0.5, min(max(x, 0.5), wide - 0.5) - 0.5
    found = torch.zeros(len(map_))
    for row in range(high):
        for column in range(wide):
            found += map_[:, row, column] * max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
    return found


def test_a_cropped_record_is_what_a_loop_over_cells_and_queries_makes_of_it() -> None:
    record, _ = random_record()
    crops = torch.tensor([(0.2, 0.3, 0.9, 0.8), (0.0, 0.0, 0.5, 1.0), WHOLE])
    found = cropped(record, crops, min_visible=0.3)
    assert found.absent is not None
    for image, (left, top, right, bottom) in enumerate(crops.tolist()):
        for layer, query in np.ndindex(2, 7):
            box, logits = record.boxes_cxcywh[layer, image, query], record.logits[layer, image, query]
            low_x, low_y, high_x, high_y = corners(box.tolist())
            cut = max(low_x, left), max(low_y, top), min(high_x, right), min(high_y, bottom)
            visible = max(0.0, cut[2] - cut[0]) * max(0.0, cut[3] - cut[1])
            dropped = image < 2 and (visible == 0 or visible < 0.3 * float(box[2] * box[3]))
            assert bool(found.absent[layer, image, query]) == dropped
            expected = torch.full((4,), SILENT_LOGIT) if dropped else logits
            assert torch.equal(found.logits[layer, image, query], expected)
            if image == 2:
                assert torch.equal(found.boxes_cxcywh[layer, image, query], box)
            elif not dropped:
                wide, high = right - left, bottom - top
                x0, y0, x1, y1 = (
                    (cut[0] - left) / wide,
                    (cut[1] - top) / high,
                    (cut[2] - left) / wide,
                    (cut[3] - top) / high,
                )
                moved = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
                torch.testing.assert_close(found.boxes_cxcywh[layer, image, query], moved, rtol=0, atol=1e-5)
        looks: list[Tensor] = []
        for level, valid in enumerate(record.memory_valid):
            high, wide = int(valid[image].any(1).sum()), int(valid[image].any(0).sum())
            look = torch.zeros_like(record.attention[level][image])
            for y, x in np.ndindex(*valid.shape[1:]):
                place = (
                    high * (top + (y + 0.5) / high * (bottom - top)),
                    wide * (left + (x + 0.5) / wide * (right - left)),
                )
                real = bool(valid[image, y, x])
                memory = slow_cell(record.memory[level][image], high, wide, *place) if real else torch.zeros(5)
                torch.testing.assert_close(found.memory[level][image, :, y, x], memory, rtol=0, atol=1e-5)
                look[:, y, x] = slow_cell(record.attention[level][image], high, wide, *place) if real else 0.0
            looks.append(look)
        total = sum(look.sum((1, 2), keepdim=True) for look in looks)
        for level, look in enumerate(looks):
            torch.testing.assert_close(found.attention[level][image], look / total, rtol=0, atol=1e-5)
    assert found.absent.any()
    assert not found.absent.all()
    for mine, theirs, valid in zip(found.memory, record.memory, record.memory_valid, strict=True):
        assert torch.equal(mine[2], theirs[2] * valid[2])


def test_a_query_s_box_is_cut_and_dropped_as_the_object_s_that_it_shows() -> None:
    boxes = random_boxes(1, 1, 40, seed=2)
    record = TeacherRecord(random_logits(1, 1, 40, 3), boxes)
    xyxy = np.array([corners(box) for box in boxes[0, 0].tolist()], np.float32) * 100
    for number in range(30):
        view = View(make_view(CROPS, number, 5).crop_xyxy, False)
        objects, kept = view_boxes(xyxy, 100, 100, view, 0.25)
        found = cropped(record, torch.tensor([view.crop_xyxy], dtype=torch.float32), 0.25)
        assert found.absent is not None
        assert (~found.absent[0, 0]).nonzero().flatten().tolist() == kept.tolist()
        torch.testing.assert_close(found.boxes_cxcywh[0, 0, kept], torch.from_numpy(objects), rtol=0, atol=2e-5)


def test_views_below_the_count_are_whole_and_each_epoch_after_them_has_a_crop_of_its_own() -> None:
    flips, seen = CROPS.model_copy(update={"derived": "flip"}), set()
    for image in range(50):
        assert make_view(CROPS, image, 0).crop_xyxy == WHOLE
        assert derived_crop(CROPS, image, 0) == WHOLE
        for epoch in range(1, 20):
            view, (left, top, right, bottom) = make_view(CROPS, image, epoch), derived_crop(CROPS, image, epoch)
            assert view.flip == make_view(flips, image, epoch).flip
            assert (right - left) == pytest.approx(view.crop_xyxy[2] - view.crop_xyxy[0])
            assert (top, bottom) == (view.crop_xyxy[1], view.crop_xyxy[3])
            assert left == (1 - view.crop_xyxy[2] if view.flip else view.crop_xyxy[0])
            seen.add(view.crop_xyxy)
            assert derived_crop(flips, image, epoch) == WHOLE
    assert 0.6 < (len(seen) - 1) / (50 * 19) < 0.8
    assert min(crop[2] - crop[0] for crop in seen) < 0.45


class Slopes(Pictures):
    """Pictures whose colours rise evenly from left to right and from top to bottom: crops and flips of them are exact."""

    def samples(self) -> Iterator[Sample]:
        for sample in super().samples():
            x, y = np.meshgrid(*((np.arange(n) + 0.5) / n for n in (sample.width, sample.height)))
            pixels = np.stack([250 * x, 250 * y, 125 * (x + y)], -1).round().astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            yield replace(sample, encoded=buffer.getvalue())


class Colours(OnlineTeacher):
    """Its memory is the mean colour of each cell; all else is its detector's."""

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        needs: TeacherNeeds,
        choose: Choose | None = None,
        least: tuple[int, int] | None = None,
    ) -> TeacherRecord:
        record = super().forward(images, sizes, needs, choose, least)
        high, wide = record.memory[0].shape[2:]
        means = torch.nn.functional.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), (high, wide))
        memory = torch.zeros_like(record.memory[0])
        memory[:, :3] = means
        return replace(record, memory=(memory,))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("slopes"))
    write_shards(Slopes(22), folder, rows_per_shard=8, rows_per_group=3)
    return folder


@pytest.fixture(scope="module")
def teacher() -> OnlineTeacher:
    plain = random_teacher("conditional", LABELS, LABELS)
    return Colours(plain.detector, tuple(plain.get_buffer("class_slots").tolist()), plain.preprocessing)


@pytest.fixture(scope="module")
def cache(data: str, teacher: OnlineTeacher, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of one view."""
    path = str(tmp_path_factory.mktemp("cache"))
    settings = {"path": path, "precision": "float32", "attention_giou_floor": -0.9, "batch_size": 4}
    config = recipe(data={"train": data, "views": CROPS.model_dump()}, teacher={"cache": settings})
    make_cache(config, teacher, SQUARE)
    return path


def stream_of(data: str, cache: str) -> StreamConfig:
    rows = ShardReader(data).manifest.shard_rows
    schedule = Schedule(rows, (), 3, 4, batch_size=5, window_images=16, views=1, fresh_views=True)
    return StreamConfig(data, "", schedule, CROPS, SQUARE, None, 2**28, cache, EVERYTHING if cache else ())


def test_derived_memory_is_where_the_student_s_image_and_objects_are(
    data: str, teacher: OnlineTeacher, cache: str
) -> None:
    online, cached = local_stream(stream_of(data, "")), local_stream(stream_of(data, cache))
    both = compared = 0
    for asked, read in zip(online, cached, strict=True):
        assert asked.arrays["images"].tobytes() == read.arrays["images"].tobytes()
        np.testing.assert_array_equal(asked.arrays["boxes_cxcywh"], read.arrays["boxes_cxcywh"])
        real = teacher.record(train_batch(asked.arrays), TeacherNeeds(memory=True, attention=True))
        said = CachedTeacher(teacher.sizes(False), min_visible=0.25).record(
            train_batch(read.arrays), TeacherNeeds(memory=True, attention=True)
        )
        assert said.derived is not None
        high, wide = real.memory[0].shape[2:]
        places = zip(read.arrays["image_ids"].tolist(), read.arrays["views"].tolist(), strict=True)
        for number, (image, view) in enumerate(places):
            left, top, right, bottom = crop = derived_crop(CROPS, image, view)
            mirrored = is_mirrored(CROPS, image, view)
            assert bool(said.derived[number]) == (mirrored or crop != WHOLE)
            both += mirrored and crop != WHOLE
            # Nothing is known beyond the centres of the outermost cells.
            x = wide * (left + (np.arange(wide) + 0.5) / wide * (right - left))
            y = high * (top + (np.arange(high) + 0.5) / high * (bottom - top))
            known = ((y >= 0.5) & (y <= high - 0.5))[:, None] & ((x >= 0.5) & (x <= wide - 0.5))
            gap = (said.memory[0][number, :3] - real.memory[0][number, :3]).abs().amax(0).numpy()
            assert gap[known].max() < 4.5, (
                image,
                view,
                gap.round(1),
            )  # of 250: colours are whole numbers, and images are resized
            compared += int(known.sum())
    assert both > 15
    assert compared > 1000


def test_workers_see_the_same_crops(data: str, cache: str) -> None:
    config = stream_of(data, cache)
    halves = [local_stream(config, world_size=2, rank=rank) for rank in (0, 1)]
    for one, *shares in zip(local_stream(config), *halves, strict=True):
        for name in ("teacher_crops_xyxy", "teacher_derived", "images"):
            parts = [share.arrays[name] for share in shares]
            np.testing.assert_array_equal(np.concatenate(parts), one.arrays[name], err_msg=name)


def lesson(record: TeacherRecord, seed: int = 0) -> Lesson:
    targets = make_targets([3, 2, 0], seed=1)
    grids = [(6, 8)]
    valid = (torch.ones(3, 6, 8, dtype=torch.bool),)
    student = DetectorOutput(
        random_logits(2, 3, 9, 5, seed=seed + 20).requires_grad_(),
        torch.stack([near(targets, 9, seed=seed + layer, spread=0.1) for layer in (1, 2)]),
        random_maps(3, 6, grids, seed=seed + 30),
        valid,
        (),
        torch.zeros(3, 9, 4),
        attend=lambda queries: (),
        attend_mean=lambda queries: (),
    )
    sides = [(student.logits, student.boxes_cxcywh), (record.logits, record.boxes_cxcywh)]
    own, theirs = assign(sides, targets, DetectionLossConfig())
    return Lesson(student, record, targets, own, record.matched(theirs))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pairing": "hungarian", "pair_weight": "uniform"},
        {"pairing": "image", "pair_weight": "uniform"},
        {"pairing": "global", "pair_weight": "uniform"},
    ],
    ids=lambda settings: settings.get("pairing", "rank"),
)
def test_a_dropped_query_teaches_as_much_as_one_that_is_not_there(settings: dict[str, Any]) -> None:
    """Whatever is selected, and however it is weighted: terms and gradient are those of a record without it."""
    targets = make_targets([3, 2, 0], seed=1)
    record = make_record(targets, [(6, 8)], [[(6, 8)] * 3], queries=12, known=12)
    gone, left = [1, 4, 5, 9], [0, 2, 3, 6, 7, 8, 10, 11]
    absent = torch.zeros(1, 3, 12, dtype=torch.bool)
    absent[..., gone] = True
    dropped = replace(record, logits=record.logits.masked_fill(absent[..., None], SILENT_LOGIT), absent=absent)
    assert record.attention_queries is not None
    numbers = torch.full((12,), -1)
    numbers[left] = torch.arange(8)
    known = torch.where(record.attention_queries < 0, -1, numbers[record.attention_queries.clamp(min=0)])
    without = replace(
        record, logits=record.logits[:, :, left], boxes_cxcywh=record.boxes_cxcywh[:, :, left], attention_queries=known
    )
    config = Settings.model_validate(
        {
            "selection": {"boundaries": [0.0], "max_per_object": 3},
            "features": {"query_weight": "uniform"},
            "predictions": settings,
        }
    )
    terms: list[tuple[dict[str, LossTerm], Tensor]] = []
    for each in (dropped, without, record):
        shown = lesson(each)
        method = QSKD(config, Facts((6,), (48.0,), "", 2, 9, 5), Facts((6,), (48.0,), "", 1, 12, 5))
        found = method(shown)
        sum(term.total for term in found.values()).backward()
        assert shown.student.logits.grad is not None
        terms.append((found, shown.student.logits.grad))
    for name, term in terms[0][0].items():
        torch.testing.assert_close(term.total, terms[1][0][name].total)
        torch.testing.assert_close(term.count, terms[1][0][name].count)
    torch.testing.assert_close(terms[0][1], terms[1][1])
    assert not torch.allclose(terms[0][1], terms[2][1])


def test_an_object_that_only_dropped_queries_are_left_for_has_no_query() -> None:
    absent = torch.tensor([[[True, False, True]]])
    record = TeacherRecord(random_logits(1, 1, 3, 2), random_boxes(1, 1, 3), absent=absent)
    assert record.matched(torch.tensor([[[0, 1, -1]]])).tolist() == [[[-1, 1, -1]]]


@pytest.mark.parametrize("weighting", ["normalised", "squared"])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_agfd_counts_a_derived_image_by_its_weight_and_a_real_one_whole(weight: float, weighting: str) -> None:
    targets = make_targets([2, 1, 3], seed=1)
    record = make_record(targets, [(5, 6)], [[(5, 6), (4, 3), (5, 2)]])
    mask = tuple(torch.rand(3, *valid.shape[1:]) * valid for valid in record.memory_valid)
    config = FeatureDistillationConfig.model_validate({"derived_weight": weight, "mask_weighting": weighting})
    module = AttentionGuidedFeatureDistillation([6], [6], config)
    memory = random_maps(3, 6, [(5, 6)], seed=9)
    derived = torch.tensor([True, False, True])
    found = module(memory, record.memory_valid, replace(record, derived=derived), mask)
    plain = module(memory, record.memory_valid, record, mask)
    total = 0.0
    for image in range(3):
        part = slice(image, image + 1)
        alone = replace(record, memory=(record.memory[0][part],), memory_valid=(record.memory_valid[0][part],))
        one = module((memory[0][part],), alone.memory_valid, alone, (mask[0][part],))
        total += float(one.total.detach()) * (weight if derived[image] else 1.0)
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-5)
    assert float(found.count) == float(plain.count)


def test_a_column_that_cannot_be_cropped_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "optional", True)
    checks.check_enough(load(None, ["data.views.derived=flip"]))
    with pytest.raises(QskdError, match="flip_and_crop, and the column memory of the cache, which can't be cropped"):
        checks.check_enough(load(None, ["data.views.derived=flip_and_crop"]))


# ---- of a teacher that has learnt something: the package's own


def test_the_package_s_teacher_derives_better_predictions_of_crops_than_it_makes(shapes: str) -> None:
    from pipelines.caching.derived import allowed, verify_derived

    config = shapes_recipe(shapes, derived="flip_and_crop", crop_probability=0.5, crop_min_scale=0.5)
    found = verify_derived(config, 48)
    assert found["crop_objects"] > 90
    assert found["crop_iou_derived"] > found["crop_iou_real"] + 0.1
    assert found["crop_confidence_derived"] > found["crop_confidence_real"] + 0.1
    assert found["crop_iou_derived"] > 0.8
    assert found["memory_unexplained"] < found["crop_memory_unexplained"]
    with pytest.raises(QskdError, match=r"(?s)crops: derived memory leaves 0\.\d+ .*derived_weight=0"):
        allowed(config, {**found, "crop_memory_unexplained": 0.81})
    assert not Path(config.teacher.cache.path).exists()


FINE = {"objects": 9.0, "iou_real": 0.8, "iou_derived": 0.8, "confidence_real": 0.7, "confidence_derived": 0.7}


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({}, [], "allowed: data.views.derived=flip\nallowed: crops: data.views.derived=flip_and_crop"),
        ({"crop_iou_real": 0.5}, [], "allowed: data.views.derived=flip\nallowed: crops"),
        (
            {"crop_iou_derived": 0.5},
            [],
            "allowed: .*flip\nnot allowed: crops: .*iou -0.300.* Keep data.views.derived=flip;",
        ),
        ({"crop_iou_derived": 0.5}, ["data.views.derived=flip"], "allowed: .*flip\nnot allowed: crops"),
        ({"crop_iou_derived": 0.5}, ["data.views.derived=flip_and_crop"], "data.views.derived: crops: .*iou -0.300"),
        ({"iou_derived": 0.5}, ["data.views.derived=flip_and_crop"], "data.views.derived: derived positives"),
        ({"crop_memory_unexplained": 0.9}, [], "allowed: .*flip\nallowed in part: crops: .*features.derived_weight=0"),
        (
            {"crop_memory_unexplained": 0.9},
            ["data.views.derived=flip_and_crop"],
            "distillation.features.weight: crops: derived memory leaves 0.90",
        ),
        (
            {"crop_memory_unexplained": 0.9},
            ["data.views.derived=flip_and_crop", "distillation.features.derived_weight=0"],
            "allowed: .*flip\nallowed: crops: data.views.derived=flip_and_crop",
        ),
    ],
)
def test_the_recipe_takes_of_crops_what_the_agreement_allows(
    changes: dict[str, float], overrides: list[str], said: str
) -> None:
    from pipelines.caching.derived import CROP, allowed

    fine = {**FINE, "memory_unexplained": 0.4}
    try:
        found = allowed(load(None, overrides), {**fine, **{f"{CROP}{name}": v for name, v in fine.items()}, **changes})
    except QskdError as error:
        found = str(error)
        assert not said.startswith(("allowed", "not"))
    assert re.match(said, found), found
