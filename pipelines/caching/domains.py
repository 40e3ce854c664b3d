"""Whether images without labels are of the labelled ones' kind, by what the teacher's cache has of both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.run.logs import say
from qskd.config import Config
from qskd.structures import TeacherNeeds
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.columns.table import columns_for

log = logging.getLogger("qskd")
IMAGES = 1000  # looked at, evenly over a cache
_AT_ONCE = 64
# How far is far. Of the package's shapes the teacher's own images and new ones of the kind differ by 1.12 times and 0.066; those
# with other noise and clutter by 1.19 times and 0.19 (docs/unlabeled.md).
OBJECTS_RATIO = 1.5
CONFIDENCE_GAP = 0.1


@dataclass(frozen=True)
class Look:
    """Means over `images` images. objects: pseudo-objects of an image. confidence: of what the teacher sees at all, from
    `floor` up."""

    images: int
    objects: float
    confidence: float

    def __str__(self) -> str:
        return (
            f"{self.objects:.2f} pseudo-objects an image, mean confidence {self.confidence:.3f} ({self.images} images)"
        )

    def is_far_from(self, other: Look) -> bool:
        fewer, more = sorted((self.objects, other.objects))
        return more > OBJECTS_RATIO * fewer or abs(self.confidence - other.confidence) > CONFIDENCE_GAP


def look(uri: str, score: float, floor: float = 0.1) -> Look:
    """What a cache's first view says."""
    reader = TeacherCacheReader(uri, columns_for(TeacherNeeds()))
    ends = np.cumsum([rows for rows, _ in reader.manifest.views[0]])
    chosen = np.unique(np.linspace(0, ends[-1] - 1, min(IMAGES, int(ends[-1]))).round().astype(int))
    shards, objects, sure = np.searchsorted(ends, chosen, side="right"), list[int](), list[float]()
    for shard in np.unique(shards).tolist():
        rows = (chosen[shards == shard] - (ends[shard - 1] if shard else 0)).tolist()
        for start in range(0, len(rows), _AT_ONCE):
            for row in reader.read(shard, 0, rows[start : start + _AT_ONCE]):
                logits = row.logits[-1].astype(np.float64).max(axis=-1)
                best = 1 / (1 + np.exp(-logits))
                objects.append(int((best >= score).sum()))
                sure += best[best >= floor].tolist()
    return Look(len(objects), float(np.mean(objects)), float(np.mean(sure)) if sure else 0.0)


def tell_of_domains(sources: Sequence[Config], labelled: bool, quiet: bool) -> None:
    """Say what the teacher makes of each folder of images (`cache_sources`), and warn of one that is far from the labelled images,
    which are the first where there are any."""
    looks = {each.data.train: look(each.teacher.cache.path, each.data.unlabeled_score) for each in sources}
    first = next(iter(looks.values()))
    for number, (folder, found) in enumerate(looks.items()):
        kind = "labelled" if labelled and not number else "unlabelled"
        say(f"cache: {kind} images of {folder}: {found}", quiet)
        if labelled and number and found.is_far_from(first):
            log.warning(
                "data.unlabeled: %s is far from the labelled images: %s, where they have %s. Is it of another kind? What the "
                "teacher says of images unlike those it knows misleads the student: leave them out, or evaluate with and without",
                folder,
                found,
                first,
            )
