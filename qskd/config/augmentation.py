"""What the student sees beyond the view that it shares with the teacher, and the presets that name whole sets of it."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qskd.config.section import Fraction, Section

PresetName = Literal["", "light", "detr", "rtdetr"]
Scale = Annotated[float, Field(ge=0.25, le=4.0)]
LARGEST_SIGMA = 10.0  # pixels; a blur costs six times as many additions a pixel

PRESETS: dict[str, dict[str, Any]] = {
    # Ours, nobody else's: half of what the others do to colours, and a little blur.
    "light": {
        **{"colour_probability": 0.5, "brightness": 0.1, "contrast": 0.25, "saturation": 0.25, "hue": 0.025},
        **{"blur_probability": 0.1, "blur_sigma": 1.0},
    },
    # facebookresearch/detr, datasets/coco.py: sizes 480, 512, ..., 800 of an evaluation at 800. There each image has its own
    # size. Its crops (400 to 600, then 384 to 600) and flips are of the view: data.views. No colours there.
    "detr": {"scales": [round(0.6 + 0.04 * k, 2) for k in range(11)]},
    # lyuwenyu/RT-DETR, rtdetrv2_pytorch/configs/rtdetrv2/include/dataloader.yml: RandomPhotometricDistort with p 0.5, which is
    # torchvision's (its strengths are the defaults there, and it permutes channels), sizes 480, 512, ..., 800 with 640 three
    # times, neither from epoch 71 of 72 on. Its zoom-out, IoU crop and flip are of the view.
    "rtdetr": {
        **{"colour_probability": 0.5, "brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05},
        "channel_shuffle_probability": 0.5,
        "scales": [0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.0, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25],
        "until": 0.986,
    },
}
# What people look for here, and why it can't be here: it changes where objects are, or whose they are.
ELSEWHERE = {
    **dict.fromkeys(("flip", "flip_probability", "horizontal_flip"), "a flip is of the view: data.views.flip_probability"),
    **dict.fromkeys(("crop", "crop_probability", "random_crop", "iou_crop"), "a crop is of the view: data.views"),
    **dict.fromkeys(
        ("mosaic", "mixup", "cutmix", "copy_paste", "zoom_out", "large_scale_jitter", "rotate", "affine"),
        "it moves or mixes objects, so that the teacher would have to see the same picture, and its cache has other ones: "
        "qskd has none of it",
    ),
}  # fmt: skip


class AugmentationConfig(Section):
    """What the student alone sees, on top of the view that it shares with the teacher (docs/augmentation.md): drawn anew for each
    image in each step, on the worker's device. No object moves, so that a cache of the teacher's outputs stays right. Evaluation
    sees plain images.

    `preset` sets all fields that its source has, each unless it is given; what it set is kept, the name is not.
    """

    # light: ours; detr, rtdetr: what of those repositories' training is possible here. Empty: nothing
    preset: PresetName = ""
    colour_probability: Fraction = 0.5  # of each of the four below by itself, in an image
    brightness: Fraction = 0.0  # colours times 1 - this to 1 + this
    contrast: Fraction = 0.0  # distance from the image's mean grey times 1 - this to 1 + this
    saturation: Fraction = 0.0  # distance from grey times 1 - this to 1 + this
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0  # hues turned by - this to + this; 0.5 is half a circle
    channel_shuffle_probability: Fraction = 0.0  # of an image whose channels change places
    greyscale_probability: Fraction = 0.0  # of an image without colours
    blur_probability: Fraction = 0.0  # of an image that is blurred (Gaussian)
    # largest standard deviation of the blur, in the student's pixels; the smallest is 0.1
    blur_sigma: Annotated[float, Field(ge=0.1, le=LARGEST_SIGMA)] = 2.0
    erase_probability: Fraction = 0.0  # of an image in which a rectangle gets the mean colour; boxes under it stay
    erase_largest: Annotated[float, Field(gt=0.0, le=1.0)] = (
        0.33  # largest rectangle over the image's area; the least is 0.02
    )
    # Multi-scale: each step's size of the student over `student.resize`, drawn from this list; one that is there twice comes twice
    # as often. Rounded to a multiple of the student's stride or of its ViT's patches and windows.
    scales: tuple[Scale, ...] = ()
    until: Fraction = 1.0  # of the schedule's steps; from there on the student sees plain images of its own size

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        for name in given:
            if name in ELSEWHERE:
                raise ValueError(f"{name} is not of the student alone: {ELSEWHERE[name]}")
        preset = given.get("preset", "")
        if not isinstance(preset, str) or preset not in PRESETS:
            return given  # none, or one that pydantic will complain of
        fields = PRESETS[preset]
        if all(name in given for name in fields):
            raise ValueError(f"preset {preset} sets nothing: every field that it would set is given")
        return {**fields, **given, "preset": ""}

    def sizes(self, base: int, unit: int = 1) -> tuple[int, ...]:
        """The pixels of each scale of `base`, to the nearest multiple of `unit` (one at least); `base` alone without scales."""
        if not self.changes_sizes:
            return (base,)
        return tuple(max(1, floor(scale * base / unit + 0.5)) * unit for scale in self.scales)

    @property
    def changes_pixels(self) -> bool:
        """Whether anything but the size may change."""
        colours = self.colour_probability and (self.brightness or self.contrast or self.saturation or self.hue)
        chances = (self.channel_shuffle_probability, self.greyscale_probability, self.blur_probability)
        return bool(colours or any(chances) or self.erase_probability)

    @property
    def changes_sizes(self) -> bool:
        return any(scale != 1 for scale in self.scales)
