"""What is compared: the variants, the students, the budgets, the seeds. Data about choices; nothing runs here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# The recipe all cells share is the quickstart's own (pipelines/assets/quickstart.yaml): its defaults are judged here.
REPORT_SEEDS = (0, 1, 2, 3, 4)  # on the test split
SEARCH_SEEDS = (100, 101)  # on the validation split: every setting was chosen there
BUDGETS = {"short": 750, "long": 3000}  # training steps of 16 images

_NO_FEATURES = "distillation.features.weight=0"
_NO_PREDICTIONS = "distillation.predictions.weight=0"
_ALL_QUERIES = ("distillation.selection.band_weights=[1.0, 1.0]", "distillation.selection.max_per_object=0")


@dataclass(frozen=True)
class Variant:
    """overrides: of the shared recipe. kind: the verb. time_of: a variant whose wall-clock time it gets, instead of its
    steps (`benchmarks.evidence.clock` measured the ratio)."""

    title: str
    overrides: tuple[str, ...] = ()
    kind: str = "distill"
    time_of: str = ""


VARIANTS = {
    "none": Variant("no teacher", kind="train"),
    "none_equal_time": Variant("no teacher, as many seconds as QSKD took", kind="train", time_of="qskd"),
    "agfd": Variant("AGFD alone", (_NO_PREDICTIONS,)),
    "lapd": Variant("LAPD alone", (_NO_FEATURES,)),
    "qskd": Variant("QSKD"),
    "qskd_online": Variant("QSKD, teacher online", ("teacher.cache.path=",)),
    "positives": Variant("positives only", ("distillation.selection.band_weights=[0.0, 0.0]",)),
    "hard_0.3": Variant("hard negatives from GIoU 0.3", ("distillation.selection.boundaries=[0.3]",)),
    "hard_0.7": Variant("hard negatives from GIoU 0.7", ("distillation.selection.boundaries=[0.7]",)),
    "all": Variant("all queries", _ALL_QUERIES),
    "random": Variant("as many queries, at random", ("distillation.selection.shuffled=true",)),
    "mimic": Variant("plain feature mimicking", (_NO_PREDICTIONS, "distillation.features.background=1.0")),
    "global": Variant(
        "global Hungarian predictions (DETRDistill's logits term)",
        (
            _NO_FEATURES,
            "distillation.predictions.pairing=global",
            "distillation.predictions.pair_weight=uniform",
            "distillation.predictions.teacher_layers=same_index",
        ),
    ),
}


@dataclass(frozen=True)
class Student:
    """overrides: of the shared recipe."""

    title: str
    overrides: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()  # empty: all
    budgets: tuple[str, ...] = tuple(BUDGETS)


MAIN = ("none", "none_equal_time", "agfd", "lapd", "qskd")
STUDENTS = {
    "scratch": Student("The quickstart's student from random weights", ("student.inherit=false",)),
    "inherit": Student("The same student, started from its teacher's layers", ("student.inherit=true",)),
}


def cells_of(
    students: Iterable[str], variants: Iterable[str], budgets: Iterable[str], seeds: Iterable[int]
) -> list[tuple[str, str, str, int]]:
    """In the order to run them: seed by seed, so that a run cut short leaves whole rows."""
    students, variants, budgets = list(students), list(variants), list(budgets)
    return [(s, v, b, seed) for seed in seeds for b in budgets for s in students for v in variants]
