"""Which (query, class) pairs of an image count: ours, and what transformers' post-processing keeps."""

from __future__ import annotations

from dataclasses import dataclass

from qskd.config import FACTS, TEACHERS_ONLY


@dataclass(frozen=True)
class Pairs:
    """Which (query, class) pairs of an image are kept: the `most` best, or the best class of each query."""

    most: int
    one_a_query: bool

    def __str__(self) -> str:
        return f"the best class of each of {self.most} queries" if self.one_a_query else f"the {self.most} best pairs"


def pairs_of_transformers(family: str, queries: int, ours: int = 100) -> Pairs | None:
    """What the family's `post_process_object_detection` keeps (below its threshold nothing); None where that is all of the best
    `ours` pairs, or more: AP is the same or sees what is beyond them."""
    if family in TEACHERS_ONLY:
        return None
    one_a_query = FACTS[family].softmax
    most = FACTS[family].best_pairs or queries
    return Pairs(most, one_a_query) if one_a_query or most < ours else None
