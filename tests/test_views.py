"""Views: the seeded crop and flip, and that pictures and boxes go through it together."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.views import View, check_image, decode_image, make_view, resized_size, view_boxes, view_image
from qskd.errors import QskdError

CROPS = ViewConfig(crop_probability=0.8, crop_min_scale=0.4)


def seeded_view(policy: ViewConfig, seed: int, image_id: int, index: int) -> View:
    return make_view(policy.model_copy(update={"seed": seed}), image_id, index)


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_the_identity_view_changes_no_box() -> None:
    boxes_xyxy = np.array([[10, 20, 50, 60], [0, 0, 100, 80]], np.float32)
    boxes, kept = view_boxes(boxes_xyxy, 100, 80, View.IDENTITY, 1.0)
    np.testing.assert_allclose(boxes, [[0.3, 0.5, 0.4, 0.5], [0.5, 0.5, 1, 1]], atol=1e-7)
    assert kept.tolist() == [0, 1]
    assert boxes.dtype == np.float32


def test_a_view_depends_on_seed_image_and_index_and_on_each_of_them() -> None:
    always = ViewConfig(crop_probability=1.0, derived="none")
    view = seeded_view(always, 1, 2, 3)
    assert seeded_view(always, 1, 2, 3) == view
    others = [seeded_view(always, *key) for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (-1, 2, 3), (1, -2, 3))]
    assert len({*others, view}) == 6


def test_a_view_is_the_same_in_another_process() -> None:
    code = "from qskd.datasets.views import *; from qskd.config import ViewConfig as V; print([make_view(V(crop_probability=.8,"
    code += "crop_min_scale=.4, seed=7), i, 1) for i in range(20)])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str([seeded_view(CROPS, 7, i, 1) for i in range(20)])


def test_views_follow_the_policy() -> None:
    views = [seeded_view(CROPS, 0, i, 0) for i in range(2000)]
    flips = np.mean([view.flip for view in views])
    crops = np.mean([not view.is_whole for view in views])
    assert abs(flips - 0.5) < 0.05
    assert abs(crops - 0.8) < 0.05
    sides = np.array([view.crop_xyxy for view in views])
    assert sides.min() >= 0
    assert sides.max() <= 1
    assert ((sides[:, 2:] - sides[:, :2]) >= 0.4 - 1e-12).all()
    never = ViewConfig(flip_probability=0.0)
    assert all(seeded_view(never, 0, i, 0) == View.IDENTITY for i in range(100))


def test_changing_the_crops_moves_no_flip() -> None:
    whole = ViewConfig(crop_probability=0.0)
    assert [seeded_view(CROPS, 0, i, 0).flip for i in range(100)] == [
        seeded_view(whole, 0, i, 0).flip for i in range(100)
    ]


def test_flipping_twice_gives_the_boxes_back() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 50, (20, 2))
    boxes_xyxy = np.concatenate([low, low + rng.uniform(1, 40, (20, 2))], axis=1).astype(np.float32)
    mirror = View((0.0, 0.0, 1.0, 1.0), True)
    flipped, _ = view_boxes(boxes_xyxy, 100, 100, mirror, 0.0)
    back_xyxy = np.concatenate([flipped[:, :2] - flipped[:, 2:] / 2, flipped[:, :2] + flipped[:, 2:] / 2], axis=1) * 100
    again, _ = view_boxes(back_xyxy.astype(np.float32), 100, 100, mirror, 0.0)
    plain, _ = view_boxes(boxes_xyxy, 100, 100, View.IDENTITY, 0.0)
    np.testing.assert_allclose(again, plain, atol=1e-6)
    assert np.abs(flipped - plain).max() > 0.1


@pytest.mark.parametrize("size", [96, 240])
def test_a_rectangle_is_found_where_its_box_says(size: int) -> None:
    """The picture and the boxes go through different code; both must land on the same pixels, at any model's size."""
    rng = np.random.default_rng(1)
    checked = 0
    for number in range(60):
        x, y = rng.integers(10, 120, 2)
        w, h = rng.integers(30, 70, 2)
        image = np.zeros((200, 240, 3), np.uint8)
        image[y : y + h, x : x + w] = 255
        view = seeded_view(CROPS, 3, number, 0)
        boxes, kept = view_boxes(np.array([[x, y, x + w, y + h]], np.float32), 240, 200, view, 0.3)
        if not len(kept):
            continue
        seen = view_image(image, view, ResizeConfig(size=size))[..., 0] > 127
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        cx, cy, bw, bh = boxes[0] * size
        assert np.abs(found - [cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2]).max() <= 1.0
        checked += 1
    assert checked > 30


def test_a_box_that_a_crop_hides_is_dropped_by_its_visible_share() -> None:
    boxes_xyxy = np.array([[40, 0, 60, 10], [45, 0, 65, 10], [60, 0, 70, 10], [0, 0, 10, 10]], np.float32)
    half = View((0.0, 0.0, 0.5, 1.0), False)
    assert view_boxes(boxes_xyxy, 100, 10, half, 0.5)[1].tolist() == [0, 3]
    assert view_boxes(boxes_xyxy, 100, 10, half, 0.25)[1].tolist() == [0, 1, 3]
    boxes, kept = view_boxes(boxes_xyxy, 100, 10, half, 0.0)
    assert kept.tolist() == [0, 1, 3]  # nothing visible is never kept
    np.testing.assert_allclose(boxes[0], [0.9, 0.5, 0.2, 1.0], atol=1e-6)


def test_no_boxes_give_no_boxes() -> None:
    boxes, kept = view_boxes(np.zeros((0, 4), np.float32), 10, 10, seeded_view(CROPS, 0, 0, 0), 0.5)
    assert boxes.shape == (0, 4)
    assert kept.shape == (0,)


def test_resized_size_is_transformers_rule() -> None:
    transforms = pytest.importorskip("transformers.image_transforms")
    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width, size = (int(v) for v in rng.integers(20, 900, 3))
        longest = int(rng.integers(size, 1400))
        expected = transforms.get_size_with_aspect_ratio((height, width), size, longest)
        resize = ResizeConfig(mode="shortest_edge", size=size, longest=longest)
        if min(expected) > 0:
            assert resized_size(height, width, resize) == tuple(expected), (height, width, size, longest)
    assert resized_size(17, 400, ResizeConfig(size=64)) == (64, 64)
    assert resized_size(1, 4000, ResizeConfig(mode="shortest_edge", size=64, longest=100)) == (1, 100)


def test_identity_pixels_are_those_of_transformers_processor() -> None:
    module = pytest.importorskip("transformers.models.conditional_detr.image_processing_pil_conditional_detr")
    image = np.random.default_rng(0).integers(0, 256, (123, 187, 3), np.uint8)
    for resize, size in (
        (ResizeConfig(size=96), {"height": 96, "width": 96}),
        (ResizeConfig(mode="shortest_edge", size=150, longest=200), {"shortest_edge": 150, "longest_edge": 200}),
    ):
        processor = module.ConditionalDetrImageProcessorPil(
            size=size, do_rescale=False, do_normalize=False, do_pad=False
        )
        expected = np.asarray(processor(Image.fromarray(image), return_tensors="np")["pixel_values"])[0]
        np.testing.assert_array_equal(view_image(image, View.IDENTITY, resize), expected.transpose(1, 2, 0))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_pictures_of_any_mode_become_rgb(mode: str) -> None:
    gradient = Image.fromarray(np.tile(np.arange(0, 250, 10, dtype=np.uint8), (20, 1)))
    original = gradient.convert("RGB").convert(mode)
    decoded = decode_image(encode(original, "TIFF" if mode == "CMYK" else "PNG"), "x")
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(original.convert("RGB")))


def test_sixteen_bit_greyscale_keeps_its_range() -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(values), "PNG"), "x"))
    assert decoded.min() == 0
    assert decoded.max() == 255
    assert len(np.unique(decoded)) > 200


def test_exif_orientation_turns_the_picture_and_is_reported() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(picture, "JPEG", exif=exif)
    assert check_image(encoded, "x")[:3] == (16, 32, 6)
    assert decode_image(encoded, "x").size == (16, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_pictures_are_named_by_both_readers(kind: str) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    encoded = encode(picture, kind)
    assert check_image(encoded, "x")[:2] == (64, 64)
    for share in (0.0, 0.01, 0.4, 0.9):
        for read in (check_image, decode_image):
            with pytest.raises(QskdError, match=r"the_file\.jpg"):
                read(encoded[: int(len(encoded) * share)], "the_file.jpg")


def test_formats_that_start_programs_are_refused() -> None:
    postscript = encode(Image.new("RGB", (8, 8)), "EPS")
    with pytest.raises(QskdError, match="not a readable image"):
        check_image(postscript, "x")
