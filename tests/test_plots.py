"""Pictures: sizes, places and colours that can be checked; beauty was looked at."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qskd.pictures.plots import PALETTE, class_colour, curve_plot, draw_boxes, picture_grid

GREY = np.full((400, 600, 3), 128, np.uint8)


def painted(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Left, top, right, bottom (exclusive) of the pixels of exactly this colour."""
    rows, columns = np.nonzero((picture == colour).all(-1))
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_a_box_is_drawn_where_it_is_in_its_classs_colour() -> None:
    picture = draw_boxes(GREY, [[100, 150, 300, 350]], [2], names=["", "", ""])
    np.testing.assert_array_equal(painted(picture, class_colour(2)), [100, 150, 300, 350])
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[200:300, 150:250], GREY[200:300, 150:250])  # the object stays visible
    assert (GREY == 128).all()  # a copy was drawn on


def test_tiny_images_are_enlarged_by_a_whole_factor_with_their_boxes() -> None:
    tiny = np.random.default_rng(0).integers(0, 64, (48, 64, 3)).astype(np.uint8)
    picture = draw_boxes(tiny, [[10, 20, 30, 40]], [0], names=[""], smallest_side=384)
    assert picture.shape == (48 * 6, 64 * 6, 3)
    np.testing.assert_array_equal(painted(picture, class_colour(0)), [60, 120, 180, 240])
    np.testing.assert_array_equal(draw_boxes(tiny, np.zeros((0, 4)), [])[::6, ::6], tiny)
    assert draw_boxes(GREY, [], []).shape == GREY.shape


def test_captions_stay_inside_the_image_and_say_more_with_scores() -> None:
    corner = [[0, 0, 20, 20]]
    bare = draw_boxes(GREY, corner, [1], names=["", ""])
    named = draw_boxes(GREY, corner, [1], names=["", "giraffe"])
    scored = draw_boxes(GREY, corner, [1], [0.87], ["", "giraffe"])
    widths = [painted(picture, class_colour(1))[2] for picture in (bare, named, scored)]
    assert widths[0] < widths[1] < widths[2]
    for box in ([590, 390, 600, 400], [-50, -50, 10, 10], [580, -10, 700, 30]):
        last = painted(draw_boxes(GREY, [box], [1], [0.5], ["", "giraffe"]), class_colour(1))
        alone = painted(draw_boxes(GREY, corner, [1], [0.5], ["", "giraffe"]), class_colour(1))
        assert last[2] - last[0] >= alone[2] - alone[0]  # whole, not cut at the border


def test_the_best_detection_keeps_its_caption_where_they_are_crowded() -> None:
    boxes, scores, labels = [[0, 0, 30, 20]] * 200, [0.5] * 199 + [0.9], [3] * 199 + [4]
    small = np.full((40, 60, 3), 128, np.uint8)

    def painted_best(count: int, names: list[str]) -> np.ndarray:
        last = slice(200 - count, 200)
        picture = draw_boxes(small, boxes[last], labels[last], scores[last], names, smallest_side=60)
        return (picture == class_colour(4)).all(-1)

    caption = painted_best(1, ["a"] * 5) & ~box_line(small, boxes[0])
    assert caption.any()
    assert painted_best(200, ["a"] * 5)[caption].all()


def box_line(image: np.ndarray, box: list[int]) -> np.ndarray:
    return (draw_boxes(image, [box], [4], names=[""] * 5, smallest_side=60) == class_colour(4)).all(-1)


def test_boxes_that_are_empty_inverted_or_not_finite_do_not_stop_the_picture() -> None:
    boxes = [[10, 10, 10, 10], [50, 50, 20, 20], [np.nan, 0, 10, 10], [0, 0, np.inf, 10], [-1e12, 0, 1e12, 5]]
    draw_boxes(GREY, boxes, [0, 1, 2, 3, 4], [0.5] * 5, ["a"] * 5)


def test_wrong_shapes_are_refused() -> None:
    for wrong in (GREY.astype(np.float32), GREY[..., 0], GREY[:0], np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            draw_boxes(wrong, [], [])
    with pytest.raises(ValueError, match="1 boxes, 2 labels"):
        draw_boxes(GREY, [[0, 0, 1, 1]], [1, 2])
    with pytest.raises(ValueError, match="no grid"):
        picture_grid([[GREY, GREY], [GREY]])
    with pytest.raises(ValueError, match="no grid"):
        picture_grid([[GREY]], ["a", "b"])
    with pytest.raises(ValueError, match="no grid"):
        picture_grid([])


def test_a_grid_keeps_each_picture_whole_and_in_its_place() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)]
    shapes = [(100, 200), (200, 200), (50, 100), (100, 400)]
    cells = [np.broadcast_to(np.uint8(c), (*s, 3)) for c, s in zip(colours, shapes, strict=True)]
    plain = picture_grid([cells[:2], cells[2:]], cell_width=200)
    titled = picture_grid([cells[:2], cells[2:]], ["left", "a title that is too long for its column, so it wraps"], 200)
    places = [painted(plain, colour) for colour in colours]
    for (left, top, right, bottom), (height, width) in zip(places, shapes, strict=True):
        assert right - left == 200
        assert bottom - top == round(200 * height / width)
    assert places[0][2] < places[1][0]
    assert places[2][0] == places[0][0]
    assert max(places[0][3], places[1][3]) < places[2][1]
    added = titled.shape[0] - plain.shape[0]
    assert added > 20
    np.testing.assert_array_equal(titled[added + 10 :], plain[10:])  # titles move the pictures down, nothing else
    assert (titled[:added] < 100).any()


def test_colours_are_told_apart_with_red_green_blindness_too() -> None:
    # Machado et al. 2009, severity 1: deuteranopia, protanopia
    blind = [
        np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
        np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    ]
    for seen in [np.eye(3), *blind]:
        for a, b in combinations(np.array(PALETTE, float), 2):
            assert np.linalg.norm(seen @ (a - b)) > 40
    assert class_colour(1) == class_colour(1 + len(PALETTE))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_curves_are_written_with_their_names(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new folder" / f"curve{suffix}"
    series = {f"series {i}": ([0, 1, 2], [i, np.nan, i + 1.0]) for i in range(9)}
    curve_plot(series, "epoch", "AP", path, title="a title")
    if suffix == ".png":
        pixels = np.asarray(Image.open(path).convert("RGB"))
        for colour in PALETTE:
            assert (pixels == colour).all(-1).any()
    else:
        text = path.read_text()
        for name in [*series, "epoch", "AP", "a title"]:
            assert f"<!-- {name} -->" in text


def test_series_of_unequal_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a' has 2 x and 1 y"):
        curve_plot({"a": ([0, 1], [0])}, "x", "y", tmp_path / "a.png")
    curve_plot({}, "x", "y", tmp_path / "empty.png")


def test_pyplot_and_its_global_state_are_never_touched(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, qskd.pictures.plots as p\n"
        "assert 'matplotlib' not in sys.modules\n"
        "p.curve_plot({'a': ([0], [1])}, 'x', 'y', sys.argv[1])\n"
        "p.draw_boxes(np.zeros((9, 9, 3), np.uint8), [[0, 0, 5, 5]], [0])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.svg")], check=True)
