"""What augmentation does to pixels, against references of other hands: Pillow's enhancers, colorsys, scipy, slow loops."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy import ndimage
from torch import Tensor

from qskd.config import ResizeConfig
from qskd.training.augmentation import pixels as pixel_ops
from qskd.training.augmentation.student import resized

AMOUNTS = (0.5, 0.93, 1.0, 1.5)
ROUNDED = 1.51 / 255  # Pillow rounds its mean, its grey and its result to whole levels
BATCH = np.random.default_rng(0).integers(0, 256, (len(AMOUNTS), 12, 17, 3), np.uint8)
SIZES = torch.tensor([[12, 17], [9, 17], [12, 4], [1, 2]])  # the rest of each picture is padding


def padded() -> Tensor:
    images = torch.from_numpy(BATCH).permute(0, 3, 1, 2).float() / 255
    return images * pixel_ops.real_part(SIZES, 12, 17)[:, None]


def real(pixels: Tensor, number: int) -> np.ndarray:
    """[h, w, 3] of one image without its padding."""
    height, width = SIZES[number].tolist()
    return pixels[number, :, :height, :width].permute(1, 2, 0).numpy()


def picture(number: int) -> Image.Image:
    height, width = SIZES[number].tolist()
    return Image.fromarray(np.ascontiguousarray(BATCH[number, :height, :width]))


@pytest.mark.parametrize("what", ["brightness", "contrast", "saturation"])
def test_factors_do_what_pillow_s_enhancers_do_whatever_the_padding(what: str) -> None:
    factor = torch.tensor(AMOUNTS)
    found, enhancer = {
        "brightness": (pixel_ops.brighten(padded(), factor), ImageEnhance.Brightness),
        "contrast": (pixel_ops.change_contrast(padded(), factor, SIZES), ImageEnhance.Contrast),
        "saturation": (pixel_ops.saturate(padded(), factor), ImageEnhance.Color),
    }[what]
    for number, amount in enumerate(AMOUNTS):
        expected = np.asarray(enhancer(picture(number)).enhance(amount)) / 255
        np.testing.assert_allclose(real(found, number), expected, atol=ROUNDED)
    assert not torch.equal(found[0], padded()[0])


def test_grey_is_pillow_s() -> None:
    found = pixel_ops.to_grey(padded())
    for number in range(len(AMOUNTS)):
        expected = np.asarray(picture(number).convert("L").convert("RGB")) / 255
        np.testing.assert_allclose(real(found, number), expected, atol=ROUNDED)


def test_hues_turn_as_colorsys_turns_them() -> None:
    pixels = padded()
    pixels[0, :, 0, :4] = torch.tensor([[0.5, 0.5, 0.5], [0, 0, 0], [1, 1, 1], [0.7, 0.7, 0.2]]).T  # greys, two largest
    turns = (-0.5, 0.05, 0.31, 0.5)
    found = pixel_ops.turn_hue(pixels, torch.tensor(turns))
    for number, turn in enumerate(turns):
        for old, new in zip(real(pixels, number).reshape(-1, 3), real(found, number).reshape(-1, 3), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*map(float, old))
            np.testing.assert_allclose(new, colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), atol=2e-6)


def test_blur_is_scipy_s_gaussian_mirrored_at_each_picture_s_own_edges() -> None:
    sigmas = (0.1, 0.8, 1.7, 2.0)
    found = pixel_ops.blur(2.0, padded(), torch.tensor(sigmas), SIZES)
    for number, sigma in enumerate(sigmas):
        own = real(padded(), number).astype(np.float64)
        blurred = ndimage.gaussian_filter(own, (sigma, sigma, 0), mode="mirror", truncate=6.0 / sigma)
        np.testing.assert_allclose(real(found, number), blurred, atol=2e-6)


def test_channels_come_from_where_they_are_said_to() -> None:
    sources = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]])
    found = pixel_ops.shuffle_channels(padded(), sources)
    for number, order in enumerate(sources.tolist()):
        np.testing.assert_array_equal(real(found, number), real(padded(), number)[..., order])


def test_a_rectangle_of_the_area_asked_for_is_erased_inside_the_picture_and_nothing_else() -> None:
    fill = torch.tensor([0.1, 0.2, 0.3])
    area, ratio = torch.tensor([0.25, 0.33, 1.0, 0.02]), torch.tensor([1.0, 3.3, 0.3, 1.0])
    place = torch.tensor([[0.0, 0.0], [0.999, 0.999], [0.5, 0.5], [0.2, 0.9]])
    found = pixel_ops.erase(fill, padded(), area, ratio, place, SIZES)
    for number, (height, width) in enumerate(SIZES.tolist()):
        erased = (found[number] == fill[:, None, None]).all(0).numpy()
        rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
        high, wide = len(rows), len(columns)
        assert erased.sum() == high * wide  # a rectangle
        assert rows[-1] < height
        assert columns[-1] < width
        pixels = float(area[number]) * height * width
        aspect = float(ratio[number])
        assert high == min(height, max(1, round((pixels * aspect) ** 0.5)))
        assert wide == min(width, max(1, round((pixels / aspect) ** 0.5)))
        assert torch.equal(found[number][:, ~erased], padded()[number][:, ~erased])
        if not place[number].any():
            assert (rows[0], columns[0]) == (0, 0)
        if place[number].min() > 0.99:
            assert (rows[-1], columns[-1]) == (height - 1, width - 1)


@pytest.mark.parametrize("size", [24, 40, 77])
def test_another_size_is_pillow_s_resize_of_each_picture_without_its_padding(size: int) -> None:
    smooth = np.asarray(Image.fromarray(BATCH[0]).resize((64, 48), Image.Resampling.BICUBIC))
    sizes = torch.tensor([[48, 64], [48, 40]], dtype=torch.int32)
    images = torch.from_numpy(np.stack([smooth, smooth]))
    images[1, :, 40:] = 0
    base = ResizeConfig(mode="shortest_edge", size=48)
    found, found_sizes = resized(images, sizes, base, size)
    for number, (height, width) in enumerate(sizes.tolist()):
        high, wide = round(height * size / 48), round(width * size / 48)
        assert found_sizes[number].tolist() == [high, wide]
        alone = Image.fromarray(images[number, :height, :width].numpy())
        expected = np.asarray(alone.resize((wide, high), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(found[number, :high, :wide].numpy().astype(int) - expected).max() <= 1
        assert not found[number, high:].any()
        assert not found[number, :, wide:].any()
    square, square_sizes = resized(images[:1, :, :48], torch.tensor([[48, 48]]), ResizeConfig(size=48), size)
    assert square.shape == (1, size, size, 3)
    assert square_sizes.tolist() == [[size, size]]
    expected = np.asarray(Image.fromarray(smooth[:, :48]).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(square[0].numpy().astype(int) - expected).max() <= 1
