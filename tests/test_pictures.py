"""Pictures of the selection and of the mask show what is kept, where it is, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from qskd.distillation.qskd.drawn import POSITIVE, band_colours, band_range, draw_selection
from qskd.distillation.qskd.seen import KeptQueries, Mask, QSKDSeen
from qskd.distillation.qskd.settings import QuerySelectionConfig
from qskd.evaluation.detections import Detections
from qskd.pictures.drawing import draw_mask, fitted
from qskd.pictures.explain import Explanation
from qskd.pictures.explained import explanation_picture, warning_of
from qskd.pictures.panels import Key, Panel, columns_for, sheet
from qskd.pictures.plots import class_colour, load_font, shortened

IMAGE = np.full((384, 384, 3), 100, np.uint8)
NONE = np.zeros((0, 4))
RULE = QuerySelectionConfig(boundaries=(0.2, 0.4, 0.6), band_weights=(0.0, 0.25, 0.0, 1.0))
COLOURS = band_colours(RULE)
RIM = (0, 0, 0)


def colours(picture: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.unique(picture.reshape(-1, 3), axis=0).tolist()}


@pytest.mark.parametrize(
    ("shape", "expected", "factor"),
    [
        ((64, 64), (512, 512), 8.0),
        ((30, 100), (150, 500), 5.0),
        ((500, 1000), (256, 512), 0.512),
        ((300, 200), (512, 341), 512 / 300),
    ],
)
def test_pictures_of_any_size_fit_a_panel_and_small_ones_keep_their_pixels(
    shape: tuple[int, int], expected: tuple[int, int], factor: float
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    picture, by = fitted(image)
    assert picture.shape == (*expected, 3)
    assert by == pytest.approx(factor)
    if by == round(by):
        assert (picture[:: int(by), :: int(by)] == image).all()


def test_only_kept_bands_have_colours_and_all_differ_to_colour_blind_eyes_too() -> None:
    assert list(COLOURS) == [1, 3]
    many = band_colours(QuerySelectionConfig(boundaries=(0.1, 0.2, 0.3, 0.4), band_weights=(1, 1, 1, 1, 1)))
    assert list(many) == [0, 1, 2, 3, 4]
    # Machado et al. 2009, severity 1: deuteranopia, protanopia
    blind = [
        np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
        np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    ]
    for seen in [np.eye(3), *blind]:
        for a, b in combinations(np.array([POSITIVE, *band_colours(replace_bands(3)).values()], float), 2):
            assert np.linalg.norm(seen @ (a - b)) > 40
    assert band_colours(QuerySelectionConfig(boundaries=(0.5,), band_weights=(0.0, 0.0))) == {}
    light = [np.dot(colour, (0.299, 0.587, 0.114)) for colour in many.values()]
    assert light == sorted(light, reverse=True)  # in order even in grey


def replace_bands(kept: int) -> QuerySelectionConfig:
    return QuerySelectionConfig(boundaries=tuple(0.1 * (i + 1) for i in range(kept)), band_weights=(0.0, *[1.0] * kept))


def test_bands_are_told_in_words() -> None:
    assert [band_range(RULE, band) for band in range(4)] == [
        "GIoU below 0.2",
        "GIoU 0.2 to 0.4",
        "GIoU 0.4 to 0.6",
        "GIoU 0.6 or more",
    ]


def test_dropped_queries_are_not_drawn() -> None:
    picture = draw_selection(IMAGE, NONE, [[60, 60, 180, 180]], [False], [1], [0.0], COLOURS)
    assert colours(picture) == {(100, 100, 100)}


def test_positives_and_bands_have_their_colours_where_their_boxes_are() -> None:
    boxes = [[24, 24, 120, 120], [144, 24, 240, 120], [24, 144, 120, 240]]
    picture = draw_selection(IMAGE, NONE, boxes, [True, False, False], [2, 1, 3], [1.0, 1.0, 0.5], COLOURS)
    assert colours(picture) == {(100, 100, 100), RIM, POSITIVE, COLOURS[1], COLOURS[3]}
    for box, colour in zip(boxes, (POSITIVE, COLOURS[1], COLOURS[3]), strict=True):
        rows, columns = np.nonzero((picture == colour).all(-1))
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box


def test_a_positive_lies_on_top_of_a_hard_negative_at_the_same_place() -> None:
    box = [24, 24, 120, 120]
    picture = draw_selection(IMAGE, NONE, [box] * 2, [True, False], [2, 1], [1.0, 1.0], COLOURS)
    assert COLOURS[1] not in colours(picture)


def test_objects_are_dashed_inside_their_box() -> None:
    picture = draw_selection(IMAGE, [[36, 36, 348, 348]], NONE, [], [], [], COLOURS)
    edge = (picture[36, 36:348] == 255).all(-1)
    assert 0.3 < edge.mean() < 0.8
    rows, columns = np.nonzero((picture != 100).any(-1))
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [36, 36, 348, 348]


def test_boxes_that_are_empty_inverted_or_not_finite_do_not_stop_the_picture() -> None:
    odd = [[10, 10, 10, 10], [50, 50, 20, 20], [np.nan, 0, 10, 10], [0, 0, np.inf, 10], [-1e12, 0, 1e12, 5]]
    draw_selection(IMAGE, odd, odd, [False] * 5, [1] * 5, [1.0] * 5, COLOURS)


def test_the_mask_is_lighter_and_warmer_the_higher_it_is_and_its_scale_does_not_matter() -> None:
    mask = np.repeat(np.linspace(0, 0.02, 8, dtype=np.float32)[None], 8, axis=0)
    picture = draw_mask(IMAGE, mask).astype(float)
    light = picture[192] @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(light[24::48]) > 0).all()  # at the cells' centres
    assert picture[192, 360, 0] > picture[192, 360, 2] + 50  # yellow, not violet
    np.testing.assert_array_equal(draw_mask(IMAGE, 100 * mask), picture)
    empty = draw_mask(IMAGE, np.zeros((8, 8), np.float32))
    assert len(colours(empty)) == 1


def test_the_mask_lies_on_its_own_side_of_a_picture_that_is_not_square() -> None:
    mask = np.zeros((2, 6), np.float32)
    mask[0, 5] = 1
    light = draw_mask(np.full((100, 300, 3), 100, np.uint8), mask).sum(-1)
    assert np.unravel_index(light.argmax(), light.shape)[0] < 50
    assert np.unravel_index(light.argmax(), light.shape)[1] > 250


def test_long_text_is_cut_to_its_room() -> None:
    font = load_font(15)
    assert shortened("cat", font, 100) == "cat"
    cut = shortened("an exceptionally long name of a class", font, 100)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 100


def test_a_sheet_shows_every_panel_pixel_for_pixel() -> None:
    assert [columns_for(count) for count in (1, 2, 3, 4, 5, 6, 7)] == [1, 2, 3, 2, 3, 3, 3]
    inks = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255), (0, 255, 255)]
    panels = [
        Panel(f"panel {i} " * 30, "a note " * 30, np.full((60 + i, 200, 3), ink, np.uint8), (Key("x" * 500, (ink,)),))
        for i, ink in enumerate(inks)
    ]
    made = sheet("a heading " * 60, "about " * 60, "beware " * 60, panels)
    for i, ink in enumerate(inks):
        found = (made == ink).all(-1)
        assert found[:, : made.shape[1]].sum() >= (60 + i) * 200
        rows, columns = np.nonzero(found)
        block = found[rows.min() : rows.min() + 60 + i, columns.min() : columns.min() + 200]
        assert block.all()


SEEN = QSKDSeen(
    KeptQueries(
        np.array([[8, 8, 24, 24], [30, 30, 50, 60], [40, 4, 60, 20]], np.float32),
        np.array([True, False, False]),
        np.array([3, 3, 0]),
        np.array([1, 1, 0], np.float32),
        RULE,
    ),
    Mask((np.eye(8, dtype=np.float32), np.eye(4, dtype=np.float32)), 0.5, 0.2),
)


def explanation(**changes: object) -> Explanation:
    """Two objects, one detection, three queries of which two are kept, a mask of two maps."""

    def found(boxes: list[list[float]], labels: list[int], scores: list[float]) -> Detections:
        ids = np.zeros(len(boxes), np.int64)
        return Detections(
            ids, np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, int)
        )

    boxes = [[8, 8, 24, 24], [30, 30, 50, 60], [40, 4, 60, 20]]
    made = Explanation(
        name="image",
        image=np.full((64, 64, 3), 90, np.uint8),
        labels=("cat", "a dog of a breed whose name does not fit into any panel of this or another sheet"),
        objects=found(boxes[:2], [0, 1], [1, 1]),
        crowds_xyxy=np.array([[0, 40, 20, 64]], np.float32),
        stand_ins=False,
        threshold=0.3,
        teacher=found(boxes[:1], [1], [0.8]),
        seen=(SEEN,),
        students={"before": found([], [], []), "after": found(boxes[1:2], [0], [0.6])},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_sheets_boxes_are_where_they_are_in_the_numbers() -> None:
    made = explanation_picture(explanation(), "about")
    left, title = 28, 0
    del title
    plain = np.full(3, 90)
    starts = np.flatnonzero((made[:, left + 300] == plain).all(-1))
    top = int(starts[0])
    assert top < 200
    first = made[top : top + 512, left : left + 512]  # ground truth: 64 pixels, each 8 x 8
    rows, columns = np.nonzero((first == class_colour(0)).all(-1))
    inside = (columns >= 64) & (columns < 192) & (rows >= 64) & (rows < 192)
    assert inside.sum() > 900  # the outline of the first object's box, and nothing of it elsewhere but its caption
    assert [columns[inside].min(), columns[inside].max() + 1] == [64, 192]
    chosen = made[top : top + 512, left + 2 * (512 + 28) : left + 2 * (512 + 28) + 512]
    rows, columns = np.nonzero((chosen == COLOURS[3]).all(-1))
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [240, 240, 400, 480]
    rows, columns = np.nonzero((chosen == POSITIVE).all(-1))
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [64, 64, 192, 192]


def test_panels_follow_what_there_is() -> None:
    full = explanation()
    nothing = Detections.empty()
    bare = explanation(teacher=None, seen=())
    no_objects = explanation(
        objects=nothing,
        seen=(
            QSKDSeen(
                replace(SEEN.kept, is_positive=np.zeros(3, bool), weight=np.zeros(3, np.float32)),
                Mask((np.zeros((8, 8), np.float32),), float("nan"), 0.0),
            ),
        ),
    )
    positives_only = replace(SEEN.kept, rule=QuerySelectionConfig(band_weights=(0.0, 0.0)))  # type: ignore[type-var]
    positives_only = replace(positives_only, weight=np.array([1, 0, 0], np.float32), band=np.array([1, 1, 0]))
    explanation_picture(explanation(seen=(replace(SEEN, kept=positives_only),)), "about")
    sizes = [explanation_picture(one, "about").shape for one in (full, bare, no_objects)]
    assert sizes[0][0] > 1.5 * sizes[1][0]  # two rows; one row
    assert sizes[0][1] == sizes[1][1] == sizes[2][1]


def test_pictures_of_images_without_annotations_say_so() -> None:
    assert warning_of(explanation()) == ""
    alarmed = explanation(stand_ins=True)
    assert "Nobody annotated" in warning_of(alarmed)
    assert "sure of nothing" in warning_of(explanation(stand_ins=True, objects=Detections.empty()))
    assert explanation_picture(alarmed, "about").shape[0] > explanation_picture(explanation(), "about").shape[0]
    assert warning_of(explanation(stand_ins=True, teacher=None)) == ""


def test_the_masks_density_weighs_every_cell_of_every_map_alike() -> None:
    fine, coarse = np.zeros((4, 4), np.float32), np.zeros((2, 2), np.float32)
    fine[0, 3], coarse[1, 0] = 1.0, 0.5
    density = Mask((fine, coarse), 0.0, 0.0).density(8, 8)
    assert density[:2, 6:].mean() * 4 == pytest.approx(1.0 / 20 * 64)
    assert density[4:, :4].mean() * 16 == pytest.approx(0.5 / 20 * 64)
    assert density.mean() == pytest.approx((fine.sum() + coarse.sum()) / 20)
