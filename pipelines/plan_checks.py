"""What can be wrong with a recipe's data, cache and classes, found from manifests and configurations alone."""

from __future__ import annotations

from collections.abc import Sequence

from qskd.cache_identity import cache_identity, check_enough
from qskd.cache_manifest import CacheManifest, check_identity, check_views, load_cache_manifest
from qskd.classes import map_classes
from qskd.config import Config
from qskd.detectors import labels_of, read_config
from qskd.errors import QskdError
from qskd.manifest import Manifest


def check_data(config: Config, fields: Sequence[str]) -> None:
    """QskdError when a shard folder is not given."""
    for field in fields:
        if not getattr(config.data, field):
            raise QskdError(
                f"data.{field}", "empty", "a shard folder made by `qskd prepare`", f"--set data.{field}=FOLDER"
            )


def check_cache(config: Config, train: Manifest) -> CacheManifest:
    """The manifest of the recipe's cache; QskdError unless it is there, this teacher's, on these views, and enough."""
    path, views = config.teacher.cache.path, config.data.views.count
    check_enough(config)
    manifest = load_cache_manifest(path)
    if manifest is None:
        raise QskdError(
            path,
            "no cache of teacher outputs",
            "one made by `qskd cache` with this recipe",
            "run `qskd cache RECIPE`; or run the teacher in every step, which is slower: --set teacher.cache.path=",
        )
    check_identity(manifest, cache_identity(config, train), path)
    check_views(manifest, views, path)
    return manifest


def check_classes(config: Config, train: Manifest) -> None:
    """QskdError where the teacher does not know all classes. Reads no weights."""
    if config.distillation.method != "none":
        map_classes(train.labels, labels_of(read_config(config.teacher.path)), config.teacher.class_map)
