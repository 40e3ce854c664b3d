"""What every section of a configuration is made of: the frozen base class, and the numbers its fields may hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0)]
# Above any detector's, below what takes all of a machine's memory before anyone could say which field was wrong.
Layers = Annotated[int, Field(gt=0, le=256)]
Width = Annotated[int, Field(gt=0, le=2**13)]
Count = Annotated[int, Field(gt=0, le=2**16)]
Pixels = Annotated[int, Field(gt=0, le=2**13)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


def check_usable(value: Any) -> None:
    """ValueError for text with a NUL character or half a character in it, which no path can have and no file can hold, and for
    integers of more than 64 bits, which no library takes. Looks into lists and mappings."""
    if isinstance(value, str):
        if _UNUSABLE.search(value):
            raise ValueError("text with a NUL character, or with half of one (a surrogate)")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError("an integer of more than 64 bits")
    elif value is None or isinstance(value, float):
        pass  # before what takes longer to ask: every field comes here, at every level above it
    elif isinstance(value, dict | Mapping):
        for key, inner in value.items():
            check_usable(key)
            check_usable(inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            check_usable(inner)


def kinds_in(annotation: Any) -> Iterator[Any]:
    """The annotation and, however deep, what it is made of."""
    yield annotation
    for inner in get_args(annotation):
        yield from kinds_in(inner)


class Section(BaseModel):
    """A frozen group of fields; unknown names and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _text_and_numbers_of_use(cls, value: Any) -> Any:
        check_usable(value)
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _number_is_no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):
            kinds = list(kinds_in(cls.model_fields[str(info.field_name)].annotation))
            if bool not in kinds and (int in kinds or float in kinds):
                raise ValueError("a number belongs here, not true or false")
        return value
