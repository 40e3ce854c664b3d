"""The sizes that `student.size` names: data, and how a recipe's own fields go before them.

small, medium and large stand on ResNet-18, 34 and 50, of which pretrained weights exist (`student.backbone.init`); nano and
micro are thinner than any that is published, and start from random weights, a teacher's layers or one's own. What each
comes to in parameters and operations: docs/students.md, made by benchmarks/student_sizes.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from qskd.families.facts import FACTS

SizeName = Literal["", "nano", "micro", "small", "medium", "large"]
_HALF = {"layer_type": "basic", "embedding_size": 32, "hidden_sizes": [32, 64, 128, 256]}
_WHOLE = {"layer_type": "basic", "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512]}
_WIDE = {"layer_type": "bottleneck", "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048]}


def _sizes(
    backbone: dict[str, Any],
    depths: list[int],
    width: int,
    layers: tuple[int, int],
    heads: int,
    ffn_width: int,
    queries: int,
    levels: int,
    size: int,
) -> dict[str, Any]:
    """layers: of the encoder and of the decoder. levels: maps that a family of many maps reads."""
    return {
        "backbone": {**backbone, "depths": depths},
        **{"width": width, "encoder_layers": layers[0], "decoder_layers": layers[1], "heads": heads},
        **{"ffn_width": ffn_width, "queries": queries, "feature_levels": levels},
        "resize": {"mode": "square", "size": size},
    }


SIZES: dict[str, dict[str, Any]] = {
    "nano": _sizes(_HALF, [1, 1, 1, 1], 64, (1, 2), 4, 256, 100, 3, 320),
    "micro": _sizes(_HALF, [2, 2, 2, 2], 128, (2, 3), 4, 512, 100, 3, 384),
    "small": _sizes(_WHOLE, [2, 2, 2, 2], 192, (3, 3), 6, 768, 200, 3, 512),
    "medium": _sizes(_WHOLE, [3, 4, 6, 3], 256, (4, 4), 8, 1024, 300, 4, 640),
    "large": _sizes(_WIDE, [3, 4, 6, 3], 256, (6, 6), 8, 1024, 300, 4, 640),
}


def sizes_of(size: str, family: str) -> dict[str, Any]:
    """The fields of StudentConfig that a size sets for a family, as a nested dict."""
    facts = FACTS.get(family)
    return {**SIZES[size], **(facts.size if facts else {}), **(facts.by_size.get(size, {}) if facts else {})}


def resolve(given: Mapping[str, Any], default_family: str) -> dict[str, Any]:
    """The fields given for a student, with what `size` sets of the others; the size itself is then spent.

    A field that is given goes before the size's; a backbone that is no ResNet has its own. Raises ValueError where the size would
    have no effect.
    """
    fields = {name: _as_dict(value) for name, value in given.items()}
    size = fields.get("size", "")
    if not isinstance(size, str) or size not in SIZES:
        return dict(given)  # none, or one that StudentConfig will complain of
    if fields.get("init"):
        raise ValueError(f"size {size} has no effect: a student that starts from init has that checkpoint's sizes")
    sizes = sizes_of(str(size), str(fields.get("family", default_family)))
    own = fields.get("backbone")
    kind = own.get("type", "resnet") if isinstance(own, dict) else "resnet"
    if "resnet" not in str(kind) and kind != sizes["backbone"].get("type"):  # the sizes of no ResNet
        del sizes["backbone"]
    if all(_given(name, value, fields) for name, value in sizes.items()):
        raise ValueError(
            f"size {size} sets nothing: every field that it would set is given; leave out those it shall set"
        )
    for name, value in sizes.items():
        own = fields.get(name)
        fields[name] = (
            {**value, **own} if isinstance(value, dict) and isinstance(own, dict) else fields.get(name, value)
        )
    return {**fields, "size": ""}


def _given(name: str, value: Any, fields: Mapping[str, Any]) -> bool:
    own = fields.get(name)
    if isinstance(value, dict) and isinstance(own, dict):
        return all(part in own for part in value)
    return name in fields


def _as_dict(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
