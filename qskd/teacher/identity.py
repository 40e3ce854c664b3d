"""What a recipe expects of a cache of teacher outputs: whose they are, of what, and whether they hold enough."""

from __future__ import annotations

import json
from typing import Any

from qskd.config import Config, ViewConfig
from qskd.datasets.classes import map_classes
from qskd.datasets.manifest import Manifest
from qskd.detectors import Preprocessing, checkpoint_digests, labels_of, read_config, read_preprocessing
from qskd.precision import cached_in
from qskd.structures import TeacherNeeds
from qskd.teacher.manifest import CODEC_VERSION, COMPUTED


def teacher_preprocessing(config: Config) -> Preprocessing:
    """How the teacher wants its pixels: as its checkpoint says, unless the recipe says otherwise."""
    return read_preprocessing(config.teacher.path, config.teacher.resize)


def cache_identity(config: Config, data: Manifest) -> dict[str, Any]:
    """Everything in a recipe that decides the numbers in the cache, by field. Loads no weights (they are read once, for a
    checksum). A cache's own identity says besides what it was computed on (`computed_by`)."""
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
    # How many views there are, and what is derived from them, changes none of them.
    policy = config.data.views.model_dump(exclude={"count", "derived"})
    if config.data.views.derived == "flip_and_crop":  # the cache's own views are not cropped
        plain = ViewConfig()
        policy |= {"crop_probability": 0.0, "crop_min_scale": plain.crop_min_scale, "min_visible": plain.min_visible}
    identity |= {f"data.views.{k}": v for k, v in policy.items()}
    # Without further columns a cache is what it was before there could be any.
    left_out = {"path", "batch_size", *(() if cache.columns else ("columns",))}
    identity |= {f"teacher.cache.{k}": v for k, v in cache.model_dump(exclude=left_out).items()}
    # The matching decides which queries are positives, and with that whose attention is kept.
    costs = config.detection.model_dump(include={"class_cost", "l1_cost", "giou_cost", "focal_alpha"})
    identity |= {f"detection.{k}": v for k, v in costs.items()}
    as_stored: dict[str, Any] = json.loads(
        json.dumps(identity)
    )  # lists for tuples, to compare with what a manifest says
    return as_stored


def computed_by(config: Config, device: str) -> dict[str, str]:
    """The fields of `COMPUTED` for units that are computed on a device of this kind, "cpu" or "cuda"."""
    return dict(zip(COMPUTED, (device, cached_in(config.compute.precision)), strict=True))


def cache_names(config: Config) -> dict[str, str]:
    """What the recipe calls the teacher and the data, for `CacheManifest.made_with`."""
    return {"teacher": config.teacher.path, "data": config.data.train}


def cached_needs(config: Config) -> TeacherNeeds:
    """What a cache with this recipe's settings holds."""
    cache = config.teacher.cache
    return TeacherNeeds(
        memory=True,
        attention=True,
        attention_layers=cache.attention_layers,
        all_layers=cache.all_layers,
        attention_giou_floor=cache.attention_giou_floor,
        columns=frozenset(cache.columns),
    )
