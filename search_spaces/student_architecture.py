"""The student's sizes, each relative to the recipe's: half to one and a half times, on a grid where all combinations build.

A recipe for a 64-pixel student and one for ResNet-18 on COCO are searched by the same rules. What a checkpoint fixes stays:
the backbone's sizes with `student.backbone.init`; width, heads and ffn_width with `student.inherit`; the number
of queries where query i learns from query i (`distillation.predictions.pairing: index`).
"""

from __future__ import annotations

import math
from typing import Any

from qskd.config import FACTS, BackboneConfig, Config, StudentConfig
from qskd.config.distillation import parts_of
from qskd.errors import QskdError
from search_spaces._trials import Trial

FIELDS = (
    *("student.backbone.depths", "student.backbone.hidden_sizes", "student.backbone.embedding_size"),
    *("student.width", "student.heads", "student.ffn_width"),
    *("student.encoder_layers", "student.decoder_layers", "student.queries"),
    *("student.resize.size", "student.resize.longest"),
)
WHY_NOT_WHILE_TRAINING = "it changes shapes: a trial can't go on with the weights of another"
LEAST_HEAD_WIDTH = 8  # a head as narrow as a few numbers attends to nothing; the recipe's own number is always offered


def recipe_point(config: Config) -> dict[str, Any]:
    student = config.student
    return {
        "backbone_depth": 1.0,
        "backbone_width": 1.0,
        "width": student.width,
        "heads": student.heads,
        "encoder_layers": student.encoder_layers,
        "decoder_layers": student.decoder_layers,
        "queries": student.queries,
        "input_size": student.resize.size,
    }


def suggest(trial: Trial, config: Config) -> dict[str, Any]:
    student = config.student
    if student.init:
        raise QskdError(
            "search space student_architecture",
            f"student.init = {student.init}: the checkpoint has its sizes",
            "a student made of sizes",
            "leave student.init empty, or leave this space out",
        )
    found: dict[str, Any] = {}
    if not student.backbone.init:
        found |= _backbone(trial, student.backbone)
    if not student.inherit:
        found |= _width(trial, student)
    for name in ("encoder_layers", "decoder_layers"):
        if name == "encoder_layers" and FACTS[student.family].vit:  # its encoder is the backbone
            continue
        layers = getattr(student, name)
        more = max(1, layers // 2)
        least = FACTS[student.family].least_decoder_layers if name == "decoder_layers" else 1
        found[f"student.{name}"] = trial.suggest_int(name, max(least, layers - more), layers + more)
    most = student.queries
    if not any(part.keeps_queries() for part in parts_of(config.distillation).values()):
        low, high, step = around(student.queries, max(1, student.queries // 4), 2, 2, least=1)
        if FACTS[student.family].hybrid:  # whose queries are chosen among the cells
            high -= step * max(0, -(-(high - fewest_cells(config, student.resize.size)) // step))
        found["student.queries"] = trial.suggest_int("queries", low, high, step=step)
        most = high
    return found | _input_size(trial, config, most)


def fewest_cells(config: Config, size: int) -> int:
    """Cells of the smallest images that the student sees in training, when its own size is `size`."""
    student = config.student
    return student.cells(min(config.augmentation.sizes(size, student.backbone.unit)))


def around(value: int, step: int, down: int, up: int, least: int) -> tuple[int, int, int]:
    """low, high and step of the grid through `value`: up to `down` steps below it, none under `least`, and `up` above."""
    below = max(0, min(down, (value - least) // step))
    return value - below * step, value + up * step, step


def _backbone(trial: Trial, backbone: BackboneConfig) -> dict[str, Any]:
    shallowest = 0.5 if max(backbone.depths) > 1 else 1.0
    depth = trial.suggest_float("backbone_depth", shallowest, 1.5, step=0.5)
    wide = trial.suggest_float("backbone_width", 0.5, 1.5, step=0.25)
    # Bottleneck blocks narrow by 4; sizes that are multiples of it stay so.
    stem = (backbone.embedding_size,) if backbone.kind.embeds else ()
    unit = math.gcd(4, *stem, *backbone.hidden_sizes)
    if backbone.is_vit:  # as many heads as at the recipe's width
        unit = math.gcd(12, *backbone.hidden_sizes)

    def scaled(size: int) -> int:
        return max(unit, unit * math.floor(wide * size / unit + 0.5))

    found: dict[str, Any] = {
        "student.backbone.depths": [max(1, math.floor(depth * blocks + 0.5)) for blocks in backbone.depths],
        "student.backbone.hidden_sizes": [scaled(size) for size in backbone.hidden_sizes],
    }
    return found | ({"student.backbone.embedding_size": scaled(*stem)} if stem else {})


def _width(trial: Trial, student: StudentConfig) -> dict[str, Any]:
    """Width, heads and ffn_width. Every width offered is divisible by every number of heads offered, and by what its
    family asks for (`Facts.width_unit`)."""
    width, own = student.width, student.heads
    heads = [own] + [
        count
        for count in (own // 2 if own % 2 == 0 else 0, 2 * own)
        if count and width % count == 0 and width // count >= LEAST_HEAD_WIDTH
    ]
    unit = math.lcm(FACTS[student.family].width_unit, *heads)
    low, high, step = around(width, unit * max(1, round(width / 4 / unit)), 2, 2, least=unit)
    chosen = trial.suggest_int("width", low, high, step=step)
    return {
        "student.width": chosen,
        "student.heads": trial.suggest_categorical("heads", sorted(heads)),
        "student.ffn_width": max(1, round(student.ffn_width * chosen / width)),
    }


def _input_size(trial: Trial, config: Config, queries: int) -> dict[str, Any]:
    """The side, in steps of whole cells of the backbone's last map; the longest side with it. queries: the most on offer,
    which a hybrid encoder's cells have to be enough for."""
    student = config.student
    resize, unit = student.resize, student.backbone.unit
    step = unit * max(1, round(resize.size / 8 / unit))
    least = 2 * unit
    while FACTS[student.family].hybrid and fewest_cells(config, least) < queries:
        least += unit
    low, high, step = around(resize.size, step, 3, 1, least=least)
    size = trial.suggest_int("input_size", low, high, step=step)
    if resize.mode == "square":
        return {"student.resize.size": size}
    return {
        "student.resize.size": size,
        "student.resize.longest": max(size, round(resize.longest * size / resize.size)),
    }
