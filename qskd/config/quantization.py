"""The student's bits: `student.quantization` of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qskd.config.section import Section

Part = Literal["backbone", "encoder", "decoder", "heads"]
PARTS: tuple[Part, ...] = ("backbone", "encoder", "decoder", "heads")
_BITS = re.compile(r"w([8432])a([8432])(?:-attn([8432]))?")


class QuantizationConfig(Section):
    """A student that learns with quantised weights and activations (docs/quantization.md). `student.quantization: w4a4-attn8` is
    the same as `{bits: w4a4-attn8}`."""

    # Of weights (w) and activations (a), and of what is multiplied in an attention (attn; 8 where it is not said): 8, 4, 3 or 2.
    # The first layer, and those whose output is a class, a box, a reference point or a sampling offset, have 8 and 8.
    bits: str
    # What is quantised: backbone, encoder (the projections before it too), decoder, heads.
    parts: tuple[Part, ...] = PARTS
    # When what is no backbone begins to be quantised, where both are: a share of the training below 1, or a step from 1 on. 0: at
    # once. null: 0 for a student that starts from trained layers (init, inherit), 0.5 for one whose layers begin at random.
    rest_from: Annotated[float, Field(ge=0.0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_word(cls, given: Any) -> Any:
        return (
            {"bits": str(given)} if isinstance(given, str | int | float) else given
        )  # of a number the message says what to write

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, bits: str) -> str:
        if not _BITS.fullmatch(bits):
            raise ValueError(f"{bits!r}: say w8a8, or w4a4-attn8: 8, 4, 3 or 2 bits each")
        return bits

    @field_validator("parts")
    @classmethod
    def _some_part(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        if not parts:
            raise ValueError("no part: student.quantization: null for a student in float")
        return tuple(part for part in PARTS if part in parts)

    @field_validator("rest_from")
    @classmethod
    def _whole_step(cls, at: float | None) -> float | None:
        if at is not None and at >= 1 and at != int(at):
            raise ValueError(f"{at:g}: a share of the training below 1, or a whole number of steps")
        return at

    @property
    def weight_bits(self) -> int:
        return self._said()[0]

    @property
    def activation_bits(self) -> int:
        return self._said()[1]

    @property
    def attention_bits(self) -> int:
        return self._said()[2]

    def _said(self) -> tuple[int, int, int]:
        found = _BITS.fullmatch(self.bits)
        assert found is not None
        return int(found[1]), int(found[2]), int(found[3] or 8)

    def rest_step(self, total_steps: int) -> int:
        """The step (0-based) at which what is no backbone begins; of null the first (`StudentConfig.quantization_taken`)."""
        at = self.rest_from or 0.0
        if "backbone" not in self.parts:
            return 0
        return int(at if at >= 1 else at * total_steps)
