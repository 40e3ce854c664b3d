"""How the distillation terms weigh against the detection loss and one another, on which layers, and when.

What can be weighed is asked of the recipe's methods (`MethodSettings.weight_fields`, `choices`), each searched with its own
warm-up and decay. Weights are searched over a tenth to ten times the recipe's, by their logarithm. A term that the recipe
turned off stays off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qskd.config import Config, MethodSettings
from qskd.config.distillation import Choice, parts_of
from qskd.errors import QskdError
from search_spaces._trials import Trial

MAY_CHANGE_WHILE_TRAINING = True
TIMES = 10.0
LONGEST_WARMUP, LONGEST_DECAY = 0.3, 0.5


def FIELDS(config: Config) -> tuple[str, ...]:
    """Of the recipe's methods: weights, choices, warm-up and decay."""
    fields: list[str] = []
    for path, _, settings in _parts(config):
        fields += [f"distillation.{path}{field}" for field in settings.weight_fields().values()]
        for choice in _choices(settings, config).values():
            fields += [f"distillation.{path}{field}" for options in choice.options.values() for field in options]
        fields += [f"distillation.{path}{name}" for name in ("warmup", "decay")]
    return tuple(dict.fromkeys(fields))


def recipe_point(config: Config) -> dict[str, Any]:
    point: dict[str, Any] = {}
    for _, prefix, settings in _parts(config):
        point |= {f"{prefix}{term}": weight for term, (_, weight) in _weights(settings).items()}
        point |= {f"{prefix}{name}": choice.own for name, choice in _choices(settings, config).items()}
        point |= {f"{prefix}warmup": settings.warmup, f"{prefix}decay": settings.decay}
    return point


def suggest(trial: Trial, config: Config) -> dict[str, Any]:
    distillation = config.distillation
    if not any(_weights(settings) for _, _, settings in _parts(config)):
        none = distillation.method == "none"
        missing = "distillation.method = none" if none else "all distillation terms have weight 0"
        raise QskdError("search space loss_weights", missing, "a term to weigh", "turn one on, or leave this space out")
    found: dict[str, Any] = {}
    for path, prefix, settings in _parts(config):
        own = _suggest(trial, prefix, settings, _choices(settings, config))
        found |= {f"distillation.{path}{field}": value for field, value in own.items()}
    return found


def _suggest(trial: Trial, prefix: str, settings: MethodSettings, choices: dict[str, Choice]) -> dict[str, Any]:
    """One method's fields, by their paths in its section. prefix: of its parameters."""
    found: dict[str, Any] = {}
    for term, (field, own) in _weights(settings).items():
        drawn = trial.suggest_float(f"{prefix}{term}", own / TIMES, own * TIMES, log=True)
        found[field] = float(f"{drawn:.4g}")
    for name, choice in choices.items():
        found |= choice.options[trial.suggest_categorical(f"{prefix}{name}", tuple(choice.options))]
    # Warm-up and either decay together are never more than the whole training, whatever the recipe has.
    warmup, decay = settings.warmup, settings.decay
    longest_warmup = max(warmup, min(LONGEST_WARMUP, 1 - max(LONGEST_DECAY, decay, settings.decay_unlabeled)))
    longest_decay = max(decay, min(LONGEST_DECAY, 1 - longest_warmup))
    for name, longest in (("warmup", longest_warmup), ("decay", longest_decay)):
        found[name] = min(round(trial.suggest_float(f"{prefix}{name}", 0.0, longest), 3), longest)
    return found


def _parts(config: Config) -> Iterator[tuple[str, str, MethodSettings]]:
    """Each method's path below `distillation.`, what its parameters begin with, and its section."""
    for path, settings in parts_of(config.distillation).items():
        if settings.method != "none":
            yield path, path.removeprefix("also.").replace(".", "_"), settings


def _weights(settings: MethodSettings) -> dict[str, tuple[str, float]]:
    """Field and weight of each term that is on, by term."""
    found: dict[str, tuple[str, float]] = {}
    for term, field in settings.weight_fields().items():
        value: Any = settings
        for part in field.split("."):
            value = getattr(value, part)
        found[term] = field, float(value)
    return found


def _choices(settings: MethodSettings, config: Config) -> dict[str, Choice]:
    """A cache without all of the teacher's layers can't teach each layer by its own."""
    cache = config.teacher.cache
    return settings.choices(all_layers=cache.all_layers or not cache.path)
