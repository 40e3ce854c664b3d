"""A folder of pictures, or a list of their files, as a dataset without labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qskd.datasets.coco import OnError
from qskd.datasets.findings.finding import Finding
from qskd.datasets.formats.columns import ListedImage
from qskd.datasets.formats.imported import ImportedDataset
from qskd.datasets.formats.reading import PICTURES, picture_size, pictures_below, read_text, some
from qskd.datasets.order.chosen import Selection, is_selection
from qskd.datasets.pictures.reader import Pictures, PicturesInFolder
from qskd.datasets.samples import Category
from qskd.errors import QskdError
from qskd.printable import one_line, shown_value
from qskd.storage.files import sha256_of
from qskd.storage.ownership import is_drawing

_EXPECTED = "a folder of pictures, or a text file that lists some, one a line"
_LARGEST_LIST = 2**28  # bytes: some million lines


class UnlabeledDataset(ImportedDataset):
    """All pictures below a folder, but for what qskd drew there, or those of a list, whose lines are relative to `root` (the
    list's own folder, unless given).

    Each picture is read once for what it holds: one that is there twice, or that `known` has (`pictures_in`), is a problem as a
    broken one is: an error, or left out and recorded.
    """

    labelled = False
    read_shards: tuple[str, ...] = ()  # those that a selection is of, and that `known` was read from

    def __init__(
        self, source: Path, root: Path | None, on_error: OnError, known: Mapping[int, str] | None = None
    ) -> None:
        self._known, self._all = known or {}, hashlib.sha256()
        self.digests: dict[int, str] = {}  # sha256 of each picture's file, by image id
        if not os.path.exists(source):
            raise QskdError(str(source), "no such file or folder", _EXPECTED, "check the path")
        if source.is_dir() and root is not None:
            raise QskdError(str(root), "a folder beside a folder of pictures", "a list, whose lines it is for")
        super().__init__(source, root or (source if source.is_dir() else source.parent), on_error, "auto")

    @property
    def findings(self) -> list[Finding]:
        """Nothing that is said of boxes."""
        return []

    @property
    def root(self) -> Path:
        """What the pictures' names are relative to, links followed."""
        return self._root.resolve()

    def listed(self) -> list[ListedImage]:
        """The pictures, in their order; sizes as their files' heads say."""
        return list(self._images.values())

    def _parse(self) -> tuple[dict[str, list[Any]], str]:
        document, _ = super()._parse()
        return document, self._all.hexdigest()

    def _named(self, entries: list[Any]) -> tuple[Category, ...]:
        return ()

    def _drop_picture(self, image: ListedImage, error: QskdError) -> None:
        self._picture_problems.append({"where": error.where, "found": error.found, "dropped": "the picture"})

    def _picture_source(self) -> Pictures:
        return PicturesInFolder(self._root)

    def _import(self) -> None:
        first: dict[int, str] = {}
        for image_id, (where, name) in enumerate(self._names(), 1):
            located = self._located(self._root, name, where)  # what leaves the folder is refused even when skipping
            try:
                width, height = self._drawn_on(*picture_size(located, where))
                digest = sha256_of(located.open("rb"))
            except OSError as error:
                self._complain(where, f"can't be read: {error.strerror}", "a picture", "the picture")
                continue
            except QskdError as error:
                self._complain(where, error.found, error.expected, "the picture")
                continue
            content = int.from_bytes(bytes.fromhex(digest)[:8], "little") or 1  # `content_of`
            same = self._known.get(content) or first.get(content)
            if same:
                expected = "each picture once" if content not in self._known else "pictures that are not in --not-in"
                self._complain(where, f"the same picture as {same}, byte for byte", expected, "the picture")
                continue
            first[content] = one_line(name)
            self._all.update(f"{name}\0{digest}\n".encode(errors="surrogatepass"))
            self.digests[image_id] = digest
            self._add_image(image_id, name, width, height, measured=True)

    def _names(self) -> Iterator[tuple[str, str]]:
        """(where it is listed, its path relative to the root) of each picture."""
        if self._path.is_dir():
            found = [path for path in pictures_below(self._path) if not is_drawing(path)]
            if not found:
                kinds = f"files that end in {some(sorted(PICTURES), 30)}"
                raise QskdError(str(self._path), "no picture in this folder", kinds, "check the path")
            for path in found:
                yield str(path), path.relative_to(self._path).as_posix()
            return
        text = read_text(self._path, _EXPECTED, _LARGEST_LIST)
        if is_selection(text[:200].encode()):
            selection = Selection.from_json(text, str(self._path))
            self.read_shards = (selection.shards,)
            for image in selection.images:
                yield (
                    f"{self._path}: image {image.image_id} ({shown_value(image.file_name)})",
                    self._relative(image.file_name),
                )
            return
        for number, line in enumerate(text.split("\n"), 1):
            name = line.strip()
            if name:
                yield f"{self._path}: line {number} ({shown_value(name)})", self._relative(name)

    def _relative(self, name: str) -> str:
        """A line's path below the root, if it is absolute and lies there; else as it stands, for `_located` to judge."""
        if not os.path.isabs(name):
            return os.path.normpath(name)
        root = os.path.abspath(self._root)
        return os.path.relpath(name, root) if os.path.normpath(name).startswith(root + os.sep) else name
