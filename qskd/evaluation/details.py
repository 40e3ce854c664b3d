"""What an evaluation says beyond the standard numbers: each class, precision against recall, the best threshold, what is taken for
what, and what transformers' own post-processing would give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
from pydantic import TypeAdapter, ValidationError

from qskd.errors import QskdError
from qskd.evaluation.average_precision import CocoResult, evaluate_coco
from qskd.evaluation.detections import Array, Detections, GroundTruth
from qskd.evaluation.forgetting import Forgetting
from qskd.evaluation.matching import NEITHER, RIGHT, WRONG, Verdicts, confusions, judge
from qskd.evaluation.pairs import Pairs
from qskd.evaluation.shown import is_measured, measured
from qskd.untrusted import parse_large_json

FORMAT, FORMAT_VERSION = "qskd-evaluation", 1
_POINTS = 200  # of a curve over thresholds


@dataclass(frozen=True)
class Threshold:
    """What keeping the detections of at least this score comes to, at IoU 0.5; f1 is the best there is."""

    score: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class ClassFigures:
    """One category. images: those with it; objects: without crowd regions. ap, ap50: None where there is no object. best: its own
    best threshold; None where no detection of it is right. shared_precision, shared_recall: what the best threshold of all classes
    together comes to for it; no precision where nothing of it is kept, no recall where it has no object."""

    id: int
    name: str
    images: int
    objects: int
    ap: float | None
    ap50: float | None
    best: Threshold | None
    shared_precision: float | None = None
    shared_recall: float | None = None


@dataclass(frozen=True)
class Confusion:
    """How often objects of a category were found as another (or the same) at the best threshold. true: None: no object was there.
    predicted: None: it was missed. Category ids."""

    true: int | None
    predicted: int | None
    count: int


@dataclass(frozen=True)
class TakenFor:
    """Of a class's `objects`, `count` were found as another class. Names."""

    true: str
    predicted: str
    count: int
    objects: int


@dataclass(frozen=True)
class Curve:
    """Points of equal number, x falling or rising."""

    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Plain:
    """AP of what transformers' `post_process_object_detection` keeps, where that is other pairs than the 100 best. rule: which."""

    rule: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """metrics: COCO's twelve and AP90, as `CocoResult` has them. classes: the worst AP first, those without objects last. best: the
    threshold with the best F1 over all classes together. precision_recall: mean over the classes that have objects, by IoU
    ("0.50", "0.75", "0.50:0.95"). thresholds: "precision", "recall" and "F1" over scores. plain: None where transformers keeps
    the same pairs. max_detections: kept and counted of an image. forgetting: of old classes, where an old detector was named."""

    metrics: dict[str, float]
    classes: tuple[ClassFigures, ...]
    images: int
    backend: str
    best: Threshold | None = None
    confusions: tuple[Confusion, ...] = ()
    precision_recall: dict[str, Curve] | None = None
    thresholds: dict[str, Curve] | None = None
    plain: Plain | None = None
    max_detections: int = 100
    forgetting: Forgetting | None = None

    @property
    def ap(self) -> float | None:
        """None where it could not be measured."""
        return measured(self.metrics).get("AP")

    @cached_property
    def per_class(self) -> dict[str, float]:
        """AP by name, in the order of category ids; -1 where it could not be measured, as in `metrics`."""
        return {one.name: -1.0 if one.ap is None else one.ap for one in sorted(self.classes, key=lambda one: one.id)}

    def taken_for(self, most: int) -> list[TakenFor]:
        """Classes whose objects were taken for another's at the best threshold, most often first."""
        known = {one.id: one for one in self.classes}
        return [
            TakenFor(known[pair.true].name, known[pair.predicted].name, pair.count, known[pair.true].objects)
            for pair in self._mistaken(most)
            if pair.true in known and pair.predicted in known
        ]

    def _mistaken(self, most: int) -> list[Confusion]:
        wrong = [
            pair for pair in self.confusions if None not in (pair.true, pair.predicted) and pair.true != pair.predicted
        ]
        return sorted(wrong, key=lambda pair: (-pair.count, pair.true, pair.predicted))[:most]

    def without_curves(self) -> Evaluation:
        """What a model card keeps."""
        return replace(self, precision_recall=None, thresholds=None, confusions=tuple(self._mistaken(10)))

    def to_json(self) -> str:
        """What could not be measured is null."""
        tree = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        for part in filter(None, (tree, tree["plain"])):
            part["metrics"] = {name: value if is_measured(value) else None for name, value in part["metrics"].items()}
        return json.dumps(tree, indent=1)

    @staticmethod
    def from_json(text: str | bytes, where: str) -> Evaluation:
        """QskdError for what is no evaluation of this version."""
        expected = "what `qskd evaluate --out` writes"
        tree = parse_large_json(text, where, expected)
        known = isinstance(tree, dict) and (tree.pop("format", ""), tree.pop("version", 0)) == (FORMAT, FORMAT_VERSION)
        try:
            if not known:
                raise ValueError("another format or version")
            for part in (tree, tree.get("plain")):
                if isinstance(part, dict) and isinstance(part.get("metrics"), dict):
                    part["metrics"] = {
                        name: -1.0 if value is None else value for name, value in part["metrics"].items()
                    }
            return _EVALUATION.validate_python(tree)
        except (ValidationError, ValueError) as error:
            raise QskdError(where, f"not an evaluation: {str(error).splitlines()[0]}", expected) from None


_EVALUATION = TypeAdapter(Evaluation)


# --- measuring ----------------------------------------------------------------------------------------------------------
def evaluate_in_detail(
    truth: GroundTruth,
    found: Detections,
    result: CocoResult | None = None,
    plain: Detections | None = None,
    rule: Pairs | None = None,
    max_detections: int = 100,
) -> Evaluation:
    """result: of `evaluate_coco` on the same, where it is there already. plain: what transformers' post-processing keeps by `rule`;
    None: the same."""
    result = result or evaluate_coco(truth, found, max_detections=max_detections)
    verdicts = judge(truth, found, max_detections)
    objects = ~np.asarray(truth.iscrowd, bool)
    best, curves = best_threshold(verdicts, int(objects.sum()))
    ids = np.asarray(truth.category_ids)
    by_class, classes = _by_class(verdicts), []
    for place, (number, name) in enumerate(truth.categories):
        mine, theirs = objects & (ids == number), by_class.get(number, _NO_VERDICTS)
        count = int(mine.sum())
        own = best_threshold(theirs, count)[0]
        precision, recall = _kept(theirs, best.score, count) if best else (None, None)
        classes.append(
            ClassFigures(
                *(number, name, len(np.unique(truth.object_image_ids[mine])), count),
                ap=result.class_ap(place) if count else None,
                ap50=result.class_ap(place, 0) if count else None,
                best=own if own and own.f1 else None,
                shared_precision=precision,
                shared_recall=recall,
            )
        )
    counted = confusions(truth, found, best.score) if best else {}
    order = sorted(counted.items(), key=lambda item: (-item[1], item[0][0] is None, str(item[0])))
    compared = None
    if plain is not None and rule is not None:
        compared = Plain(str(rule), evaluate_coco(truth, plain, result.backend, max_detections).metrics)
    return Evaluation(
        result.metrics,
        tuple(sorted(classes, key=lambda one: (one.ap is None, one.ap or 0.0, -one.objects, one.id))),
        len(truth.image_ids),
        result.backend,
        best,
        tuple(Confusion(*pair, count) for pair, count in order),
        _precision_recall(result),
        curves,
        compared,
        max_detections,
    )


def _by_class(verdicts: Verdicts) -> dict[int, Verdicts]:
    """Those of each category, still best first. Sorted once: of a thousand classes each would look through all detections."""
    order = np.argsort(verdicts.category_ids, kind="stable")
    columns = [column[order] for column in (verdicts.scores, verdicts.category_ids, verdicts.verdict)]
    numbers, starts = np.unique(columns[1], return_index=True)
    parts = [np.split(column, starts[1:]) for column in columns]
    return {int(number): Verdicts(*part) for number, part in zip(numbers, zip(*parts, strict=True), strict=False)}


_NO_VERDICTS = Verdicts(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int8))


def _kept(verdicts: Verdicts, score: float, objects: int) -> tuple[float | None, float | None]:
    """Precision and recall of the detections of at least this score."""
    kept = verdicts.verdict[verdicts.scores >= score]
    right, wrong = int((kept == RIGHT).sum()), int((kept == WRONG).sum())
    return right / (right + wrong) if right + wrong else None, right / objects if objects else None


def best_threshold(verdicts: Verdicts, objects: int) -> tuple[Threshold | None, dict[str, Curve] | None]:
    """The score that, as a threshold, gives the best F1 = 2 P R / (P + R) of all these detections together (the highest of equals),
    and precision, recall and F1 over scores. Detections of one score are kept or left together."""
    counts = verdicts.verdict != NEITHER
    scores, right = verdicts.scores[counts], verdicts.verdict[counts] == RIGHT
    if not objects or not len(scores):
        return None, None
    ends = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)
    hits, kept = np.cumsum(right)[ends], ends + 1
    f1 = 2 * hits / (kept + objects)
    at = int(np.argmax(f1))
    if not f1[at]:  # nothing is right at any
        return None, None
    best = Threshold(float(scores[ends[at]]), float(hits[at] / kept[at]), float(hits[at] / objects), float(f1[at]))
    even = np.searchsorted(-scores[ends], -np.linspace(scores[0], scores[-1], _POINTS))
    shown = np.unique(np.minimum(even, len(ends) - 1))
    x = _rounded(scores[ends[shown]])
    lines: dict[str, Array] = {"precision": hits / kept, "recall": hits / objects, "F1": f1}
    return best, {name: Curve(x, _rounded(values[shown])) for name, values in lines.items()}


def _precision_recall(result: CocoResult) -> dict[str, Curve] | None:
    """COCO's interpolated precision at 101 recalls."""
    measured = result.precision.min(axis=(0, 1)) > -1
    if not measured.any():
        return None
    precision = result.precision[:, :, measured].mean(axis=2)
    lines = {"0.50": precision[0], "0.75": precision[5], "0.50:0.95": precision.mean(axis=0)}
    recalls = _rounded(np.linspace(0, 1, 101))
    return {name: Curve(recalls, _rounded(line)) for name, line in lines.items()}


def _rounded(values: Array | Sequence[float]) -> tuple[float, ...]:
    return tuple(round(float(value), 5) for value in values)
