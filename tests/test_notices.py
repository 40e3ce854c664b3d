"""What a recipe makes of a training without saying so is said; what it says, or what does not matter, is not."""

from __future__ import annotations

import pytest

from pipelines.training.notices import notices
from qskd.config.recipe import load

SQUARE = "student.resize={mode: square, size: 640}"
LEVELS = "student.feature_levels=3"


@pytest.mark.parametrize(
    ("overrides", "epochs", "said"),
    [
        ([], 50.0, ["at no cost"]),
        (["teacher.cache.path=cache"], 50.0, ["a cache N times as large"]),
        (["data.views.count=4"], 50.0, []),
        (["data.views.flip_probability=0"], 50.0, []),
        ([], 2.0, []),
        (["data.views.count=4", "student.family=rt_detr", SQUARE, LEVELS], 50.0, ["without denoising queries: "]),
        (["data.views.count=4", "student.family=d_fine", SQUARE, LEVELS], 50.0, ["box distributions (FGL, DDF)"]),
        (["student.family=d_fine", "student.init=/some/where"], 2.0, []),
        (
            ["compute.workers=8", "student.family=rt_detr_v2", SQUARE, LEVELS],
            2.0,
            ["denoising", "the 8 workers normalises its own 2 images"],
        ),
    ],
)
def test_what_happens_silently_is_said(overrides: list[str], epochs: float, said: list[str]) -> None:
    found = notices(load(None, overrides), epochs)
    assert len(found) == len(said)
    for notice, words in zip(found, said, strict=True):
        assert words in notice
