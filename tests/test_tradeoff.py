"""The picture of AP against time and size: every file is there, told apart by more than its colour."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipelines.deployment.tradeoff import Point, draw
from qskd.pictures.plots import class_colour

FLOAT = Point("student", "float32", "onnxruntime", 0.30, 4.0, 1.0)


def inked(*points: Point) -> int:
    """Pixels of the first model's colour."""
    return int((draw(points, "1 thread") == class_colour(4)).all(-1).sum())


def test_the_fewer_the_bits_the_less_of_a_mark_is_filled() -> None:
    both = [inked(replace(FLOAT, precision=name)) for name in ("float32", "float16", "bfloat16", "int8")]
    assert both[0] > both[1] > both[3] > 0
    assert both[0] > both[2] > both[3]


def test_runtimes_have_shapes_and_models_colours_and_a_wide_axis_is_drawn() -> None:
    other = replace(FLOAT, model="a $strange$ name\n", ap=0.5, ms=400.0, megabytes=90.0)
    picture = draw([FLOAT, other], "1 thread")
    assert picture.dtype == np.uint8
    for number in (4, 5):
        assert (picture == class_colour(number)).all(-1).any()
    assert inked(FLOAT) != inked(replace(FLOAT, runtime="OpenVINO"))
