"""What a recipe expects of a cache of teacher outputs: whose they are, of what, and whether they hold enough."""

from __future__ import annotations

import json
from typing import Any

from qskd.cache_manifest import CODEC_VERSION
from qskd.classes import map_classes
from qskd.config import Config
from qskd.detectors import Preprocessing, checkpoint_digests, labels_of, read_config, read_preprocessing
from qskd.distillation import teacher_needs
from qskd.errors import QskdError
from qskd.manifest import Manifest
from qskd.structures import TeacherNeeds


def teacher_preprocessing(config: Config) -> Preprocessing:
    """How the teacher wants its pixels: as its checkpoint says, unless the recipe says otherwise."""
    return read_preprocessing(config.teacher.path, config.teacher.resize)


def cache_identity(config: Config, data: Manifest) -> dict[str, Any]:
    """Everything that decides the numbers in the cache, by field. Loads no weights (they are read once, for a checksum)."""
    seen_as, cache = teacher_preprocessing(config), config.teacher.cache
    labels = labels_of(read_config(config.teacher.path))
    identity = checkpoint_digests(config.teacher.path) | {
        "codec": CODEC_VERSION,
        "data.train": data.fingerprint,
        "teacher.resize": seen_as.resize.model_dump(),
        "teacher.mean": seen_as.mean,
        "teacher.std": seen_as.std,
        "teacher.class_slots": map_classes(data.labels, labels, config.teacher.class_map),
    }
    identity |= {f"data.views.{k}": v for k, v in config.data.views.model_dump(exclude={"count"}).items()}
    identity |= {f"teacher.cache.{k}": v for k, v in cache.model_dump(exclude={"path", "batch_size"}).items()}
    # The matching decides which queries are positives, and with that whose attention is kept.
    costs = config.detection.model_dump(include={"class_cost", "l1_cost", "giou_cost", "focal_alpha"})
    identity |= {f"detection.{k}": v for k, v in costs.items()}
    as_stored: dict[str, Any] = json.loads(
        json.dumps(identity)
    )  # lists for tuples, to compare with what a manifest says
    return as_stored


def cached_needs(config: Config) -> TeacherNeeds:
    """What a cache with this recipe's settings holds."""
    cache = config.teacher.cache
    return TeacherNeeds(True, True, cache.attention_layers, cache.all_layers, cache.attention_giou_floor)


def check_enough(config: Config) -> None:
    """QskdError when the method asks for what a cache with the recipe's settings does not hold."""
    needs, cache = teacher_needs(config.distillation), config.teacher.cache
    if needs is None:
        return
    if needs.attention and needs.attention_giou_floor < cache.attention_giou_floor:
        low, floor = needs.attention_giou_floor, cache.attention_giou_floor
        reach = f"boundaries that reach down to GIoU {low:g}"
        if low == -1:
            reach = "relative boundaries, or a weight for the lowest band: a query of any GIoU can be kept"
        raise QskdError(
            "distillation.selection",
            reach,
            f"GIoU {floor:g} or more: the cache holds the attention of queries from there up (and of the matched ones)",
            f"raise the boundaries, or make a cache with a lower floor: --set teacher.cache.attention_giou_floor={low:g}",
        )
    if needs.attention and needs.attention_layers != cache.attention_layers:
        raise QskdError(
            "distillation.features.attention_layers",
            needs.attention_layers,
            f"{cache.attention_layers}, as the cache has it",
            f"make a cache with --set teacher.cache.attention_layers={needs.attention_layers}",
        )
    if needs.all_layers and not cache.all_layers:
        raise QskdError(
            "distillation.predictions.teacher_layers",
            "same_index, which needs every decoder layer of the teacher",
            "last: the cache holds the last layer's logits and boxes",
            "make a cache with --set teacher.cache.all_layers=true",
        )
