"""Several spaces as one search space: checked whole before anything starts, its first trial the recipe itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qskd.config import Config
from qskd.config.recipe import check_field, replace_fields, to_tree
from qskd.errors import QskdError
from search_spaces._loading import Space, load_space
from search_spaces._trials import Named, PointTrial, RandomTrial, Range, Trial

OVERRIDES = "overrides"
TRIED = 32  # random trials that are built as configurations before a sweep starts
# A sweep names and places its trials itself.
OF_THE_SWEEP = ("name", "output", "tracking", "compute")
# What a cache of teacher outputs depends on (`qskd.teacher.identity`): one cache serves all trials.
OF_THE_CACHE = (
    *("teacher", "data.train", "data.unlabeled", "data.unlabeled_score", "data.completed"),
    *("data.views.seed", "data.views.flip_probability", "data.views.crop_probability"),
    *("data.views.crop_min_scale", "data.views.min_visible"),
    *("detection.class_cost", "detection.l1_cost", "detection.giou_cost", "detection.focal_alpha"),
)


def _overlap(one: str, other: str) -> bool:
    """Whether setting one field sets (a part of) the other."""
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")


@contextlib.contextmanager
def _of(space: Space, function: str) -> Iterator[None]:
    """Any other error in a space's own code becomes one that names the space."""
    try:
        yield
    except QskdError:
        raise
    except Exception as error:
        said = f"{function}: {type(error).__name__}: {error}"
        raise QskdError(f"search space {space.name}", said, "a dict", "correct the space's file") from error


class SearchSpace:
    """The spaces of these names (or paths of .py files) about one recipe.

    Raises QskdError, before anything starts, for a space there isn't, a field the configuration doesn't know or that no
    trial may set, two spaces that set the same field, and a space whose trials are no valid configurations.

    Calling it with a trial of Optuna's gives what it sets (define-by-run). It can be pickled: a space from a file is then read
    again from that file.
    """

    def __init__(self, names: Sequence[str], config: Config) -> None:
        if not names:
            raise QskdError("--space", "none", "at least one search space", "for example --space query_selection")
        self.spaces: list[Space] = [load_space(name) for name in names]
        self.recipe = config
        self._fields: dict[str, tuple[str, ...]] = {}
        for space in self.spaces:
            with _of(space, "FIELDS"):
                self._fields[space.name] = tuple(map(str, space.fields_of(config)))
        self._check_fields()
        self._points: dict[str, dict[str, Any]] = {}
        self._ranges: dict[str, Range] = {}
        self._offered: dict[str, set[tuple[Any, ...]]] = {}
        for space in self.spaces:
            self._points[space.name] = self._recipe_point(space)
        for overrides in self.samples(TRIED):
            self._check_trial(overrides)

    def __reduce__(self) -> tuple[Any, ...]:
        return SearchSpace, ([space.source for space in self.spaces], self.recipe)

    # --- what it offers ---------------------------------------------------------------------------------------------
    @property
    def fields(self) -> dict[str, str]:
        """Every field that a trial may set -> the space that sets it."""
        return {field: space.name for space in self.spaces for field in self._fields[space.name]}

    @property
    def recipe_point(self) -> dict[str, Any]:
        """The parameters that stand for the recipe: to be tried first. Whatever else they would mean, the trial that has
        them is the recipe unchanged."""
        return {f"{space}.{name}": value for space, point in self._points.items() for name, value in point.items()}

    @property
    def ranges(self) -> dict[str, Range]:
        """What is asked at the recipe's point, by parameter. Others may be asked elsewhere: spaces are define-by-run."""
        return dict(self._ranges)

    @property
    def changing_choices(self) -> list[str]:
        """Parameters that were asked for with other choices at one time than at another."""
        return [name for name, offered in self._offered.items() if len(offered) > 1]

    def sets(self, taken: Sequence[str]) -> list[str]:
        """The fields that a trial may set which are among these, or parts of them, or have them as parts."""
        return [field for field in self.fields if any(_overlap(field, each) for each in taken)]

    def changes_student(self, bits: bool) -> bool:
        """Whether a trial may have another student than the recipe. bits: where only its bits differ, too; those leave its
        parameters, operations and latency in float as they are."""
        changed = [field for field in self.fields if field == "student" or field.startswith("student.")]
        return any(bits or not _overlap(field, "student.quantization") for field in changed)

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """{"overrides": {dotted field: value}}: what the trial sets."""
        return {OVERRIDES: {field: value for space in self.spaces for field, value in self._ask(space, trial).items()}}

    def overrides(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that these parameters set."""
        found: dict[str, Any] = self(PointTrial(parameters))[OVERRIDES]
        return found

    def config(self, overrides: Mapping[str, Any]) -> Config:
        """The recipe with these fields set. QskdError when that is no valid configuration."""
        return replace_fields(self.recipe, overrides, "search space")

    def samples(self, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """The overrides of random trials."""
        return [self(RandomTrial(seed * 1_000_003 + number))[OVERRIDES] for number in range(count)]

    # --- how --------------------------------------------------------------------------------------------------------
    def _ask(self, space: Space, trial: Trial) -> dict[str, Any]:
        named = Named(trial, space.name)
        with _of(space, "suggest"):
            found = dict(space.suggest(named, self.recipe))
        for name, range_ in named.ranges.items():
            self._offered.setdefault(f"{space.name}.{name}", set()).add((range_.kind, *range_.choices))
        unknown = [field for field in found if field not in self._fields[space.name]]
        if unknown:
            raise QskdError(
                f"search space {space.name}",
                f"suggest sets {', '.join(unknown)}",
                f"only what its FIELDS name: {', '.join(self._fields[space.name])}",
                "add the field to FIELDS",
            )
        return {} if named.answers == self._points.get(space.name) else found

    def _recipe_point(self, space: Space) -> dict[str, Any]:
        """The recipe's parameters, of them those that are asked for; an answer out of range is an error of the space."""
        where = f"search space {space.name}"
        with _of(space, "recipe_point"):
            point = dict(space.recipe_point(self.recipe))
        named = Named(
            PointTrial({f"{space.name}.{k}": v for k, v in point.items()}, f"{where}: recipe_point"), space.name
        )
        with _of(space, "suggest"):
            space.suggest(named, self.recipe)
        if not named.ranges:
            raise QskdError(where, "nothing to search in this recipe", "at least one parameter", "leave this space out")
        self._ranges |= {f"{space.name}.{name}": range_ for name, range_ in named.ranges.items()}
        return named.answers

    def _check_fields(self) -> None:
        owner: dict[str, Space] = {}
        tree = to_tree(self.recipe)
        for space in self.spaces:
            where = f"search space {space.name}"
            twins = [other for other in self.spaces if other.name == space.name and other is not space]
            if twins:
                raise QskdError(where, "given twice", "each space once", "leave one out, or rename one of the files")
            for field in self._fields[space.name]:
                check_field(field, where, tree)
                if any(_overlap(field, taken) for taken in OF_THE_SWEEP):
                    raise QskdError(where, f"sets {field}", "no field of the sweep's own: " + ", ".join(OF_THE_SWEEP))
                if self.recipe.teacher.cache.path and any(_overlap(field, taken) for taken in OF_THE_CACHE):
                    raise QskdError(
                        where,
                        f"sets {field}, which the cached outputs of the teacher depend on",
                        "one cache for all trials",
                        "leave the field out, or run the teacher in every step, which is slower: --set teacher.cache.path=",
                    )
                for taken, other in owner.items():
                    if other is not space and _overlap(field, taken):
                        said = f"sets {field}, and so does search space {other.name}" + (
                            f" ({taken})" if taken != field else ""
                        )
                        raise QskdError(where, said, "each field set by one space", "leave one of the two spaces out")
                owner[field] = space

    def _check_trial(self, overrides: Mapping[str, Any]) -> None:
        names = " + ".join(space.name for space in self.spaces)
        config = replace_fields(self.recipe, overrides, f"search space {names}, a trial with {dict(overrides)}")
        if config.teacher.cache.path and overrides:
            from qskd.checks import check_enough

            check_enough(config)
