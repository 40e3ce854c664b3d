"""A source without some of its categories: what `qskd prepare --leave-out` writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qskd.datasets.pictures.reader import Examined, Part, PictureReader, without_categories
from qskd.datasets.samples import Problem, Sample
from qskd.errors import QskdError
from qskd.printable import one_line, shown_value

if TYPE_CHECKING:
    from qskd.datasets.shards import SampleSource

LEFT_OUT = "--leave-out"  # what the manifest's problems say of a category that was


def without(source: SampleSource, names: Sequence[str]) -> SampleSource:
    """The source, without these categories."""
    return WithoutCategories(source, names) if names else source


class WithoutCategories:
    """The samples of a source without these categories, by name, and without their annotations; images stay. QskdError for a
    name that no category has, and where no category is left."""

    def __init__(self, source: SampleSource, names: Sequence[str]) -> None:
        known = {category.name for category in source.categories}
        listed = ", ".join(one_line(name) for name in sorted(known)[:24])
        if unknown := [name for name in names if name not in known]:
            raise QskdError(f"--leave-out {unknown[0]}", "no category has this name", f"one of: {listed}")
        self._source, left = source, [category for category in source.categories if category.name not in names]
        if not left:
            raise QskdError("--leave-out", "leaves no category", f"at least one of: {listed}")
        self.source, self.source_sha256, self.categories = source.source, source.source_sha256, tuple(left)
        self._out = {category.id: category.name for category in source.categories if category.name in names}
        self._dropped = dict.fromkeys(self._out, 0)

    def __getattr__(self, name: str) -> Any:
        """What a source need not have."""
        if name == "outline":
            outline = self._source.outline  # type: ignore[attr-defined]
            return lambda: map(self._without, outline())
        if name == "picture_reader":
            reader: PictureReader = self._source.picture_reader  # type: ignore[attr-defined]
            return replace(reader, leave_out=tuple(self._out))
        if name == "parts":
            self._dropped = dict.fromkeys(self._out, 0)
        if name == "took":
            return self._took
        if name in ("findings", "listed_objects", "others_say", "parts", "read_shards"):
            return getattr(self._source, name)
        raise AttributeError(name)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def problems(self) -> list[Problem]:
        out = [
            {
                "where": f"category {shown_value(name)}",
                "found": LEFT_OUT,
                "dropped": f"it and its {count} annotations",
            }
            for name, count in ((name, self._dropped[number]) for number, name in self._out.items())
        ]
        return [*self._source.problems, *out]

    def samples(self) -> Iterator[Sample]:
        self._dropped = dict.fromkeys(self._out, 0)
        return map(self._without, self._source.samples())

    def _took(self, part: Part, examined: Examined) -> None:
        self._source.took(part, examined)  # type: ignore[attr-defined]
        for number, count in examined.left_out.items():
            self._dropped[number] += count

    def _without(self, sample: Sample) -> Sample:
        sample, gone = without_categories(sample, tuple(self._out))
        for number in gone:
            self._dropped[number] += 1
        return sample
