"""A part of a shard folder's images, chosen by `qskd select`: its file, and how often each of them is drawn.

The shards stay as they are, and so does a cache of teacher outputs: a chosen image is named by its shard and row in them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from qskd.datasets.manifest import STRICT, Manifest, read_strictly
from qskd.datasets.samples import Count, Integer
from qskd.errors import QskdError
from qskd.storage.files import read_bytes
from qskd.storage.ownership import head_says
from qskd.storage.places import open_folder
from qskd.untrusted import LARGEST_MANIFEST, parse_json

FORMAT, VERSION = "qskd-selection", 1
EXPECTED = "what `qskd select` writes"
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, without their whole part, lie evenly between 0 and 1


@dataclass(frozen=True)
class ChosenImage:
    """weight: how often it is drawn, over how often another of weight 1 is. score: what it was chosen by; 0 of no meaning."""

    __pydantic_config__ = STRICT

    shard: Count
    row: Count
    image_id: Integer
    file_name: str
    weight: float
    score: float


@dataclass(frozen=True)
class Selection:
    """fingerprint: of the shards. by: how it was chosen. images: in the order in which they were."""

    __pydantic_config__ = STRICT

    shards: str
    fingerprint: str
    by: str
    seed: Integer
    images: tuple[ChosenImage, ...]

    @cached_property
    def own_fingerprint(self) -> str:
        """sha256 of what decides a training: the shards, and which of their images are drawn how often."""
        places = [[each.shard, each.row, each.weight] for each in self.images]
        return hashlib.sha256(json.dumps([self.fingerprint, places]).encode()).hexdigest()

    def to_json(self) -> str:
        tree: dict[str, Any] = {"format": FORMAT, "version": VERSION} | asdict(self)
        images = ",\n".join(json.dumps(each) for each in tree.pop("images"))
        return f'{json.dumps(tree)[:-1]}, "images": [\n{images}\n]}}\n'

    @staticmethod
    def from_json(text: str | bytes, where: str) -> Selection:
        """QskdError for what is no selection, one of another version, or one that can't be drawn from."""
        remedy = "make it again with `qskd select`, or choose another file"
        tree = parse_json(text, where, EXPECTED, remedy, "a selection")
        try:
            found = (tree.pop("format"), tree.pop("version"))
            if found != (FORMAT, VERSION):
                raise QskdError(where, " ".join(map(str, found)), f"{FORMAT} {VERSION}", remedy)
            selection = read_strictly(_SELECTION, tree)
            if not selection.images:
                raise ValueError("it has no images")
            if not all(0 < each.weight < math.inf for each in selection.images):
                raise ValueError("a weight that is not above 0 and finite")
            if len({(each.shard, each.row) for each in selection.images}) < len(selection.images):
                raise ValueError("an image is there twice")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"no `{error.args[0]}`" if isinstance(error, KeyError) else error
            raise QskdError(where, f"not a selection: {problem}", EXPECTED, remedy) from None
        return selection


_SELECTION = TypeAdapter(Selection)


def is_selection(head: bytes) -> bool:
    """Whether a file that begins so is one of qskd's."""
    return head_says(head, FORMAT)


def load_selection(uri: str) -> Selection:
    """Of a path or a URI. QskdError."""
    filesystem, path = open_folder(uri)
    try:
        text = read_bytes(filesystem, path, uri, LARGEST_MANIFEST)
    except OSError as error:
        problem = "no such file" if isinstance(error, FileNotFoundError) else f"can't be read: {error}"
        raise QskdError(uri, problem, EXPECTED, "check the path") from None
    return Selection.from_json(text, uri)


@dataclass(frozen=True)
class ChosenRows:
    """Which rows of some shards an epoch draws from. Compared and hashed by its content.

    shards: how many there are. places: int32 [n, 2] of (shard, row), in stored order, as bytes; weights: float64 [n], as bytes.
    """

    shards: int
    places: bytes
    weights: bytes

    def __len__(self) -> int:
        """Images an epoch draws: as many as are chosen."""
        return len(self.weights) // 8

    def drawn(self, seed: int, epoch: int) -> NDArray[np.int32]:
        """Those of an epoch, int32 [n, 2] in stored order: image i in the mean over epochs n * w_i / sum(w) times, in any one that
        number rounded down or up. Equal weights: each once.

        Systematic sampling: the points k + u, k = 0..n-1, on the line of the weights laid end to end. u of one epoch and the next
        lie a golden section apart, so that an image of weight 0.25 never waits for more than five epochs.
        """
        places, ends = _laid_out(self)
        digest = hashlib.blake2b(repr(("draw", seed)).encode(), digest_size=8).digest()
        shift = (int.from_bytes(digest, "little") / 2**64 + epoch * _GOLDEN) % 1.0
        points = np.arange(len(self)) + min(shift, 1 - 1e-9)
        return places[np.minimum(np.searchsorted(ends, points, side="right"), len(self) - 1)]


@lru_cache(maxsize=4)
def _laid_out(chosen: ChosenRows) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """The places, and where on a line of length n each one's weight ends."""
    places = np.frombuffer(chosen.places, np.int32).reshape(-1, 2)
    weights = np.frombuffer(chosen.weights, np.float64)
    if (weights == weights[0]).all():
        return places, np.arange(1, len(weights) + 1, dtype=np.float64)
    ends = np.cumsum(weights)
    return places, ends * (len(weights) / ends[-1])


def chosen_rows(selections: Sequence[Selection | None], manifests: Sequence[Manifest]) -> ChosenRows | None:
    """Of several folders, whose shards are numbered through: each folder's chosen rows, or all of one without a selection. The
    weights of a selection are scaled to a mean of 1, so that a folder is drawn from as often as it has images to draw. None
    where nothing is left out."""
    if not any(selections):
        return None
    places, weights, first = list[NDArray[np.int32]](), list[NDArray[np.float64]](), 0
    for selection, manifest in zip(selections, manifests, strict=True):
        if selection is None:
            rows = [np.stack([np.full(n, shard), np.arange(n)], 1) for shard, n in enumerate(manifest.shard_rows)]
            own = np.concatenate(rows).astype(np.int32)
            counts = np.ones(len(own))
        else:
            found = sorted((each.shard, each.row, each.weight) for each in selection.images)
            own = np.array([each[:2] for each in found], np.int32)
            counts = np.array([each[2] for each in found], np.float64)
        places.append(own + np.array([first, 0], np.int32))
        weights.append(counts if (counts == counts[0]).all() and counts[0] == 1 else counts / counts.mean())
        first += len(manifest.shards)
    return ChosenRows(first, np.concatenate(places).astype(np.int32).tobytes(), np.concatenate(weights).tobytes())


def check_fits(uri: str, selection: Selection, manifest: Manifest) -> None:
    """QskdError for an image that the shards do not have."""
    rows = manifest.shard_rows
    for each in selection.images:
        if not (each.shard < len(rows) and each.row < rows[each.shard]):
            found = f"row {each.row} of shard {each.shard}"
            raise QskdError(uri, found, f"rows of the {len(rows)} shards of {selection.shards}", "make it again")


def by_folder(
    uris: Sequence[str], folders: Sequence[tuple[str, Manifest]]
) -> tuple[list[Selection | None], dict[str, Any]]:
    """`data.selection` -> each folder's selection, or None, and the fingerprint of each file by its field. folders: (its field and
    place, its manifest). QskdError for a selection of other shards, or a second one of the same."""
    found: dict[str, tuple[str, Selection]] = {}
    fingerprints: dict[str, Any] = {}
    for number, uri in enumerate(uris):
        selection, where = load_selection(uri), f"data.selection: {uri}"
        if selection.fingerprint not in {manifest.fingerprint for _, manifest in folders}:
            named = ", ".join(name for name, _ in folders)
            said = f"chosen from {selection.shards}, whose fingerprint ({selection.fingerprint[:12]}) is that of no folder here"
            raise QskdError(where, said, f"a selection from one of {named}", "choose again: `qskd select`")
        if selection.fingerprint in found:
            said = f"of the same shards as {found[selection.fingerprint][0]}"
            raise QskdError(where, said, "one selection of a folder", "take one out")
        found[selection.fingerprint] = (uri, selection)
        fingerprints[f"data.selection[{number}]"] = selection.own_fingerprint
    own: list[Selection | None] = []
    for _, manifest in folders:
        uri, one = found.get(manifest.fingerprint, ("", None))
        if one is not None:
            check_fits(uri, one, manifest)
        own.append(one)
    return own, fingerprints
