"""QSKD as its published re-implementation reads it (TPRD, arXiv 2609.19964): `qskd` with other settings.

Both readings are others' than the paper's authors'; equations.md 5 says what is whose.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qskd.config.section import NonNegative
from qskd.distillation.qskd.method import CITATION, QSKD
from qskd.distillation.qskd.settings import (
    FeatureDistillationConfig,
    PredictionDistillationConfig,
    QuerySelectionConfig,
)
from qskd.distillation.qskd.settings import Settings as QSKDSettings


class Selection(QuerySelectionConfig):
    """What `qskd` has under `selection`, with TPRD's defaults: every unmatched query of GIoU above 0 is a hard negative."""

    boundaries: tuple[Annotated[float, Field(gt=-1.0, le=1.0)], ...] = (0.0,)
    max_per_object: Annotated[int, Field(ge=0)] = 0


class Features(FeatureDistillationConfig):
    """What `qskd` has under `features`, with TPRD's defaults: a mask from each decoder layer, of queries that count 1 + GIoU."""

    weight: NonNegative = 100.0  # of the sum over the decoder layers' masks
    query_weight: Literal["confidence", "quality", "uniform", "giou"] = "giou"
    attention_layers: Literal["last", "mean", "all"] = "all"
    mask_weighting: Literal["normalised", "squared"] = "squared"
    whitening: NonNegative | None = 0.0


class Predictions(PredictionDistillationConfig):
    """What `qskd` has under `predictions`, with TPRD's defaults: the image's hard negatives meet by one assignment."""

    pairing: Literal["rank", "hungarian", "image", "index", "global"] = "image"
    pair_weight: Literal["confidence", "uniform"] = "uniform"
    teacher_layers: Literal["last", "same_index"] = "same_index"


class Settings(QSKDSettings):
    """QSKD as TPRD reads it (docs/equations.md): `qskd` with these defaults."""

    method: str = "qskd-tprd"
    selection: Selection = Selection()
    features: Features = Features()
    predictions: Predictions = Predictions()


class QSKDAsTPRD(QSKD):
    """QSKD's terms; only the settings differ."""

    title = "QSKD, as TPRD reads it"
    citation = (
        CITATION + "\nThresholds, masks, pairing and weights are those of the re-implementation that comes with TPRD "
        "([arXiv 2609.19964](https://arxiv.org/abs/2609.19964)), whose authors are others than QSKD's.\n"
    )
