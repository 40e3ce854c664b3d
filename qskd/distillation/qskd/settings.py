"""QSKD's settings, free of torch: which queries are selected, and by which losses they teach."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qskd.config.distillation import Choice, MethodSettings
from qskd.config.section import Fraction, NonNegative, Section


class QuerySelectionConfig(Section):
    """Group Query Selection (equations.md 1.3 GQS; our reconstruction, the paper's boundaries are not known).

    Ascending GIoU `boundaries` cut queries into bands; `band_weights` has one weight more than there are boundaries, lowest
    band first; 0 drops a band. Positives (bipartite matches) have their own weight, whatever their GIoU.
    """

    boundaries: tuple[Annotated[float, Field(gt=-1.0, le=1.0)], ...] = (0.5,)  # ascending
    band_weights: tuple[NonNegative, ...] = (0.0, 1.0)  # lowest band first
    positive_weight: NonNegative = 1.0  # of the matched queries
    relative: bool = False  # boundaries are fractions of the best GIoU any query reaches with the object (Q-DETR)
    shuffled: bool = False  # an ablation's control: as many queries of each object and weight, but chosen at random
    max_per_object: Annotated[int, Field(ge=0)] = 10  # hard negatives kept per object, largest GIoU first; 0 = no limit

    @model_validator(mode="after")
    def _ordered(self) -> QuerySelectionConfig:
        if any(low >= high for low, high in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError(f"boundaries {list(self.boundaries)} must ascend strictly")
        if len(self.band_weights) != len(self.boundaries) + 1:
            raise ValueError(
                f"{len(self.boundaries)} boundaries make {len(self.boundaries) + 1} bands, "
                f"but band_weights has {len(self.band_weights)} entries (lowest band first)"
            )
        return self

    @property
    def floor(self) -> float:
        """The lowest absolute GIoU at which a query can be kept; -1 when that can't be bounded."""
        if self.relative or self.shuffled or self.band_weights[0] > 0:
            return -1.0
        kept = [low for low, weight in zip(self.boundaries, self.band_weights[1:], strict=True) if weight > 0]
        return min(kept, default=1.0)


class FeatureDistillationConfig(Section):
    """Attention-Guided Feature Distillation (equations.md 1.3 AGFD; our reconstruction). Weight 0 turns it off."""

    # chosen by search on the quickstart's task (benchmarks/evidence); the guess before it was 1 to 10
    weight: NonNegative = 50.0
    # What a query's attention counts in the mask: the teacher's largest class probability; that and its GIoU; 1; 1 + GIoU,
    # by which hard negatives count nearly as much as positives (TPRD).
    query_weight: Literal["confidence", "quality", "uniform", "giou"] = "confidence"
    quality_gamma: Fraction = 0.5  # for "quality": confidence^gamma * GIoU^(1-gamma)
    # Of the teacher's decoder, as `teacher.cache.attention_layers`; all: each layer has a mask of its own selection, and their
    # losses are summed (TPRD).
    attention_layers: Literal["last", "mean", "all"] = "last"
    # normalised: each cell counts M, divided by the mask's sum in the image; squared: it counts M^2, divided by all cells, as
    # the mean of (M F_S - M F_T)^2 does (TPRD)
    mask_weighting: Literal["normalised", "squared"] = "normalised"
    # alpha of whitened AGFD (equations.md 1.4, ours): an error counts variance^-alpha of its direction in the teacher's memory, as
    # `qskd cache` finds them, or a worker before the first step; 0 = every direction alike, 1 = as much of each. null: 1, but in a
    # loop of your own, whose `qskd.Distiller` has to be given images to look at
    whitening: NonNegative | None = None
    # decoder: directions are by how far what the teacher's decoder says moves along them, and an error counts that^alpha: 1 = what
    # the decoder makes of it (its Fisher information)
    whitened_by: Literal["variance", "decoder"] = "variance"
    # of the variance, or of how far the decoder moves: as few directions are kept as hold it
    whitened_share: Annotated[float, Field(gt=0, le=1)] = 0.97
    # Each channel's error (with whitening, each direction's) has a learned importance w, of mean 1: it counts w error - log w
    # (equations.md 1.5; the idea of learned importance weights is IADD's)
    importance: bool = False
    # What an image's loss counts whose memory is derived from another view's (`data.views.derived`): 1 = as much as a real one's,
    # 0 = nothing, so that AGFD learns from real views alone; 1 - memory_unexplained (`qskd cache --verify-derived`) goes between
    derived_weight: Fraction = 1.0
    # Least mask value in an image with objects, the largest being 1; 1 = plain mimicking. It counts in every cell, and so
    # for more on more cells: 0.1 is about half of the mask's sum on the quickstart's 8 x 8, and would drown it at COCO's size.
    background: Fraction = 0.0

    @model_validator(mode="after")
    def _weighs_something(self) -> FeatureDistillationConfig:
        if self.whitened_by == "decoder" and not self.whitening:
            raise ValueError("whitened_by: decoder, and nothing is whitened: set whitening to 1, or leave it out")
        return self

    def alpha(self, known: bool) -> float:
        """What `whitening` comes to. known: whether there are directions of the teacher's memory."""
        return float(known) if self.whitening is None else self.whitening


class PredictionDistillationConfig(Section):
    """Local Alignment Prediction Distillation (equations.md 1.3 LAPD; our reconstruction). Weight 0 turns it off."""

    weight: NonNegative = 1.0  # of all three terms
    class_weight: NonNegative = 1.0  # of the classes' BCE
    l1_weight: NonNegative = 5.0  # of the boxes' L1 distance
    giou_weight: NonNegative = 2.0  # of 1 - GIoU
    # rank: inside each object's group, positive with positive, then by GIoU; hungarian: then by the cheapest assignment;
    # image: positives by their object, all the image's hard negatives by its cheapest assignment (TPRD);
    # index: query i with query i, for a student that inherited the queries (not with derived views);
    # global: all queries, no selection (DETRDistill)
    pairing: Literal["rank", "hungarian", "image", "index", "global"] = "rank"
    pair_weight: Literal["confidence", "uniform"] = "confidence"  # times the teacher's largest class probability, or 1
    # their number; weights: the sum of their weights, so that hard negatives dilute positives less
    divide_by: Literal["pairs", "weights"] = "pairs"
    class_gamma: NonNegative = 0.0  # each class's BCE times |p_t - p_s|^gamma, as quality focal loss; 0 = plain BCE
    # Class dropping: of each pair's classes the teacher's so many likeliest alone are learnt, and those of 0.05 or more; all
    # others are not pushed down. 0: none is dropped
    kept_classes: Annotated[int, Field(ge=0)] = 0
    student_layers: Literal["all", "last"] = "all"  # the decoder layers that learn
    # The decoder layer each learns from; same_index: the student's are spread evenly over the teacher's (DETRDistill).
    teacher_layers: Literal["last", "same_index"] = "last"


class Settings(MethodSettings):
    """QSKD (docs/equations.md): query selection, and the two losses that it guides."""

    method: str = "qskd"
    selection: QuerySelectionConfig = QuerySelectionConfig()
    features: FeatureDistillationConfig = FeatureDistillationConfig()
    predictions: PredictionDistillationConfig = PredictionDistillationConfig()

    def weight_fields(self) -> dict[str, str]:
        """`predictions.weight` is not among them: it would do again what its three terms' weights do."""
        fields = {"agfd": "features.weight"} if self.features.weight > 0 else {}
        predictions = self.predictions
        if predictions.weight > 0:
            parts = (
                ("class", predictions.class_weight),
                ("l1", predictions.l1_weight),
                ("giou", predictions.giou_weight),
            )
            fields |= {f"lapd_{part}": f"predictions.{part}_weight" for part, weight in parts if weight > 0}
        return fields

    def keeps_queries(self) -> bool:
        return self.predictions.weight > 0 and self.predictions.pairing == "index"

    def choices(self, all_layers: bool) -> dict[str, Choice]:
        """Which decoder layers learn from which: all of the student's or its last, from the teacher's last or its own."""
        predictions = self.predictions
        if not predictions.weight:
            return {}
        own = "same_index" if predictions.teacher_layers == "same_index" else "all"
        own = "last" if predictions.student_layers == "last" else own
        names = ("all", "last", "same_index") if all_layers or own == "same_index" else ("all", "last")
        return {
            "layers": Choice(
                own,
                {
                    name: {
                        "predictions.student_layers": "last" if name == "last" else "all",
                        "predictions.teacher_layers": "same_index" if name == "same_index" else "last",
                    }
                    for name in names
                },
            )
        }
