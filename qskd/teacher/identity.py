"""What a recipe expects of a cache of teacher outputs: whose they are, of what, and whether they hold enough."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from qskd.config import Config, ViewConfig
from qskd.datasets.manifest import Manifest
from qskd.datasets.unlabeled.joined import unlabeled_manifests
from qskd.detectors import (
    Preprocessing,
    asked_in_words,
    checkpoint_digests,
    prompt_of,
    read_preprocessing,
)
from qskd.errors import QskdError
from qskd.precision import cached_in
from qskd.storage.stores import join
from qskd.structures import TeacherNeeds
from qskd.teacher.manifest import CODEC_VERSION, COMPUTED
from qskd.teacher.several.members import Member, members_of, of_field, paths_of, teachers_named
from qskd.teacher.told.results import UNSEEN, is_results, read_results

C = TypeVar("C", bound=Config)


def teacher_preprocessing(config: Config) -> Preprocessing:
    """How the teacher, the first of several, wants its pixels: as its checkpoint says, unless the recipe says otherwise."""
    return teachers_preprocessing(config)[0]


def teachers_preprocessing(config: Config) -> tuple[Preprocessing, ...]:
    """Of each teacher of the recipe, all at one size. QskdError where their checkpoints say others, and the recipe none."""
    if is_results(config.teacher.path):
        return (UNSEEN,)
    paths = paths_of(config)
    found: list[Preprocessing] = []
    for field, path in paths.items():
        with of_field(field, path):
            found.append(read_preprocessing(path, config.teacher.resize))
    for (field, path), each in zip(paths.items(), found, strict=True):
        if each.resize != found[0].resize:
            raise QskdError(
                field,
                f"{path}, which is given pictures resized: {each.resize}, beside {config.teacher.path}: {found[0].resize}",
                "teachers that are given the same pictures",
                _same_pictures(list(paths.values()), found),
            )
    return tuple(found)


def _same_pictures(paths: Sequence[str], found: Sequence[Preprocessing]) -> str:
    """What to do where teachers are given different pictures: an ONNX file may take one size, framed in one way, alone."""
    for resize in (each.resize for each in found):
        try:
            for path in paths:
                read_preprocessing(path, resize)
        except QskdError:
            continue
        longest = f", longest: {resize.longest}" if resize.mode == "shortest_edge" else ""
        return f"say which, for all: --set 'teacher.resize={{mode: {resize.mode}, size: {resize.size}{longest}}}'"
    return (
        "no teacher.resize suits them all: an ONNX file takes the size and the framing that it was exported with alone. Export "
        "one again so that they agree (one size; square beside square, or letterbox beside letterbox), or name one of them alone"
    )


def cache_identity(config: Config, data: Manifest) -> dict[str, Any]:
    """Everything in a recipe that decides the numbers in the cache, by field. Loads no weights (they are read once, for a
    checksum). A cache's own identity says besides what it was computed on (`computed_by`)."""
    (first, *others), cache = members_of(config, data.labels), config.teacher.cache
    seen_as, *seen_by_others = teachers_preprocessing(config)
    identity: dict[str, Any] = {
        "codec": CODEC_VERSION,
        "data.train": data.fingerprint,
        "teacher.resize": seen_as.resize.model_dump(),
    }
    identity |= _of_teacher(first, seen_as)
    for number, (member, seen) in enumerate(zip(others, seen_by_others, strict=True), 1):  # their names decide nothing
        own = _of_teacher(member, seen) | ({"teacher.levels": member.levels} if member.levels is not None else {})
        identity |= {field.replace("teacher.", f"teacher.also.{number}.", 1): value for field, value in own.items()}
    if not data.labelled or config.data.completed:  # it decides whose attention is kept
        identity["data.unlabeled_score"] = config.data.unlabeled_score
    if data.labelled and config.data.completed:
        identity["data.completed"] = True
    # How many views there are, and what is derived from them, changes none of them.
    policy = config.data.views.model_dump(exclude={"count", "derived"})
    if config.data.views.derived_taken == "flip_and_crop":  # the cache's own views are not cropped
        plain = ViewConfig()
        policy |= {"crop_probability": 0.0, "crop_min_scale": plain.crop_min_scale, "min_visible": plain.min_visible}
    identity |= {f"data.views.{k}": v for k, v in policy.items()}
    if config.teacher.levels is not None:  # all of them is what a cache of before there was a choice has
        identity["teacher.levels"] = config.teacher.levels
    # Defaults are left out, so that caches of before there was a choice keep their fingerprint.
    left_out = {
        "path",
        "batch_size",
        *(() if cache.columns else ("columns",)),
        *(("cells",) if cache.cells == "all" else ()),
        *(("memory_share",) if cache.memory_share == 1 else ()),
    }
    identity |= {f"teacher.cache.{k}": v for k, v in cache.model_dump(exclude=left_out).items()}
    # The matching decides which queries are positives, and with that whose attention is kept.
    costs = config.detection.model_dump(include={"class_cost", "l1_cost", "giou_cost", "focal_alpha"})
    identity |= {f"detection.{k}": v for k, v in costs.items()}
    as_stored: dict[str, Any] = json.loads(
        json.dumps(identity)
    )  # lists for tuples, to compare with what a manifest says
    return as_stored


def _of_teacher(member: Member, seen_as: Preprocessing) -> dict[str, Any]:
    path, in_file = member.path, is_results(member.path)
    found: dict[str, Any] = {
        **({"teacher.results_sha256": read_results(path).sha256} if in_file else checkpoint_digests(path)),
        "teacher.mean": seen_as.mean,
        "teacher.std": seen_as.std,
        "teacher.class_slots": member.slots,
    }
    if not in_file and asked_in_words(path):
        found["teacher.prompt"] = prompt_of(path, member.words).texts
    return found


def cache_sources(config: C) -> list[C]:
    """The recipe as it is for each folder that the teacher is asked about, which is then `data.train`: the labelled one, where
    there is one, with its cache at `teacher.cache.path`; then each without labels, with its own in a folder therein. So images that
    come later change nothing that is there."""
    data, cache = config.data, config.teacher.cache
    found = [with_fields(config, {"unlabeled": ()}, cache.path)] if data.train or not data.unlabeled else []
    for uri, manifest in zip(data.unlabeled, unlabeled_manifests(data), strict=True):
        path = join(cache.path, f"unlabeled-{manifest.fingerprint[:12]}") if cache.path else ""
        found.append(with_fields(config, {"train": uri, "val": data.train or data.val, "unlabeled": ()}, path))
    return found


def with_fields(config: C, data: dict[str, Any], path: str) -> C:
    """With other fields of the section `data`, and another cache."""
    cache = config.teacher.cache.model_copy(update={"path": path})
    sections = {
        "data": config.data.model_copy(update=data),
        "teacher": config.teacher.model_copy(update={"cache": cache}),
    }
    return config.model_copy(update=sections)


def computed_by(config: Config, device: str) -> dict[str, str]:
    """The fields of `COMPUTED` for units that are computed on a device of this kind, "cpu" or "cuda"."""
    return dict(zip(COMPUTED, (device, cached_in(config.compute.precision)), strict=True))


def cache_names(config: Config) -> dict[str, str]:
    """What the recipe calls the teacher and the data, for `CacheManifest.made_with`."""
    return {"teacher": teachers_named(config), "data": config.data.train}


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
