"""Pixels made where the model runs are those that Pillow makes on the reader, bit for bit."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.pictures import resample
from qskd.datasets.pictures.cuts import (
    MOST_TAPS,
    SHIP_BYTES,
    Cuts,
    Plan,
    finished_cut,
    is_finished,
    placed,
    planned,
    raw_cut,
    reduced_scale,
    taps,
)
from qskd.datasets.pictures.joining import pad
from qskd.datasets.pictures.resample import make_pixels
from qskd.datasets.views import View, check_image, decode_image, make_view, view_image

CROPS = ViewConfig(crop_probability=0.6, crop_min_scale=0.1)
MIRROR = View((0.0, 0.0, 1.0, 1.0), True)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Every level, and the strongest edges there are: where a rounding differs, it shows."""
    random = np.random.default_rng([seed, height, width])
    levels = random.integers(0, 256, (height, width, 3))
    return Image.fromarray(np.where(random.random((height, 1, 1)) < 0.3, levels // 128 * 255, levels).astype(np.uint8))


def sent(pictures: Sequence[Image.Image], plans: Sequence[Plan]) -> tuple[torch.Tensor, list[Cuts]]:
    parts = [np.full(plan.nbytes, 77, np.uint8) for plan in plans]
    for picture, plan, part in zip(pictures, plans, parts, strict=True):
        plan.fill_from(picture, part)
    return torch.from_numpy(np.concatenate(parts)), placed(plans)


def plans_of(
    pictures: Sequence[Image.Image], views: Sequence[View], resizes: Sequence[ResizeConfig], finish: bool = False
) -> list[Plan]:
    return [planned(each.size[::-1], view, resizes, finish) for each, view in zip(pictures, views, strict=True)]


def differing(
    pictures: Sequence[Image.Image], views: Sequence[View], resizes: Sequence[ResizeConfig], finish: bool = False
) -> int:
    """Values that differ from what Pillow gives, over all sizes."""
    flat, cuts = sent(pictures, plans_of(pictures, views, resizes, finish))
    count = 0
    for resize, lines in zip(resizes, cuts, strict=True):
        wanted, sizes = pad([view_image(picture, view, resize) for picture, view in zip(pictures, views, strict=True)])
        images, found = make_pixels(flat, lines)
        assert (images.dtype, images.shape) == (torch.uint8, wanted.shape)
        np.testing.assert_array_equal(found.numpy(), sizes)
        assert found.dtype == torch.int32
        count += int((images.numpy() != wanted).sum())
    return count


@pytest.mark.parametrize("seed", range(12))
def test_a_batch_of_any_sizes_and_views_is_the_one_pillow_makes(seed: int) -> None:
    random = np.random.default_rng(seed)
    sides = np.exp(random.uniform(0, np.log(300), (5, 2))).astype(int).tolist()
    pictures = [noise(height, width) for height, width in [*sides, [1, 1], [1, 40], [230, 2]]]
    views = [make_view(CROPS, number, seed) for number in range(len(pictures))]
    small, large = random.integers(1, 60), random.integers(60, 240)
    resizes = [
        ResizeConfig(mode="square", size=int(large)),
        ResizeConfig(mode="shortest_edge", size=int(small), longest=int(large)),
    ]
    assert differing(pictures, views, resizes) == 0


@pytest.mark.parametrize("size", [64, 320, 800])
def test_a_photograph_of_cocos_size_is_the_one_pillow_makes(size: int) -> None:
    pictures, views = [noise(480, 640), noise(640, 427)], [MIRROR, View((0.11, 0.2, 0.93, 1.0), False)]
    assert all(plan.is_raw for plan in plans_of(pictures, views, [ResizeConfig(size=size)]))
    assert differing(pictures, views, [ResizeConfig(mode="shortest_edge", size=size)]) == 0


def test_both_orders_of_sides_occur_and_stand_beside_finished_pictures_in_a_batch() -> None:
    resize = ResizeConfig(mode="square", size=40)
    pictures, views = [noise(130, 41), noise(41, 130), noise(40, 40), noise(3000, 2)], [MIRROR] * 4
    (lines,) = placed(plans_of(pictures, views, [resize]))
    assert is_finished(lines).tolist() == [False, False, False, True]
    assert set(lines[:, -1]) == {0, 1}
    assert differing(pictures, views, [resize]) == 0


def test_pictures_of_all_kinds_that_are_decoded_go_the_same_way() -> None:
    random = np.random.default_rng(0)
    deep = Image.fromarray(random.integers(0, 65536, (50, 70)).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    base = noise(50, 70)
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (base.convert("L"), "PNG", {}),
        (base.convert("CMYK"), "JPEG", {}),
        (base.convert("P"), "PNG", {}),
        (base.convert("RGBA"), "PNG", {}),
        (deep, "PNG", {}),
        (base, "JPEG", {"exif": turned}),
    ]
    pictures = []
    for picture, kind, options in kinds:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        pictures.append(decode_image(buffer.getvalue(), kind))
    assert pictures[-1].size == (50, 70)
    assert differing(pictures, [MIRROR] * len(pictures), [ResizeConfig(size=33), ResizeConfig(size=91)]) == 0


def test_what_is_shipped_is_raw_once_or_finished_where_that_is_less() -> None:
    resizes = [ResizeConfig(size=640), ResizeConfig(size=800)]
    photograph, large = (480, 640), (1200, 1600)
    raw = planned(photograph, MIRROR, resizes, finish=False)
    assert raw.nbytes == 3 * 480 * 640 < SHIP_BYTES
    assert planned(photograph, MIRROR, resizes, finish=True).nbytes == 3 * (640 * 640 + 800 * 800)
    assert planned(large, MIRROR, resizes[:1], finish=False).nbytes == 3 * 640 * 640  # of 5.8 MB
    assert planned(large, MIRROR, [ResizeConfig(size=1600)], finish=False).nbytes == 3 * 1200 * 1600
    assert differing([noise(30, 40)], [MIRROR], resizes, finish=True) == 0


def test_a_strong_reduction_is_made_on_the_reader() -> None:
    """One long picture would otherwise cost every batch that it is in hundreds of kernels."""
    assert max(taps(raw_cut(6000, 20, MIRROR, ResizeConfig(size=64))[None])) > MOST_TAPS
    assert not planned((6000, 20), MIRROR, [ResizeConfig(size=64)], finish=False).is_raw


def test_a_picture_of_another_size_than_was_said_is_not_put_anywhere() -> None:
    buffer, out = io.BytesIO(), np.zeros(3 * 30 * 40, np.uint8)
    noise(40, 30).save(buffer, "PNG")
    plan = planned((30, 40), MIRROR, [ResizeConfig(size=50)], finish=False)
    assert plan.fill(buffer.getvalue(), "it", out) == (40, 30)
    assert not out.any()


def test_a_batch_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [noise(40 + number, 50) for number in range(5)]
    monkeypatch.setattr(resample, "PART_VALUES", 3 * 80 * 80 * 2)
    assert differing(pictures, [MIRROR] * 5, [ResizeConfig(size=80)]) == 0


def test_no_images_give_an_empty_batch() -> None:
    images, sizes = make_pixels(torch.zeros(0, dtype=torch.uint8), finished_cut(1, 1)[None][:0])
    wanted, wanted_sizes = pad([])
    assert (images.shape, sizes.shape) == (wanted.shape, wanted_sizes.shape)


class Operators(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


def test_more_images_are_no_more_operators_and_none_asks_the_device() -> None:
    counts = []
    for images in (2, 9):
        pictures = [noise(30, 40, number) for number in range(images)]
        flat, (lines,) = sent(pictures, plans_of(pictures, [MIRROR] * images, [ResizeConfig(size=50)]))
        with Operators() as seen:
            make_pixels(flat, lines)
        counts.append(seen.count)
    assert counts[0] == counts[1]
    assert not {"item", "tolist", "nonzero", "masked_select", "cpu", "numpy", "__bool__"} & counts[0].keys()


def photograph(height: int, width: int) -> Image.Image:
    """Edges and fine texture, in a picture that JPEG keeps well."""
    y, x = np.mgrid[:height, :width]
    levels = 128 + 60 * np.sin(x / 9 + y / 31) + 40 * ((x // 40 + y // 56) % 2) + 9 * np.sin(x * y / 700)
    return Image.fromarray(np.stack([levels, 255 - levels, levels * x / width], axis=-1).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_jpeg_decoded_at_a_part_of_its_size_differs_by_little_however_it_is_turned(orientation: int) -> None:
    buffer, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = orientation
    photograph(901, 1203).save(buffer, "JPEG", quality=95, exif=turned)
    whole = decode_image(buffer.getvalue(), "it")
    views = [MIRROR, View((0.1, 0.2, 0.93, 0.97), False)]
    for view, resize in itertools.product(views, [ResizeConfig(size=100), ResizeConfig(size=30)]):
        plan = planned((whole.height, whole.width), view, [resize], finish=False)
        assert max(plan.scales) > 1
        found = filled(plan, buffer.getvalue()).reshape(resize.size, resize.size, 3).astype(int)
        difference = np.abs(found - view_image(whole, view, resize))
        assert difference.any()
        assert difference.mean() < 1
        assert difference.max() < 14


def filled(plan: Plan, encoded: bytes) -> np.ndarray:
    out = np.zeros(plan.nbytes, np.uint8)
    assert plan.fill(encoded, "it", out) == plan.size
    return out


def test_what_one_model_sees_does_not_depend_on_another_ones_size() -> None:
    buffer = io.BytesIO()
    photograph(901, 1203).save(buffer, "JPEG", quality=95)
    resizes = [ResizeConfig(size=60), ResizeConfig(size=640)]
    both = planned((901, 1203), MIRROR, resizes, finish=False)
    alone = [planned((901, 1203), MIRROR, [resize], finish=False) for resize in resizes]
    found = [filled(plan, buffer.getvalue()) for plan in alone]
    np.testing.assert_array_equal(filled(both, buffer.getvalue()), np.concatenate(found))
    exact = view_image(decode_image(buffer.getvalue(), "it"), MIRROR, resizes[1])
    np.testing.assert_array_equal(found[1], exact.reshape(-1))


def test_only_large_pictures_for_much_smaller_models_are_decoded_at_a_part_of_their_size() -> None:
    def scale(height: int, width: int, size: int) -> int:
        return reduced_scale(raw_cut(height, width, View.IDENTITY, ResizeConfig(size=size)))

    assert [scale(480, 640, size) for size in (20, 64, 800)] == [1, 1, 1]
    assert [scale(3000, 4000, size) for size in (125, 250, 251, 500, 501, 800)] == [8, 4, 2, 2, 1, 1]


@pytest.mark.parametrize("size", [(100, 5), (3, 100), (1, 1)])
def test_a_jpeg_of_a_few_pixels_is_checked_as_it_is_read(size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "JPEG")
    seen = check_image(buffer.getvalue(), "thin.jpg")
    assert (seen.width, seen.height) == decode_image(buffer.getvalue(), "thin.jpg").size == size
