"""What somebody else's ONNX file does not say of itself, in a small JSON file beside it: `detector.onnx.json`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from qskd.checkpoints.json_files import read_json_file
from qskd.config import ResizeConfig
from qskd.config.section import Pixels, Section
from qskd.datasets.classes import UNNAMED
from qskd.errors import QskdError

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Three = tuple[_Number, _Number, _Number]
_Above = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
_EXAMPLE = (
    '{"classes": ["cat", "dog"], "boxes": "xyxy", "units": "pixels", "resize": "square", "size": 640, '
    '"mean": [0, 0, 0], "std": [1, 1, 1]}'
)
REMEDY = (
    f"write it, as {_EXAMPLE}, with what is true of this detector: classes by label from 0, or by number "
    '({"1": "cat"}); boxes xyxy, xywh or cxcywh; units pixels (of the picture that it is given) or relative; resize square, '
    "letterbox or shortest_edge; mean and std of pixels in 0..1, those of 0..255 divided by 255 (docs/teachers.md)"
)


class GraphWords(Section):
    """classes: names by label. boxes, units: how its boxes are written; null: as the form of its outputs says. outputs: names of
    boxes, scores and labels, where they are other than these.

    resize: "square" squeezes a picture into size x size; "letterbox" keeps its shape and puts grey around it, as ultralytics does;
    "shortest_edge" keeps it and pads nothing: shorter side `size`, longer one `longest` at most, each picture by itself. size:
    null where the graph takes one size alone. mean, std: of pixels in 0..1, RGB.
    """

    classes: list[str | None] | dict[str, str]
    boxes: Literal["xyxy", "xywh", "cxcywh"] | None = None
    units: Literal["pixels", "relative"] | None = None
    outputs: tuple[str, str, str] | None = None
    resize: Literal["square", "letterbox", "shortest_edge"]
    size: Pixels | None = None
    longest: Pixels = 1333
    mean: _Three
    std: tuple[_Above, _Above, _Above]

    @field_validator("mean", "std")
    @classmethod
    def _of_shares(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if (most := max(value)) > 1:
            raise ValueError(f"{most:g}, of pixels in 0..255 it seems: divide mean and std by 255")
        return value

    @model_validator(mode="after")
    def _named(self) -> GraphWords:
        if isinstance(self.classes, dict) and not all(
            re.fullmatch(r"\d{1,5}", each, re.ASCII) for each in self.classes
        ):
            raise ValueError("classes: a number from 0 to 99999 for each name")
        if not any(self.classes.values() if isinstance(self.classes, dict) else self.classes):
            raise ValueError("classes: no name in it")
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by label; "N/A" where a label has none."""
        if isinstance(self.classes, dict):
            named = {int(label): name for label, name in self.classes.items()}
            return tuple(named.get(label, UNNAMED) for label in range(max(named) + 1))
        return tuple(UNNAMED if name is None else name for name in self.classes)

    def resizing(self, side: int | None, where: str) -> ResizeConfig:
        """How pictures are made for it. side: of the images that the graph takes, where it says so."""
        size = self.size or side
        if size is None:
            raise QskdError(
                where, "no size, and a graph that takes any", "size: of its pictures' side, in pixels", REMEDY
            )
        if self.resize == "square":
            return ResizeConfig(mode="square", size=size)
        if self.resize == "letterbox":  # the longer side to it; what is left over is filled where the graph is run
            return ResizeConfig(mode="shortest_edge", size=size, longest=size)
        if side is not None:
            found = f"resize: shortest_edge, and a graph that takes {side} x {side} pixels alone"
            raise QskdError(where, found, "square or letterbox", "correct it; or export the detector for any size")
        return ResizeConfig(mode="shortest_edge", size=size, longest=self.longest)


def words_file(path: str | Path) -> Path:
    """Where it is looked for."""
    file = Path(path).expanduser()
    return file.with_name(f"{file.name}.json")


def read_words(path: str | Path) -> GraphWords | None:
    """What lies beside an ONNX file; None where nothing does."""
    file = words_file(path)
    if not file.is_file():
        return None
    said: dict[str, Any] = read_json_file(file, remedy=f"it is written by hand: correct it, or {REMEDY}")
    try:
        return GraphWords.model_validate(said)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'the whole'}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()[:4]
        )
        raise QskdError(str(file), found, "what an ONNX file does not say of itself", REMEDY) from None
