"""The manifest of a shard folder: what is in it, where it came from, and the checksum that names its content."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qskd.datasets.findings.finding import Finding
from qskd.datasets.findings.splits import picture_rows
from qskd.datasets.pictures.facts import PictureCounts
from qskd.datasets.samples import Category, Count, Integer, Problem
from qskd.errors import QskdError
from qskd.printable import shown_value
from qskd.storage.files import read_bytes
from qskd.storage.ownership import head_says
from qskd.storage.places import open_folder
from qskd.storage.stores import join
from qskd.untrusted import LARGEST_MANIFEST, parse_json

T = TypeVar("T")
MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "qskd-shards", 1
REMEDY = "copy the folder again, or make it anew with `qskd prepare --overwrite`, which deletes the shards that its manifest names"
NOT_OURS = "choose another folder: qskd did not write this file, and leaves it as it is"
STRICT = ConfigDict(strict=True, extra="forbid")  # of what is read: no number as text, no field that nobody knows
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.parquet")  # a plain name: a manifest can't reach other folders


@dataclass(frozen=True)
class Shard:
    """One Parquet file: its name in the folder, its rows (images), its bytes and their checksum."""

    __pydantic_config__ = STRICT

    file: str
    rows: Count
    bytes: Count
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a shard folder holds. Labels are 0..K-1 in the order of ascending category id; objects exclude crowds.

    most_objects: of one image, and most_objects_in: that image's id; findings: what looks wrong; pictures: what they hash to
    (`qskd.datasets.findings.splits`). All of these are empty where qskd was older.
    """

    __pydantic_config__ = STRICT

    categories: tuple[Category, ...]
    num_images: Count
    num_objects: Count
    num_crowds: Count
    shards: tuple[Shard, ...]
    source: str
    source_sha256: str
    problems: tuple[Problem, ...] = ()
    most_objects: Count | None = None
    most_objects_in: Integer | None = None
    findings: tuple[Finding, ...] = ()
    pictures: str = ""
    picture_counts: PictureCounts | None = None  # None: written before pictures were turned upright
    labelled: bool = True  # False: nobody has said what is in the images; there are no categories then

    @cached_property
    def category_index(self) -> dict[int, int]:
        """The dataset's category id -> contiguous label."""
        return {category.id: label for label, category in enumerate(self.categories)}

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, by label."""
        return tuple(category.name for category in self.categories)

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Images in each shard."""
        return tuple(shard.rows for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the shards' checksums and the categories: the same value, the same data in the same order."""
        content: list[Any] = [[shard.sha256 for shard in self.shards], [[c.id, c.name] for c in self.categories]]
        if (
            self.picture_counts is not None and self.picture_counts.need_the_rule
        ):  # the same bytes were seen otherwise before
            content.append("upright, scaled by the bits used")
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> str:
        head = {"format": FORMAT, "version": FORMAT_VERSION, "fingerprint": self.fingerprint}
        tree = asdict(self)
        if self.labelled:
            del tree["labelled"]  # as it was before there could be others
        return json.dumps(head | tree, indent=1)

    @staticmethod
    def from_json(text: str | bytes, where: str) -> Manifest:
        """Raises QskdError when this is no manifest, one of another version, or one whose fingerprint disagrees."""
        remedy = REMEDY if head_says(text, FORMAT) else NOT_OURS
        tree = parse_json(text, where, "what `qskd prepare` writes", remedy, "a manifest")
        try:
            version = (tree.pop("format"), tree.pop("version"))
            if version != (FORMAT, FORMAT_VERSION):
                found, expected = " ".join(map(str, version)), f"{FORMAT} {FORMAT_VERSION}"
                raise QskdError(where, found, expected, REMEDY if version[0] == FORMAT else NOT_OURS)
            fingerprint = tree.pop("fingerprint")
            manifest = read_strictly(_MANIFEST, tree)
            if not manifest.shards or manifest.labelled != bool(manifest.categories):
                raise ValueError("it lists no shards or no categories, or categories of images without labels")
            if not manifest.labelled and manifest.num_objects + manifest.num_crowds:
                raise ValueError("it has objects in images without labels")
            if not all(_SHARD_NAME.fullmatch(shard.file) for shard in manifest.shards):
                raise ValueError("a shard's name is not a plain file name")
            if len(picture_rows(manifest.pictures)) > manifest.num_images:
                raise ValueError("`pictures` has more rows than there are images")
            if manifest.fingerprint != fingerprint or manifest.num_images != sum(manifest.shard_rows):
                raise ValueError("its fingerprint or counts disagree with its shards: it was edited or mixed up")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"no `{error.args[0]}`" if isinstance(error, KeyError) else error
            raise QskdError(where, f"not a manifest: {problem}", "what `qskd prepare` writes", remedy) from None
        return manifest


_MANIFEST = TypeAdapter(Manifest)


def read_strictly(adapter: TypeAdapter[T], tree: Any) -> T:
    """A JSON value as what the adapter makes of it; ValueError that says in a line what is wrong, and where in it."""
    try:
        return adapter.validate_json(json.dumps(tree))  # from JSON, for there a list may stand for a tuple
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"`{place}` = {shown_value(first['input'])}: {first['msg']}") from None


def check_labelled(uri: str, manifest: Manifest) -> None:
    """QskdError where nobody has said what is in a folder's images: that they have no objects would be a wrong answer."""
    if not manifest.labelled:
        remedy = "`qskd label TEACHER IMAGES OUT.json` has a teacher label them; in `qskd distill` name them in data.unlabeled"
        raise QskdError(uri, f"{manifest.num_images} images without labels", "labelled images", remedy)


def load_manifest(uri: str) -> Manifest:
    """The manifest of a shard folder. QskdError when there is none or it isn't one."""
    filesystem, path = open_folder(str(uri))
    where = join(str(uri), MANIFEST)
    try:
        text = read_bytes(filesystem, f"{path}/{MANIFEST}", where, LARGEST_MANIFEST)
    except OSError as error:
        problem = "no such file" if isinstance(error, FileNotFoundError) else f"can't be read: {error}"
        raise QskdError(where, problem, "a folder that `qskd prepare` made", "check the path, or prepare it") from None
    return Manifest.from_json(text, where)
