"""The student's bits: of weights, of activations, of attention, and which part is left in float.

32 bits of weights are a student in float, of which nothing else is asked. What comes first, and when the rest follows
(`rest_from`), is the recipe's.
"""

from __future__ import annotations

from typing import Any

from qskd.config import FACTS, Config
from qskd.config.quantization import PARTS, QuantizationConfig
from qskd.errors import QskdError
from search_spaces._trials import Trial

FIELDS = ("student.quantization",)
WHY_NOT_WHILE_TRAINING = "quantisers begin from what they have watched: a trial can't go on with other bits"
FLOAT = 32
BITS = (8, 4, 3, 2)
NONE = "none"


def recipe_point(config: Config) -> dict[str, Any]:
    own = config.student.quantization
    if own is None:
        return {"weights": FLOAT}
    bits = {"weights": own.weight_bits, "activations": own.activation_bits, "attention": own.attention_bits}
    return {**bits, "in_float": _in_float(own)}


def suggest(trial: Trial, config: Config) -> dict[str, Any]:
    if not config.student.init and (why := FACTS[config.student.family].in_float):
        raise QskdError(
            "search space quantization",
            f"student.family = {config.student.family}: {why}",
            f"one of {', '.join(name for name, facts in FACTS.items() if not facts.in_float)}",
            "choose another family, or leave this space out",
        )
    weights = trial.suggest_categorical("weights", (FLOAT, *BITS))
    if weights == FLOAT:
        return {"student.quantization": None}
    activations, attention = (trial.suggest_categorical(name, BITS) for name in ("activations", "attention"))
    own = config.student.quantization
    known: dict[str, tuple[str, ...]] = {NONE: (), **{part: (part,) for part in PARTS}}
    if own is not None:
        known.setdefault(_in_float(own), tuple(part for part in PARTS if part not in own.parts))
    left = known[trial.suggest_categorical("in_float", tuple(known))]
    word = f"w{weights}a{activations}-attn{attention}"
    if own is not None and (weights, activations, attention) == (
        own.weight_bits,
        own.activation_bits,
        own.attention_bits,
    ):
        word = own.bits  # w8a8 is how it says w8a8-attn8
    section: dict[str, Any] = {"bits": word, "parts": [part for part in PARTS if part not in left]}
    if own is not None and own.rest_from is not None:
        section["rest_from"] = own.rest_from
    return {"student.quantization": section}


def _in_float(own: QuantizationConfig) -> str:
    """The parts that are left in float, as one of the choices."""
    return "+".join(part for part in PARTS if part not in own.parts) or NONE
