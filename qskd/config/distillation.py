"""The configuration's section on what is learned from the teacher: which methods, and the settings that every method has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from qskd.config.section import Fraction, Section

DEFAULT = "qskd"
NONE = "none"  # no teacher, as `qskd train` has it


class Choice(NamedTuple):
    """What a sweep may choose between: fields to set, by the choice's name. own: the recipe's."""

    own: str
    options: Mapping[str, Mapping[str, Any]]


class MethodSettings(Section):
    """What every distillation method is told: its part in the training. The weights of its terms may rise at the start and
    fall at the end; the detection loss keeps its own throughout.

    A method's own settings are a subclass, and stand beside these fields. Field paths here are relative to the section.
    """

    # none: no teacher, as `qskd train` has it; a file of qskd/distillation, or of a folder given with --methods; a dotted
    # module; a path to a .py file (docs/methods.md)
    method: str = DEFAULT
    warmup: Fraction = 0.0  # part of all steps in which the weights rise linearly from 0; 0 = they begin whole
    # part of all steps, at the end, in which they fall linearly to 0 (chosen by search); 0 = they stay
    decay: Fraction = 0.5
    decay_unlabeled: Fraction = 0.0  # `decay` of what images without labels teach (`data.unlabeled`); 0 = it stays
    # More methods at the same time, each a section with these fields and its own; a name is the method's where `method` does
    # not say another. All terms are summed.
    also: dict[str, DistillationConfig] = Field(default_factory=dict)

    @field_validator("also", mode="before")
    @classmethod
    def _named_by_their_methods(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: {"method": name, **part} if isinstance(part, Mapping) else part for name, part in given.items()}

    @model_validator(mode="after")
    def _room_for_both(self) -> MethodSettings:
        for name in ("decay", "decay_unlabeled"):
            if self.warmup + getattr(self, name) > 1 + 1e-9:
                said = f"warmup {self.warmup:g} and {name} {getattr(self, name):g}"
                raise ValueError(f"{said} are more than the whole training")
        return self

    @model_validator(mode="after")
    def _also_is_flat(self) -> MethodSettings:
        for name, settings in self.also.items():
            if settings.also:
                raise ValueError(f"also.{name} has an `also` of its own: name all methods in the first one")
            if NONE in (settings.method, self.method):
                raise ValueError("method none stands alone")
            if not name.isidentifier():
                raise ValueError(f"also.{name}: a name of letters, digits and underscores, which its terms begin with")
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # By its content: a process that has not read the file of a user's method yet can't find its class by name.
        said = self.model_dump(exclude_unset=True) | {"method": self.method}
        also = {name: part.model_dump(exclude_unset=True) | {"method": part.method} for name, part in self.also.items()}
        return _of_its_method, (said | ({"also": also} if also else {}),)

    def weight_fields(self) -> dict[str, str]:
        """The field that weighs a term, by term, of those that are on: what `qskd tune --space loss_weights` varies."""
        return {}

    def choices(self, all_layers: bool) -> dict[str, Choice]:
        """What else that space may choose, by parameter. all_layers: the teacher's every layer can be had."""
        return {}

    def keeps_queries(self) -> bool:
        """Whether query i learns from query i: the student's number of queries is then the teacher's."""
        return False


class NoMethod(MethodSettings):
    """No distillation. The settings of a method that does not run have no effect: they may stand there, and are left out."""

    method: str = NONE

    @model_validator(mode="before")
    @classmethod
    def _without_the_rest(cls, given: Any) -> Any:
        return (
            {name: given[name] for name in cls.model_fields if name in given} if isinstance(given, Mapping) else given
        )


def settings_class(name: str) -> type[MethodSettings]:
    """The section's type for a method; QskdError where there is no such method."""
    if name == NONE:
        return NoMethod
    from qskd.distillation.find import find_settings  # its methods' settings are subclasses of what stands here

    return find_settings(name)


def _of_its_method(given: Any) -> Any:
    """The section, in the type that its method names."""
    if not isinstance(given, Mapping):
        return given
    name = given.get("method", DEFAULT)
    return settings_class(name).model_validate(given) if isinstance(name, str) else given


DistillationConfig = Annotated[SerializeAsAny[MethodSettings], BeforeValidator(_of_its_method)]
MethodSettings.model_rebuild()


def parts_of(settings: MethodSettings) -> dict[str, MethodSettings]:
    """Each method's own section by the path of its fields below `distillation.`: "" for the first one, "also.NAME."."""
    return {"": settings, **{f"also.{name}.": part for name, part in settings.also.items()}}
