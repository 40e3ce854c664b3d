"""What a recipe makes of a training without saying so is said; what it says, or what does not matter, is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import STUDENT, silent_student

from pipelines.feed.memory import memory_bytes, too_much_for
from pipelines.training.notices import notices
from qskd.config import StudentConfig
from qskd.config.recipe import load
from qskd.detectors import save_detector

SQUARE = "student.resize={mode: square, size: 640}"
KEPT_SHAPE = "student.resize={mode: shortest_edge, size: 800}"
LEVELS = "student.feature_levels=3"


@pytest.mark.parametrize(
    ("overrides", "epochs", "said"),
    [
        (["data.views.derived=none"], 50.0, ["at no cost"]),
        (["data.views.derived=none", "teacher.cache.path=cache"], 50.0, ["a cache N times as large"]),
        (["data.views.derived=none", "teacher.cache.path=cache"], 50.0, ["data.views.derived=flip mirrors them anew"]),
        (
            ["data.views.derived=none", "teacher.cache.path=cache", "distillation.method=crosskd"],
            50.0,
            ["each epoch is not derived from it for distillation.method: crosskd, which asks the teacher's decoder"],
        ),
        ([], 50.0, []),
        (["data.views.derived=flip", "data.views.crop_probability=1"], 50.0, ["each image is cropped in one way"]),
        (["data.views.derived=flip", "data.views.flip_probability=1"], 50.0, ["each image is flipped in one way"]),
        (["data.views.derived=flip_and_crop", "data.views.crop_probability=1"], 50.0, []),
        (["data.views.count=4"], 50.0, []),
        (["data.views.flip_probability=0"], 50.0, []),
        ([], 2.0, []),
        (["data.views.count=4", "student.family=rt_detr", SQUARE, LEVELS], 50.0, []),
        (["data.views.count=4", "student.family=deimv2", SQUARE, LEVELS], 50.0, ["without mosaics and mixtures"]),
        (["student.backbone.init="], 2.0, ["student.backbone starts from random weights"]),
        (["student.backbone.init=", "student.inherit=true"], 2.0, []),  # said by what is inherited
        (["student.backbone.init=", "detection.dense_weight=1"], 2.0, []),
        (
            ["compute.workers=8", "student.family=rt_detr_v2", SQUARE, LEVELS],
            2.0,
            ["the 8 workers normalises its own 2 images"],
        ),
        (["augmentation.preset=light"], 2.0, []),
        (["compute.compile=true", KEPT_SHAPE], 2.0, ["compute.compile compiles the backbone and the losses alone"]),
        (["compute.compile=true", SQUARE], 2.0, []),
        (
            ["augmentation.preset=rtdetr", "student.resize.size=640"],
            2.0,
            ["480 to 800 pixels, 1.02 times those of student.resize on average and 1.56 times"],
        ),
        (
            ["augmentation.scales=[0.5, 1]", "compute.compile=true"],
            2.0,
            ["compute.compile compiles the backbone and the losses alone", "160 to 320 pixels, 0.625 times"],
        ),
    ],
)
def test_what_happens_silently_is_said(overrides: list[str], epochs: float, said: list[str]) -> None:
    found = notices(load(None, ["student.backbone.init=a/resnet", *overrides]), epochs)
    assert len(found) == len(said)
    for notice, words in zip(found, said, strict=True):
        assert words in notice


def test_of_a_student_from_a_checkpoint_its_own_family_counts_and_what_its_training_lacks_is_not_said(
    tmp_path: Path,
) -> None:
    sizes = StudentConfig.model_validate({**STUDENT, "family": "d_fine", "feature_levels": 2})
    save_detector(silent_student(sizes, ("a", "b"), 0).eval(), tmp_path / "own", sizes.resize)
    one, two = (notices(load(None, [f"student.init={tmp_path / 'own'}", f"compute.workers={n}"]), 2.0) for n in (1, 2))
    assert one == []
    assert len(two) == 1
    assert "a d_fine has batch normalisation outside its backbone" in two[0]


def test_a_window_of_large_photographs_is_said_to_take_more_than_half_of_the_memory() -> None:
    """Two windows of 4,096 pictures of 4 MB are 33 GB: the training was killed for it, and nothing named the dial."""
    (said,) = too_much_for(33 * 10**9, 4096, 32 * 10**9)
    assert "33 GB of encoded pictures" in said
    assert "--set data.shuffle_window_images=992" in said
    assert too_much_for(14 * 10**8, 4096, 32 * 10**9) == []
    assert too_much_for(33 * 10**9, 4096, 0) == []
    assert too_much_for(2**30, 4096, 10**9) == []  # which is held whatever the window
    assert memory_bytes() > 10**8
