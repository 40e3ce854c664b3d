"""A finding: one kind of thing that looks wrong in a dataset, how often, where, what it means and what to do.

Whoever reads a source may add findings of its own: a `findings` beside its `problems` (see `qskd.datasets.shards.SampleSource`)
is all it takes. They are then in the manifest, in what `qskd prepare` prints, and errors under `--strict`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pydantic import ConfigDict

from qskd.datasets.samples import Count
from qskd.errors import QskdError
from qskd.printable import one_line

MOST_EXAMPLES = 5


@dataclass(frozen=True)
class Finding:
    """name: of the kind, in lower case with hyphens, for `--accept` and programs. count: how many there are of it. found: what
    was found, in a sentence with its figures. examples: the first of them, each with its file or id. meaning: what comes of it.
    remedy: what to do."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    name: str
    count: Count
    found: str
    examples: tuple[str, ...] = ()
    meaning: str = ""
    remedy: str = ""

    def lines(self) -> list[str]:
        """For a terminal."""
        examples = f"; {'the first: ' if self.count > len(self.examples) else ''}{', '.join(self.examples)}"
        said = f"{self.name}: {self.found}{examples if self.examples else ''}"
        return [
            said,
            *(f"  {text}" for text in (self.meaning, f"what to do: {self.remedy}" if self.remedy else "") if text),
        ]


@dataclass
class Tally:
    """Counts things of one kind, and keeps the first as examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str, times: int = 1) -> None:
        self.count += times
        if times and len(self.examples) < MOST_EXAMPLES:
            self.examples.append(one_line(example))

    def absorb(self, later: Tally) -> None:
        """Add what another counted, of things that come after these."""
        self.count += later.count
        self.examples += later.examples[: MOST_EXAMPLES - len(self.examples)]

    def finding(self, name: str, found: str, meaning: str = "", remedy: str = "") -> list[Finding]:
        """The finding, where anything was counted. found: a sentence, in which {count} stands for how many."""
        if not self.count:
            return []
        found = found.replace("{count}", str(self.count))
        return [Finding(name, self.count, found, tuple(self.examples), meaning, remedy)]


def refuse(findings: Iterable[Finding], where: str, accepted: Sequence[str]) -> None:
    """QskdError for findings whose names are not among the accepted ones: what `--strict` asks for."""
    left = [finding for finding in findings if finding.name not in accepted]
    if left:
        said = "\n".join(f"    {line}" for finding in left for line in finding.lines())
        names = " ".join(f"--accept {finding.name}" for finding in left)
        raise QskdError(
            where,
            f"{len(left)} thing(s) look wrong\n{said}",
            "nothing that looks wrong, as --strict asks for",
            f"correct the dataset, or name what is meant to be so: {names}",
        )
