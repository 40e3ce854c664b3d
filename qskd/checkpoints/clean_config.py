"""From a config.json that others wrote to what may be given to transformers' configuration classes.

Those classes keep every field that they are given, and some fields make transformers ask the Hub for another repository,
load a kernel from there, import code or start a quantiser. So only fields that the class itself declares are taken, with
values of sizes that a detector can have. The rest is left out; what would make it another model is refused by name.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from qskd.checkpoints.json_files import SAVE_AGAIN, first_line, is_printable, shown
from qskd.checkpoints.timm_resnet import spell_out
from qskd.errors import QskdError
from qskd.families.facts import FACTS
from qskd.families.table import find_family

log = logging.getLogger(__name__)
MOST_CLASSES = 100_000
CATEGORY_IDS = "dataset_category_ids"  # by slot; transformers keeps the field and does nothing with it
MOST_LABEL = 1000  # characters, as `qskd prepare` takes them; messages and pictures shorten them
_MOST = {"layers": 256, "size": 2**20, "items": 256, "characters": 200}
_LAYERS = re.compile(
    r"(layers|depths|levels|points|patterns|blocks|group_detr)$"
)  # modules are built one by one, so many
_AT_LEAST_ONE = re.compile(
    r"(d_model|heads|hidden_size|hidden_sizes|_dim|num_queries|num_channels|embedding_size|strides|patch_size|windows|group_detr)$"
)
_NEGATIVE = re.compile(r"(_idx|out_indices)$")  # counted from the end
_ATTENTION = ("_attn_implementation", "attn_implementation")
_KEPT_ATTENTION = ("eager", "sdpa")
_SAME_ATTENTION = re.compile(r"flash_attention_\d|flex_attention")  # the same attention by another kernel
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code", "use_kernels", "kernel_config", "fusion_config")
_TIMM_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")  # not "hf-hub:..." or "local-dir:...", which timm reads too
# One a family may be built on: none has configurations inside its own.
_BACKBONES = {name for name in MODEL_FOR_BACKBONE_MAPPING_NAMES if name in CONFIG_MAPPING} - {"sapiens2", "tipsv2"}
_TEXT_MODEL = "bert"
_BASE = {field.name for field in fields(PreTrainedConfig)}


def detector_config(said: dict[str, Any], where: str) -> Any:
    """transformers' configuration of a detector of a supported family. where: the file that `said` was read from."""
    kind = said.get("model_type", "unknown")
    family = find_family(kind, where)
    _refuse_other_models(said, where)
    _check_old_backbone(said, where)
    config = _build(CONFIG_MAPPING[kind], _taken(spell_out(said), CONFIG_MAPPING[kind], where, detector=True), where)
    width = config.hidden_size if kind in ("dab-detr", "yolos") else config.d_model
    parts = dict.fromkeys(("decoder", "decoder_self", "decoder_cross"), width)
    for part, channels in {"encoder": getattr(config, "encoder_hidden_dim", width), **parts}.items():
        heads = getattr(config, f"{part}_attention_heads", 1)
        if channels % heads:
            raise _refused(where, f"{part}_attention_heads", str(heads), f"a divisor of its {channels} channels")
    family.check(config)
    return config


def backbone_config_of(said: dict[str, Any], config_class: Any, where: str) -> Any:
    """transformers' configuration of a backbone alone, of a class that is known."""
    _refuse_other_models(said, where)
    return _build(config_class, _taken(said, config_class, where), where)


def _refused(where: str, field: str, found: str, expected: str, remedy: str = SAVE_AGAIN) -> QskdError:
    return QskdError(where, f"{field}: {found}", expected, remedy)


def _build(config_class: Any, clean: dict[str, Any], where: str) -> Any:
    try:
        return config_class.from_dict(clean)
    except Exception as error:  # the classes check types and sizes in their own ways
        raise QskdError(where, first_line(error), f"what a {config_class.__name__} can be", SAVE_AGAIN) from error


def _refuse_other_models(said: dict[str, Any], where: str) -> None:
    """What would be another model if it were left out."""
    for field in ("quantization_config", "compression_config"):
        if said.get(field):
            raise _refused(
                where,
                field,
                "quantised weights",
                "weights in float32, float16 or bfloat16",
                "dequantise it (model.dequantize()) and save it again, or choose the checkpoint that it was made from",
            )
    for field in _ATTENTION:
        attention = said.get(field)
        name = attention if isinstance(attention, str) else ""
        if attention is None or name in _KEPT_ATTENTION:
            continue
        if _SAME_ATTENTION.fullmatch(name):
            log.info("%s: %s %s is not used: sdpa computes the same", where, field, attention)
            continue
        raise _refused(
            where,
            field,
            shown(attention),
            " or ".join(_KEPT_ATTENTION) + ": another is a kernel, code from elsewhere",
            f"delete the field from {where} if the model was trained with plain attention",
        )
    for field in _CODE:
        if said.get(field):
            log.info("%s: %s is left out: no code of a checkpoint is run", where, field)


def _check_old_backbone(said: dict[str, Any], where: str) -> None:
    """The fields by which checkpoints named their backbone before transformers 5."""
    backbone, given, timm = (said.get(field) for field in ("backbone", "backbone_kwargs", "use_timm_backbone"))
    if timm is not None and not isinstance(timm, bool):
        raise _refused(where, "use_timm_backbone", shown(timm), "true or false")
    if given is not None and not isinstance(given, dict):
        raise _refused(where, "backbone_kwargs", shown(given), "an object")
    if backbone is not None and not isinstance(backbone, str):
        raise _refused(where, "backbone", shown(backbone), "a name")
    indices = (given or {}).get("out_indices", [])
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise _refused(where, "backbone_kwargs.out_indices", shown(indices), "a list of numbers")
    if backbone and not said.get("backbone_config") and (timm is False or not _means_timm(said)):
        raise _refused(
            where,
            "backbone",
            f"{shown(backbone)}, a backbone that is described elsewhere",
            "a backbone_config that describes it here",
            "load and save the checkpoint with transformers, where you trust that repository, which writes backbone_config",
        )


def _means_timm(said: dict[str, Any]) -> bool:
    facts = FACTS.get(said["model_type"])
    return facts is not None and facts.means_timm


def _taken(
    said: dict[str, Any], config_class: Any, where: str, prefix: str = "", detector: bool = False
) -> dict[str, Any]:
    own = {field.name for field in fields(config_class) if field.name not in _BASE}
    own |= {name for name in ("is_encoder_decoder",) if name in config_class.__annotations__}
    own |= set(config_class.attribute_map) - _BASE
    own |= {"out_features", "out_indices"} if not detector else {"use_timm_backbone"}
    clean: dict[str, Any] = {"model_type": config_class.model_type}
    for name in sorted(own & said.keys()):
        value = said[name]
        if name == "backbone_config":
            clean[name] = _backbone(value, where)
        elif name == "text_config":
            clean[name] = _text_model(value, where)
        elif not name.startswith("_"):
            _check_value(value, name, prefix + name, where)
            clean[name] = value
    if "eager" in (said.get(name) for name in _ATTENTION):  # sdpa is what transformers takes where it can
        clean["attn_implementation"] = "eager"
    if config_class.model_type == "timm_backbone" and not _TIMM_NAME.fullmatch(clean.get("backbone") or ""):
        expected = "the name of one of timm's own models, such as resnet50"
        raise _refused(where, prefix + "backbone", shown(clean.get("backbone")), expected)
    if clean.get("anchor_image_size") is not None:
        _check_anchors(clean, where)
    if not detector:
        return clean
    return clean | _labels(said, where) | _architectures(said, where) | _category_ids(said, where)


def _backbone(said: Any, where: str) -> dict[str, Any] | None:
    if said is None:
        return None
    kind = said.get("model_type") if isinstance(said, dict) else said
    if not isinstance(said, dict) or not isinstance(kind, str) or kind not in _BACKBONES:
        expected = "the description of a backbone of transformers"
        raise _refused(where, "backbone_config", f"model_type {shown(kind)}", expected)
    _refuse_other_models(said, f"{where}, backbone_config")
    return _taken(said, CONFIG_MAPPING[kind], where, "backbone_config.")


def _text_model(said: Any, where: str) -> dict[str, Any] | None:
    """Of a detector that is asked in words."""
    if said is None:
        return None
    kind = said.get("model_type", _TEXT_MODEL) if isinstance(said, dict) else said
    if not isinstance(said, dict) or kind != _TEXT_MODEL:
        raise _refused(
            where, "text_config", f"model_type {shown(kind)}", f"a {_TEXT_MODEL}, as all that are published have"
        )
    _refuse_other_models(said, f"{where}, text_config")
    return _taken(said, CONFIG_MAPPING[_TEXT_MODEL], where, "text_config.")


def _check_value(value: Any, name: str, field: str, where: str, depth: int = 0) -> None:
    """Refuse what no detector has: numbers out of all measure, long texts, deep lists. Types are the class's own affair."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        most = _MOST["layers"] if _LAYERS.search(name) else _MOST["size"]
        least = -_MOST["layers"] if _NEGATIVE.search(name) else int(bool(_AT_LEAST_ONE.search(name)))
        if not least <= value <= most:
            raise _refused(where, field, shown(value), f"{least} to {most}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _refused(where, field, shown(value), "a finite number")
    elif isinstance(value, str):
        known = name.endswith(("activation_function", "hidden_act"))
        if not is_printable(value, _MOST["characters"]) or (known and value not in ACT2FN):
            raise _refused(where, field, shown(value), "the name of an activation" if known else "a short text")
    elif isinstance(value, list | dict):
        if len(value) > _MOST["items"] or depth > 3:
            raise _refused(where, field, shown(value), f"at most {_MOST['items']} values, in lists of few levels")
        for one in value.values() if isinstance(value, dict) else value:
            _check_value(one, name, field, where, depth + 1)
        if _LAYERS.search(name) and sum(one for one in value if isinstance(one, int)) > _MOST["layers"]:
            raise _refused(where, field, shown(value), f"at most {_MOST['layers']} in all")


def _check_anchors(clean: dict[str, Any], where: str) -> None:
    """RT-DETR lays anchors over an image of this size as soon as it is built: a height and a width."""
    sides, strides = clean["anchor_image_size"], clean.get("feat_strides", [8, 16, 32])
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        raise _refused(where, "anchor_image_size", shown(sides), "null, or a height and a width")
    if not all(isinstance(side, int) and side <= 8192 for side in sides) or not all(
        isinstance(stride, int) and stride >= 4 for stride in strides
    ):
        raise _refused(where, "anchor_image_size", shown(clean["anchor_image_size"]), "sides of at most 8192 pixels")


def _labels(said: dict[str, Any], where: str) -> dict[str, Any]:
    """id2label and num_labels, checked; label2id is made of id2label."""
    named, count = said.get("id2label"), said.get("num_labels")
    expected = "an object of class names by their number, 0 on"
    if count is not None and (type(count) is not int or not 1 <= count <= MOST_CLASSES):
        raise _refused(where, "num_labels", shown(count), f"1 to {MOST_CLASSES}")
    found: dict[str, Any] = {} if count is None else {"num_labels": count}
    if named is None:
        return found
    if not isinstance(named, dict) or not 1 <= len(named) <= MOST_CLASSES:
        raise _refused(where, "id2label", shown(named), f"{expected}, {MOST_CLASSES} at most")
    for slot, name in named.items():
        if not re.fullmatch(r"\d{1,6}", slot, re.ASCII):
            raise _refused(where, "id2label", f"a number {shown(slot)}", expected)
        if not isinstance(name, str) or len(name) > MOST_LABEL:
            expected = f"a class name of at most {MOST_LABEL} characters"
            raise _refused(where, f"id2label.{slot}", shown(name), expected, "correct the name in config.json")
    found["id2label"] = named
    if count in (None, len(named)):
        found["label2id"] = {name: int(slot) for slot, name in named.items()}
    return found


def _category_ids(said: dict[str, Any], where: str) -> dict[str, Any]:
    """The dataset's category id of each slot, as a student that qskd trained keeps them."""
    ids = said.get(CATEGORY_IDS)
    if ids is None:
        return {}
    classes = len(said.get("id2label") or {}) or said.get("num_labels")
    right = isinstance(ids, list) and all(type(one) is int and abs(one) < 2**63 for one in ids)
    if not right or len(set(ids)) != len(ids) or len(ids) != classes:
        expected = f"a whole number for each of the {classes} classes, none of them twice"
        raise _refused(where, CATEGORY_IDS, shown(ids), expected, f"correct the field in {where}, or delete it")
    return {CATEGORY_IDS: ids}


def _architectures(said: dict[str, Any], where: str) -> dict[str, Any]:
    kinds = said.get("architectures")
    if kinds is None:
        return {}
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and is_printable(kind, 200) for kind in kinds[:9]):
        raise _refused(where, "architectures", shown(kinds), "a list of names of classes")
    return {"architectures": kinds[:9]}
