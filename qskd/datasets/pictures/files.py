"""The folder of a dataset's pictures: a file by its name in the JSON, also where the two are spelt otherwise."""

from __future__ import annotations

import bisect
import difflib
import errno
import os
import unicodedata
from pathlib import Path, PurePosixPath

from qskd.errors import QskdError
from qskd.printable import one_line, shown_value

_MOST_COMPARED = (
    50  # names of a folder that a misspelt one is compared with: of a download broken off thousands are sought
)


def folded(name: str) -> str:
    """The same for names that differ in case, in how their accents are stored (NFC, NFD) or in the kind of slash alone."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name.replace("\\", "/")).casefold())


class PictureFolder:
    """Finds pictures below `root`, a real path, and nothing outside it. respelt: the names whose files were spelt otherwise."""

    def __init__(self, root: Path) -> None:
        self._root, self.respelt = root, set[str]()
        self._indices: dict[PurePosixPath, dict[str, list[str]]] = {}  # folders looked through so far
        self._in_order: dict[PurePosixPath, tuple[list[str], dict[str, str]]] = {}

    def locate(self, file_name: str, where: str) -> Path:
        """The picture's real path, or where it should be. Leaving the folder is an attack or a mix-up: QskdError."""
        name = PurePosixPath(file_name)
        remedy = "use file names inside the image folder; copy pictures that a symbolic link leads elsewhere for"
        expected = f"a file inside {self._root}"
        if name.is_absolute() or ".." in name.parts or "\0" in file_name or Path(file_name).is_absolute():
            raise QskdError(where, f"file_name {shown_value(file_name)} leaves the image folder", expected, remedy)
        if not os.path.isfile(self._root / name):  # also False for names no file system takes
            alike = self.alike(file_name)
            if len(alike) == 1:
                name = alike[0]
                self.respelt.add(file_name)
        try:
            path = (self._root / name).resolve()
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise QskdError(where, f"file_name {shown_value(file_name)}: {error}", expected, remedy) from None
            return self._root / name  # no such file, which is for `read` to say
        except RuntimeError as error:  # a loop of links
            raise QskdError(where, f"file_name {shown_value(file_name)}: {error}", expected, remedy) from None
        if not path.is_relative_to(self._root):
            raise QskdError(where, f"file_name {shown_value(file_name)} is a link to {path}", expected, remedy)
        return path

    def read(self, path: Path, where: str, file_name: str, remedy: str) -> bytes:
        """The bytes of a picture at `path`. QskdError names the file that is nearest where there is none."""
        if not os.path.isfile(path):  # a pipe would block the read
            found = "no such file" + self._near(file_name)
            raise QskdError(where, found, f"a picture at {path}", f"is {self._root} the right image folder? {remedy}")
        try:
            return path.read_bytes()
        except OSError as error:
            raise QskdError(where, f"can't be read: {error.strerror}", f"a picture at {path}", remedy) from None

    def alike(self, file_name: str) -> list[PurePosixPath]:
        """The files whose name is this one but for case, accents' form and the kind of slash, below the root."""
        places = [PurePosixPath()]
        for part in PurePosixPath(folded(file_name)).parts:
            places = [place / name for place in places for name in self._index(place).get(part, ())]
        return [place for place in places if os.path.isfile(self._root / place)]

    def _index(self, folder: PurePosixPath) -> dict[str, list[str]]:
        """The names in a folder, by their folded form; none where it is no folder, or outside."""
        if folder not in self._indices:
            index = self._indices.setdefault(folder, {})
            try:
                path = (self._root / folder).resolve()
                names = os.listdir(path) if path.is_relative_to(self._root) else []
            except (OSError, RuntimeError):
                names = []
            for name in names:
                index.setdefault(folded(name), []).append(name)
        return self._indices[folder]

    def _near(self, file_name: str) -> str:
        """What there is instead, for a message."""
        if alike := self.alike(file_name):
            shown = ", ".join(one_line(str(name)) for name in sorted(alike)[:4])
            return f"; {len(alike)} files are spelt alike: {shown}"
        wanted = PurePosixPath(folded(file_name))
        if not wanted.name:
            return ""
        place = PurePosixPath()
        for part in wanted.parts[:-1]:
            names = self._index(place).get(part, ())
            if not names:  # there is no such folder
                here = self._index(PurePosixPath()).get(wanted.name, ())
                return f"; {one_line(here[0])} is in the image folder itself" if here else ""
            place /= names[0]
        index, (ordered, stems) = self._index(place), self._ordered(place)
        at = max(0, bisect.bisect(ordered, wanted.name) - _MOST_COMPARED // 2)
        compared = ordered[at : at + _MOST_COMPARED] if len(wanted.name) <= 300 else []
        same = stems.get(wanted.stem)
        near = [same] if same else difflib.get_close_matches(wanted.name, compared, 1, 0.8)
        return f"; the nearest there is {one_line(str(place / index[near[0]][0]))}" if near else ""

    def _ordered(self, folder: PurePosixPath) -> tuple[list[str], dict[str, str]]:
        """The folded names in a folder in order, and the first of each stem."""
        if folder not in self._in_order:
            names, stems = sorted(self._index(folder)), dict[str, str]()
            for name in names:
                stems.setdefault(PurePosixPath(name).stem, name)
            self._in_order[folder] = names, stems
        return self._in_order[folder]
