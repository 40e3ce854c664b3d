"""What a space asks: Optuna's trial, as far as spaces need it, and trials of our own that need no Optuna."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from qskd.errors import QskdError

Choice = bool | int | float | str


class Trial(Protocol):
    """The part of `optuna.Trial` that a space may use. Ranges include both ends."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[Choice]) -> Any: ...


@dataclass(frozen=True)
class Range:
    """What a parameter may be: `choices`, or numbers from low to high, both included, in steps where `step` is not 0."""

    kind: Literal["int", "float", "categorical"]
    low: float = 0
    high: float = 0
    step: float = 0
    log: bool = False
    choices: tuple[Choice, ...] = ()

    def describe(self) -> str:
        if self.kind == "categorical":
            return f"one of {', '.join(map(str, self.choices))}"
        steps = f" in steps of {self.step:g}" if self.step not in (0, 1) else ""
        return f"{self.kind} {self.low:g} to {self.high:g}{steps}{', log' if self.log else ''}"

    def nearest(self, value: Any) -> Any:
        """The number in range that is nearest; a choice as it is."""
        if self.kind == "categorical":
            return value
        inside = min(max(float(value), self.low), self.high)
        if self.step:
            last = math.floor(
                (self.high - self.low) / self.step + 1e-9
            )  # as Optuna has it: `high` may lie between two steps
            inside = self.low + self.step * min(last, math.floor((inside - self.low) / self.step + 0.5))
        return round(inside) if self.kind == "int" else inside

    def holds(self, value: Any) -> bool:
        if self.kind == "categorical":
            return any(
                value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.choices
            )
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "int" else (int, float)):
            return False
        return self.low <= value <= self.high and math.isclose(self.nearest(value), value, rel_tol=1e-9, abs_tol=1e-12)


class _Asked:
    """A trial whose answers come from `answer`."""

    def answer(self, name: str, range_: Range) -> Any:
        raise NotImplementedError

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        found: int = self.answer(name, Range("int", low, high, step, log))
        return found

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        found: float = self.answer(name, Range("float", low, high, step or 0, log))
        return found

    def suggest_categorical(self, name: str, choices: Sequence[Choice]) -> Any:
        return self.answer(name, Range("categorical", choices=tuple(choices)))


class PointTrial(_Asked):
    """A trial whose answers are given. One that is missing or out of range is an error."""

    def __init__(self, point: Mapping[str, Any], where: str = "search space") -> None:
        self.point, self.where = point, where

    def answer(self, name: str, range_: Range) -> Any:
        if name not in self.point:
            known = ", ".join(self.point) or "none"
            raise QskdError(
                self.where, f"no value for the parameter {name}", f"one ({range_.describe()}); there are: {known}"
            )
        value = self.point[name]
        if not range_.holds(value):
            raise QskdError(self.where, f"parameter {name} = {value!r}", range_.describe())
        return value


class RandomTrial(_Asked):
    """A trial that answers at random, evenly over each range (over its logarithm where it says so), and remembers."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.answers: dict[str, Any] = {}

    def answer(self, name: str, range_: Range) -> Any:
        self.answers[name] = self._draw(range_)
        return self.answers[name]

    def _draw(self, range_: Range) -> Any:
        if range_.kind == "categorical":
            return self.random.choice(range_.choices)
        if range_.log:
            drawn = math.exp(self.random.uniform(math.log(range_.low), math.log(range_.high)))
        else:
            drawn = self.random.uniform(range_.low - range_.step / 2, range_.high + range_.step / 2)
        return range_.nearest(drawn)


class Named(_Asked):
    """Asks another trial, with the space's name before each parameter's, and remembers what was asked and answered."""

    def __init__(self, trial: Trial, space: str) -> None:
        self.trial, self.space = trial, space
        self.answers: dict[str, Any] = {}  # by the space's own names
        self.ranges: dict[str, Range] = {}

    def answer(self, name: str, range_: Range) -> Any:
        full = f"{self.space}.{name}"
        if odd := [each for each in range_.choices if not isinstance(each, (bool, int, float, str, type(None)))]:
            raise QskdError(
                f"search space {self.space}",
                f"parameter {name} offers {odd[0]!r}",
                "words, numbers, true, false or None: a sweep that goes on reads its trials from JSON, where others look alike",
                "offer a word for each, and look up what it stands for: SIZES[trial.suggest_categorical(name, tuple(SIZES))]",
            )
        value: Any
        if range_.kind == "categorical":
            value = self.trial.suggest_categorical(full, range_.choices)
        elif range_.kind == "int":
            value = self.trial.suggest_int(
                full, int(range_.low), int(range_.high), step=int(range_.step), log=range_.log
            )
        else:
            value = self.trial.suggest_float(full, range_.low, range_.high, step=range_.step or None, log=range_.log)
        self.answers[name], self.ranges[name] = value, range_
        return value
