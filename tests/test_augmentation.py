"""What the student alone sees is a function of seed, step and image; nobody else sees it, and evaluation does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FAMILIES, FULL, LABELS, arrays, assert_equal, batch_of, make_training, random_teacher, recipe
from torch import Tensor

from qskd.config import AugmentationConfig, ResizeConfig
from qskd.config.augmentation import PRESETS
from qskd.config.recipe import build, load, to_tree
from qskd.datasets.batch import parts_of, train_batch
from qskd.datasets.order.schedule import split
from qskd.detectors import save_detector
from qskd.errors import QskdError
from qskd.from_recipe import make_student
from qskd.training.augmentation.draws import Look, look, size_at
from qskd.training.augmentation.student import StudentAugmentation
from qskd.training.step import Training

EVERYTHING = AugmentationConfig(
    **{"colour_probability": 0.7, "brightness": 0.2, "contrast": 0.5, "saturation": 0.5, "hue": 0.1},
    **{
        "channel_shuffle_probability": 0.3,
        "greyscale_probability": 0.3,
        "blur_probability": 0.5,
        "erase_probability": 0.5,
    },
    scales=(0.5, 0.75, 1.0, 1.25),
)
ALL_FIELDS = (
    *("augmentation.preset=rtdetr", "augmentation.until=1", "augmentation.blur_probability=0.5"),
    *("augmentation.erase_probability=0.5", "augmentation.greyscale_probability=0.3"),
)
SHORTEST = ResizeConfig(mode="shortest_edge", size=32)
FILL = (0.485, 0.456, 0.406)


def augmentation(
    config: AugmentationConfig = EVERYTHING, resize: ResizeConfig = SHORTEST, seed: int = 3
) -> StudentAugmentation:
    return StudentAugmentation(config, resize, seed, total_steps=100, fill=FILL)


def padded_batch(sides: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(1)
    sizes = torch.tensor(sides, dtype=torch.int32)
    images = torch.zeros(len(sides), int(sizes[:, 0].max()), int(sizes[:, 1].max()), 3, dtype=torch.uint8)
    for image, (height, width) in zip(images, sides, strict=True):
        image[:height, :width] = torch.from_numpy(rng.integers(1, 256, (height, width, 3), np.uint8))
    return images, sizes


SIDES = [(32, 45), (32, 32), (40, 32), (32, 38), (32, 64)]
IDS = [11, 5, 80, 2, 7]


# ---- what is drawn


def test_a_look_depends_on_seed_step_and_image_and_on_nothing_else() -> None:
    first = look(EVERYTHING, 1, 2, 3)
    assert look(EVERYTHING, 1, 2, 3) == first
    assert all(look(EVERYTHING, *other) != first for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)))
    # A field that is switched on moves nothing that the others drew.
    plain = AugmentationConfig(brightness=0.2, colour_probability=0.7)
    for step in range(20):
        full = look(EVERYTHING, 0, step, 1)
        assert look(plain, 0, step, 1) == Look(full.brightness, contrast_first=full.contrast_first)


def test_looks_have_the_chances_and_ranges_that_are_set() -> None:
    looks = [look(EVERYTHING, 0, step, image) for step in range(60) for image in range(50)]
    shares = {
        "brightness": 0.7, "contrast": 0.7, "saturation": 0.7, "hue": 0.7, "channels": 0.3, "sigma": 0.5, "erased": 0.5,
    }  # fmt: skip
    for name, chance in shares.items():
        assert np.mean([getattr(one, name) is not None for one in looks]) == pytest.approx(chance, abs=0.04), name
    assert np.mean([one.grey for one in looks]) == pytest.approx(0.3, abs=0.04)
    assert np.mean([one.contrast_first for one in looks]) == pytest.approx(0.5, abs=0.04)
    ranges = {"brightness": (0.8, 1.2), "contrast": (0.5, 1.5), "hue": (-0.1, 0.1), "sigma": (0.1, 2.0)}
    for name, (low, high) in ranges.items():
        drawn = [value for one in looks if (value := getattr(one, name)) is not None]
        assert low <= min(drawn) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(drawn) <= high
    assert {one.channels for one in looks if one.channels} == {
        (0, 1, 2),
        (0, 2, 1),
        (1, 0, 2),
        (1, 2, 0),
        (2, 0, 1),
        (2, 1, 0),
    }
    areas = [one.erased[0] for one in looks if one.erased]
    assert 0.02 <= min(areas) < 0.03 < 0.32 < max(areas) <= 0.33


def test_every_size_of_the_list_comes_as_often_as_it_is_there() -> None:
    sizes = (320, 320, 256, 384)
    drawn = [size_at(sizes, 0, step) for step in range(2000)]
    assert drawn == [size_at(sizes, 0, step) for step in range(2000)]
    assert drawn != [size_at(sizes, 1, step) for step in range(2000)]
    for size, share in ((320, 0.5), (256, 0.25), (384, 0.25)):
        assert np.mean([one == size for one in drawn]) == pytest.approx(share, abs=0.03)


def test_presets_give_the_sizes_of_the_repositories_they_are_of() -> None:
    rtdetr, detr = (AugmentationConfig.model_validate({"preset": name}) for name in ("rtdetr", "detr"))
    assert rtdetr.sizes(640, 32) == (480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800)
    assert detr.sizes(800) == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


# ---- who sees it


def test_a_picture_looks_the_same_in_any_share_of_a_batch_and_padding_stays_black() -> None:
    images, sizes = padded_batch(SIDES)
    given = images.clone(), sizes.clone()
    augment = augmentation()
    for step in range(6):
        whole, whole_sizes = augment(images, sizes, IDS, step)
        for first, stop in ((0, 2), (2, 5), (4, 5)):
            high, wide = sizes[first:stop].amax(0).tolist()  # a share is padded to its own largest image
            part, part_sizes = augment(images[first:stop, :high, :wide], sizes[first:stop], IDS[first:stop], step)
            assert torch.equal(part_sizes, whole_sizes[first:stop])
            assert torch.equal(part, whole[first:stop, : part.shape[1], : part.shape[2]])
        for image, (height, width) in zip(whole, whole_sizes.tolist(), strict=True):
            assert not image[height:].any()
            assert not image[:, width:].any()
            assert image[:height, :width].any()
        assert whole.dtype == torch.uint8
    assert torch.equal(images, given[0])
    assert torch.equal(sizes, given[1])


def test_the_teacher_sees_the_batch_as_it_was_and_the_student_does_not() -> None:
    options = ("augmentation.preset=rtdetr", "augmentation.colour_probability=1")
    augmented, plain = (
        make_training(recipe(None, *options), random_teacher()),
        make_training(recipe(), random_teacher()),
    )
    batch = batch_of(2, 1)
    assert batch.teacher_images is batch.images
    before = batch.images.clone()
    values, usual = augmented.train_step(batch), plain.train_step(batch)
    assert torch.equal(batch.images, before)
    assert values["class"] != usual["class"]
    assert augmented._ask_teacher(batch) is not None
    one, other = augmented._ask_teacher(batch), plain._ask_teacher(batch)
    assert one is not None
    assert other is not None
    assert torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_of_a_step_see_what_the_whole_batch_sees(family: str) -> None:
    # One object each, so that the mean over the parts is that of the whole.
    student = {**FAMILIES[family], "backbone_norm": "frozen"}
    values = []
    for size in (0, 2):
        config = recipe(student, *ALL_FIELDS, "training.batch_size=4", f"training.micro_batch_size={size}")
        training = make_training(config)
        parts = parts_of(arrays([1, 1, 1, 1]), config.training, 1)
        assert len(parts) == (2 if size else 1)
        values.append(training.train_step(*map(train_batch, parts))["total"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_a_stopped_run_goes_on_with_the_looks_and_sizes_of_one_that_was_not() -> None:
    batches = [batch_of(2, 1, seed=step) for step in range(4)]
    whole, resumed = (make_training(recipe(None, *FULL, *ALL_FIELDS), random_teacher()) for _ in range(2))
    for step, batch in enumerate(batches):
        whole.train_step(batch)
        if step == 1:
            resumed.load_state(whole.state(), 2)
    torch.rand(7)
    for batch in batches[2:]:
        resumed.train_step(batch)
    assert_equal(resumed.state(), whole.state())


def test_it_ends_where_the_recipe_says_and_is_off_unless_it_is_asked_for() -> None:
    images, sizes = padded_batch(SIDES)
    augment = augmentation(EVERYTHING.model_copy(update={"until": 0.9}))
    assert augment(images, sizes, IDS, 90) == (images, sizes)
    assert augment(images, sizes, IDS, 89)[0] is not images
    assert {augment.size_at(step) for step in range(90)} == {16, 24, 32, 40}
    assert {augment.size_at(step) for step in range(90, 100)} == {32}
    assert make_training(recipe()).augmentation is None
    assert make_training(recipe(None, "augmentation.colour_probability=1")).augmentation is None  # of nothing


def test_shares_of_two_workers_are_seen_as_by_one() -> None:
    augment = make_training(recipe(None, *ALL_FIELDS)).augmentation
    assert augment is not None
    batch = arrays([1, 0, 2, 1, 1])
    whole = train_batch(batch)
    for step in range(4):
        images, sizes = augment(whole.images, whole.sizes, whole.targets.image_ids, step)
        parts = []
        for rank in range(2):
            share = train_batch({name: split(array, 2, rank) for name, array in batch.items()})
            parts.append(augment(share.images, share.sizes, share.targets.image_ids, step))
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), sizes)


# ---- sizes and students


@pytest.mark.parametrize("family", ["rt_detr", "d_fine", "detr", "dab-detr"])
def test_students_of_other_families_train_at_every_size(family: str) -> None:
    student = {"family": family, "feature_levels": 2 if family in ("rt_detr", "d_fine") else 1}
    training = make_training(recipe(student, *ALL_FIELDS), random_teacher())
    assert training.augmentation is not None
    if family in ("rt_detr", "d_fine"):  # its stride is 8
        assert set(training.augmentation.sizes) == {48, 56, 64, 72, 80}
    seen = set()
    for step in range(4):
        values = training.train_step(batch_of(2, 1, seed=step))
        assert all(torch.isfinite(value) for value in values.values())
        seen.add(training.augmentation.size_at(step))
    assert len(seen) > 1
    with training.evaluation_weights():
        assert training.config.student.resize.size == 64


def test_a_size_with_fewer_cells_than_queries_is_refused_by_name(tmp_path: Path) -> None:
    student = {"family": "rt_detr", "feature_levels": 2, "queries": 100}
    with pytest.raises(QskdError, match=r"scales has 0\.5, which is 32 pixels: 80 cells .* 100 queries"):
        recipe(student, "augmentation.scales=[1, 0.5]")
    # Of a student from a checkpoint that is known once it is read.
    save_detector(make_training(recipe(student)).student.eval(), tmp_path / "own", ResizeConfig(size=64))
    own = load(None, [f"student.init={tmp_path / 'own'}", "student.resize.size=64", "augmentation.scales=[1, 0.5]"])
    with pytest.raises(QskdError, match=r"augmentation\.scales: 32 x 32 pixels: 80 cells(.|\n)*at least 100"):
        Training(own, make_student(own, LABELS), None, 10, torch.device("cpu"))


# ---- the recipe


def test_a_preset_sets_what_is_not_given_and_a_resolved_recipe_stays_one() -> None:
    own = load(None, ["augmentation.preset=rtdetr", "augmentation.hue=0.2", "augmentation.scales=[]"])
    assert own.augmentation == AugmentationConfig(**{**PRESETS["rtdetr"], "hue": 0.2, "scales": ()})
    assert not own.augmentation.preset
    assert build(to_tree(own)) == own
    for name in PRESETS:
        preset = AugmentationConfig.model_validate({"preset": name})
        assert preset.changes_pixels or preset.changes_sizes
    with pytest.raises(QskdError, match="preset detr sets nothing"):
        load(None, ["augmentation={preset: detr, scales: [1]}"])


@pytest.mark.parametrize("field", ["mosaic", "mixup", "crop_probability", "flip"])
def test_what_the_teacher_would_have_to_see_is_refused_with_the_reason(field: str) -> None:
    with pytest.raises(QskdError, match=f"{field} is not of the student alone"):
        load(None, [f"augmentation.{field}=1"])
