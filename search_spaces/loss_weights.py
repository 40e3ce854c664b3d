"""How the distillation terms weigh against the detection loss and one another, on which layers, and when.

Weights are searched over a tenth to ten times the recipe's, by their logarithm. A term that the recipe turned off stays
off. `distillation.predictions.weight` stays as it is: it would do again what its three terms' weights do.
"""

from __future__ import annotations

from typing import Any

from qskd.config import Config
from qskd.errors import QskdError
from search_spaces._trials import Trial

TERMS = {
    "agfd": "distillation.features.weight",
    "lapd_class": "distillation.predictions.class_weight",
    "lapd_l1": "distillation.predictions.l1_weight",
    "lapd_giou": "distillation.predictions.giou_weight",
}
FIELDS = (
    *TERMS.values(),
    *("distillation.predictions.student_layers", "distillation.predictions.teacher_layers"),
    *("distillation.warmup", "distillation.decay"),
)
MAY_CHANGE_WHILE_TRAINING = True
TIMES = 10.0
LONGEST_WARMUP, LONGEST_DECAY = 0.3, 0.5


def recipe_point(config: Config) -> dict[str, Any]:
    distillation = config.distillation
    return {
        **_weights(config),
        "layers": _layers(config),
        "warmup": distillation.warmup,
        "decay": distillation.decay,
    }


def suggest(trial: Trial, config: Config) -> dict[str, Any]:
    weights, distillation = _weights(config), config.distillation
    if distillation.method == "none" or not weights:
        missing = (
            "distillation.method = none" if distillation.method == "none" else "all distillation terms have weight 0"
        )
        raise QskdError("search space loss_weights", missing, "a term to weigh", "turn one on, or leave this space out")
    found: dict[str, Any] = {}
    for term, own in weights.items():
        drawn = trial.suggest_float(term, own / TIMES, own * TIMES, log=True)
        found[TERMS[term]] = float(f"{drawn:.4g}")
    if distillation.predictions.weight > 0:
        layers = trial.suggest_categorical("layers", _layer_choices(config))
        found["distillation.predictions.student_layers"] = "last" if layers == "last" else "all"
        found["distillation.predictions.teacher_layers"] = "same_index" if layers == "same_index" else "last"
    # The two together are never more than the whole training, whatever the recipe has.
    warmup, decay = distillation.warmup, distillation.decay
    longest_warmup = max(warmup, min(LONGEST_WARMUP, 1 - max(LONGEST_DECAY, decay)))
    longest_decay = max(decay, min(LONGEST_DECAY, 1 - longest_warmup))
    for name, longest in (("warmup", longest_warmup), ("decay", longest_decay)):
        found[f"distillation.{name}"] = min(round(trial.suggest_float(name, 0.0, longest), 3), longest)
    return found


def _weights(config: Config) -> dict[str, float]:
    """Of the terms that the recipe has on."""
    features, predictions = config.distillation.features, config.distillation.predictions
    terms = {"agfd": features.weight}
    if predictions.weight > 0:
        terms |= {
            "lapd_class": predictions.class_weight,
            "lapd_l1": predictions.l1_weight,
            "lapd_giou": predictions.giou_weight,
        }
    return {term: weight for term, weight in terms.items() if weight > 0}


def _layers(config: Config) -> str:
    """Which decoder layers learn from which: all of the student's or its last, from the teacher's last or its own."""
    predictions = config.distillation.predictions
    if predictions.student_layers == "last":
        return "last"
    return "same_index" if predictions.teacher_layers == "same_index" else "all"


def _layer_choices(config: Config) -> tuple[str, ...]:
    """A cache without all of the teacher's layers can't teach each layer by its own."""
    cache = config.teacher.cache
    every = cache.all_layers or not cache.path or _layers(config) == "same_index"
    return ("all", "last", "same_index") if every else ("all", "last")
