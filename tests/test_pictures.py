"""Pictures of the selection and of the mask show what is kept, where it is, and nothing else."""

from __future__ import annotations

import numpy as np

from qskd.pictures import BANDS, POSITIVE, draw_mask, draw_selection, enlarged

IMAGE = np.full((64, 64, 3), 100, np.uint8)
NONE = np.zeros((0, 4))


def colours(picture: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.unique(picture.reshape(-1, 3), axis=0).tolist()}


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    picture, factor = enlarged(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    assert factor == 6
    assert picture.shape == (384, 384, 3)
    assert (picture[::6, ::6] == np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).all()


def test_dropped_queries_are_not_drawn() -> None:
    picture = draw_selection(IMAGE, NONE, [[10, 10, 30, 30]], [False], [1], [0.0])
    assert colours(picture) == {(100, 100, 100)}


def test_positives_and_bands_have_their_colours_where_their_boxes_are() -> None:
    boxes = [[4, 4, 20, 20], [24, 4, 40, 20], [4, 24, 20, 40]]
    picture = draw_selection(IMAGE, NONE, boxes, [True, False, False], [2, 1, 2], [1.0, 1.0, 0.5])
    assert colours(picture) == {(100, 100, 100), POSITIVE, BANDS[0], BANDS[1]}
    for box, colour in zip(boxes, (POSITIVE, BANDS[0], BANDS[1]), strict=True):
        assert tuple(picture[6 * box[1], 6 * box[0] + 20]) == colour
        assert tuple(picture[6 * box[3] - 1, 6 * box[2] - 1]) == colour


def test_a_positive_lies_on_top_of_a_hard_negative_at_the_same_place() -> None:
    picture = draw_selection(IMAGE, NONE, [[4, 4, 20, 20]] * 2, [True, False], [2, 1], [1.0, 1.0])
    assert BANDS[0] not in colours(picture)


def test_objects_are_dashed() -> None:
    picture = draw_selection(IMAGE, [[6, 6, 58, 58]], NONE, [], [], [])
    edge = (picture[36, 36:348] == 255).all(-1)
    assert 0.3 < edge.mean() < 0.8


def test_the_mask_lights_what_it_covers_and_dims_the_rest() -> None:
    mask = np.zeros((8, 8), np.float32)
    mask[:, :4] = 0.02  # its maximum counts, not its size
    picture = draw_mask(IMAGE, mask)
    assert picture[:, :96].mean() > 90
    assert picture[:, -96:].mean() < 40
    assert draw_mask(IMAGE, np.zeros((8, 8), np.float32)).max() < 40
