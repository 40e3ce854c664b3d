"""What a cache of teacher outputs says of itself: of which teacher, on which data and views, and what is in it.

The identity is everything that decides the cached numbers. A run that expects another identity is told every field in
which they differ, with both values. What the units were computed on and in is part of it, so that all of a cache agree; who
reads them may compute on anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from qskd.datasets.manifest import MANIFEST, STRICT, Manifest, read_strictly
from qskd.datasets.samples import Count
from qskd.errors import QskdError
from qskd.storage.files import publish_bytes, read_bytes
from qskd.storage.ownership import head_says
from qskd.storage.places import open_folder
from qskd.storage.stores import join
from qskd.untrusted import LARGEST_MANIFEST, parse_json

CODEC_VERSION = 1
FORMAT = "qskd-teacher-cache"
REMEDY = "make it again: `qskd cache RECIPE --overwrite`, which deletes this cache's own files in teacher.cache.path, nothing else"
FILE_REMEDY = "delete this file: `qskd cache RECIPE` then makes it again, and no other"
NOT_OURS = "choose another folder, --set teacher.cache.path=ANOTHER: this file is no cache's, and is left as it is"
_BY_NAME = {
    "teacher": ("teacher.weights_sha256", "teacher.config_sha256", "teacher.results_sha256"),
    "data": ("data.train",),
}
_ALSO = re.compile(r"^teacher\.also\.\d+\.")  # before the same fields of further teachers
COMPUTED = ("computed.device", "computed.precision")  # "cpu" or "cuda"; "float32" (a GPU's with TF32) or "bfloat16"
BASIS = "computed.memory_basis"  # the checksum of what memory is written in (`qskd.teacher.memory.basis`)
_SHORT = 12  # letters of a checksum that a message shows
_Size = Annotated[int, Field(gt=0, lt=2**31)]


@dataclass(frozen=True)
class CacheSizes:
    """What is the same in every row. channels: the width of each memory map, finest first. cells: of each, in an image of the
    usual size; caches of before this was asked don't say. parts: as `TeacherRecord` has it. kept: of each map, the numbers that a
    cell is kept in; none where it is kept as it is."""

    __pydantic_config__ = STRICT

    layers: _Size
    queries: _Size
    classes: _Size
    channels: tuple[_Size, ...]
    cells: tuple[float, ...] = ()
    parts: tuple[tuple[_Size, Count], ...] = ()
    kept: tuple[_Size, ...] = ()

    @property
    def stored(self) -> tuple[int, ...]:
        """The width of each map as its rows have it."""
        return self.kept or self.channels


@dataclass(frozen=True)
class CacheManifest:
    """identity: field -> JSON value. batch_size: images the teacher saw at once (it decides the last bits, no more).

    views: for each finished view, the (rows, bytes) of each shard's file. made_with: "teacher" and "data" as the recipe named
    them, for people; caches of before this was kept don't say.
    """

    __pydantic_config__ = STRICT

    identity: Mapping[str, Any]
    sizes: CacheSizes
    batch_size: _Size
    shards: tuple[str, ...]
    views: Mapping[Count, tuple[tuple[Count, Count], ...]]
    made_with: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the identity; every file of the cache carries it."""
        return fingerprint_of(self.identity)

    @property
    def num_bytes(self) -> int:
        return sum(size for files in self.views.values() for _, size in files)

    def with_view(self, view: int, files: tuple[tuple[int, int], ...]) -> CacheManifest:
        return replace(self, views={**self.views, view: files})

    def to_json(self) -> str:
        head = {"format": FORMAT, "version": CODEC_VERSION, "fingerprint": self.fingerprint}
        tree = asdict(self)
        for name in ("parts", "kept"):  # a cache without is written as before there was such a thing
            if not tree["sizes"][name]:
                del tree["sizes"][name]
        return json.dumps(head | tree, indent=1)

    @staticmethod
    def from_json(text: str | bytes, where: str) -> CacheManifest:
        """Raises QskdError when this is no cache's manifest, one of another version, or one that was edited."""
        remedy = REMEDY if head_says(text, FORMAT) else NOT_OURS
        tree = parse_json(text, where, "what `qskd cache` writes", remedy, "a manifest")
        try:
            version = (tree.pop("format"), tree.pop("version"))
            if version != (FORMAT, CODEC_VERSION):
                found, remedy = " ".join(map(str, version)), REMEDY if version[0] == FORMAT else NOT_OURS
                raise QskdError(where, found, f"{FORMAT} {CODEC_VERSION}", remedy)
            fingerprint = tree.pop("fingerprint")
            manifest = read_strictly(_MANIFEST, tree)
            names = manifest.shards
            if (
                not names
                or any(len(files) != len(names) for files in manifest.views.values())
                or not all(map(_is_plain, names))
            ):
                raise ValueError("its views and shards disagree")
            if manifest.fingerprint != fingerprint:
                raise ValueError("its fingerprint disagrees with its identity: it was edited or mixed up")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"no `{error.args[0]}`" if isinstance(error, KeyError) else error
            raise QskdError(where, f"not a manifest: {problem}", "what `qskd cache` writes", remedy) from None
        return manifest


_MANIFEST = TypeAdapter(CacheManifest)


def _is_plain(name: str) -> bool:
    return name == Path(name).name and not name.startswith(".") and "\0" not in name


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def shard_names(data: Manifest) -> tuple[str, ...]:
    """What the cache's files are called after: the image shards' names, which carry the start of their checksums."""
    return tuple(Path(shard.file).stem for shard in data.shards)


def file_name(shard: str, view: int) -> str:
    """The cache's file beside one image shard, for one view."""
    return f"{shard}.view-{view:03d}.parquet"


def sizes_of(manifest: CacheManifest, views: Iterable[int]) -> dict[str, int]:
    """The bytes of each file of these views, by name. Views that are not finished have none yet."""
    return {
        file_name(shard, view): size
        for view in views
        for shard, (_, size) in zip(manifest.shards, manifest.views.get(view, ()), strict=False)
    }


def check_identity(
    manifest: CacheManifest, expected: Mapping[str, Any], where: str, asked: Mapping[str, str] | None = None
) -> None:
    """QskdError naming each field in which the cache is not what the recipe asks for, with both values. asked: the recipe's
    own names, as `CacheManifest.made_with` has the cache's. What it was computed on is not asked (`check_computed`)."""
    differences = [
        f"{field} is {_shown(manifest.identity.get(field))} in the cache, {_shown(expected.get(field))} in the recipe"
        for field in sorted((manifest.identity.keys() | expected.keys()) - {*COMPUTED, BASIS})
        if manifest.identity.get(field) != expected.get(field)
    ]
    if differences:
        named = _named(manifest, expected, asked or {})
        raise QskdError(
            where,
            f"a cache of other teacher outputs: {'; '.join([*named, *differences])}",
            "a cache made with this recipe's teacher, data, views and cache settings",
            "bring the recipe in line (--set ...), make another cache (`qskd cache RECIPE --set "
            "teacher.cache.path=ANOTHER`), or replace this one (`qskd cache RECIPE --overwrite` deletes its files)",
        )


def check_computed(manifest: CacheManifest, here: Mapping[str, str], where: str) -> None:
    """QskdError when units that are added now would not be computed as those that are there. here: the fields of `COMPUTED`, of
    this job. A cache of before this was kept does not say, and is gone on with."""
    differences = [
        f"{field} is {_shown(manifest.identity[field])} in the cache, {_shown(here[field])} in this job"
        for field in COMPUTED
        if field in manifest.identity and manifest.identity[field] != here[field]
    ]
    if differences:
        raise QskdError(
            where,
            f"a cache that was begun in another way: {'; '.join(differences)}",
            "all units of a cache computed on one kind of device, in one precision",
            "go on as it was begun (--set compute.device=..., --set compute.precision=...), make another cache (--set "
            "teacher.cache.path=ANOTHER), or replace this one (`qskd cache RECIPE --overwrite` deletes its files)",
        )


def _named(manifest: CacheManifest, expected: Mapping[str, Any], asked: Mapping[str, str]) -> list[str]:
    """Whose outputs they are and of which data, by name, where their checksums differ: those say nothing to people."""
    said = []
    for what, fields in _BY_NAME.items():
        names = [name for name in {*manifest.identity, *expected} if _ALSO.sub("teacher.", name) in fields]
        if what not in asked or all(manifest.identity.get(name) == expected.get(name) for name in names):
            continue
        cached = manifest.made_with.get(what)
        if cached is None:
            said.append(f"made with another {what} than {asked[what]} (its name was not kept yet)")
        elif cached == asked[what]:
            said.append(f"made with {what} {cached} as it was then; what is there has changed since")
        else:
            said.append(f"made with {what} {cached}, and the recipe's is {asked[what]}")
    return said


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[:_SHORT]}…{text[-_SHORT:]}" if len(text) > 60 else text


def check_views(manifest: CacheManifest, count: int, where: str) -> None:
    """QskdError unless the views 0 to count - 1 are all there."""
    missing = [view for view in range(count) if view not in manifest.views]
    if missing:
        raise QskdError(
            where,
            f"no view {', '.join(map(str, missing[:8]))}{' …' if len(missing) > 8 else ''}",
            f"views 0 to {count - 1} (data.views.count is {count})",
            "`qskd cache RECIPE` computes the views that are missing; or lower data.views.count",
        )


def load_cache_manifest(uri: str) -> CacheManifest | None:
    """The manifest of a cache folder; None when there is none."""
    filesystem, root = open_folder(uri)
    where = join(uri, MANIFEST)
    try:
        text = read_bytes(filesystem, f"{root}/{MANIFEST}", where, LARGEST_MANIFEST)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise QskdError(where, f"can't be read: {error}", "a readable cache folder") from None
    return CacheManifest.from_json(text, where)


def replaceable_cache(uri: str) -> CacheManifest | None:
    """The manifest of a cache that is to be replaced; None where there is none, or a cache's that can't be read. QskdError
    when the folder's manifest.json is not a cache's."""
    try:
        return load_cache_manifest(uri)
    except QskdError:
        filesystem, root = open_folder(uri)
        where = join(uri, MANIFEST)
        if head_says(read_bytes(filesystem, f"{root}/{MANIFEST}", where), FORMAT):
            return None
        raise


def save_cache_manifest(uri: str, manifest: CacheManifest) -> None:
    """Written whole, in place of the one before."""
    filesystem, root = open_folder(uri)
    publish_bytes(manifest.to_json().encode(), filesystem, f"{root}/{MANIFEST}")
