"""qskd: query-selection knowledge distillation for DETR detectors.

The library: torch, numpy and transformers, free of Ray and MLflow (those live in `pipelines`). Importing this package
imports nothing heavy, so that data workers, which need only numpy and Pillow, start fast: its names are looked up when they
are asked for. docs/python.md shows them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pipelines.api import cache as cache
    from pipelines.api import distill as distill
    from pipelines.api import evaluate as evaluate
    from pipelines.api import export as export
    from pipelines.api import label as label
    from pipelines.api import predict as predict
    from pipelines.api import prepare as prepare
    from pipelines.api import select as select
    from pipelines.api import train as train
    from pipelines.api import tune as tune
    from qskd.config import Config as Config
    from qskd.detectors import Detector as Detector
    from qskd.detectors import build_student as build_student
    from qskd.detectors import load_detector as load_detector
    from qskd.detectors import save_detector as save_detector
    from qskd.distillation.method import Lesson as Lesson
    from qskd.distillation.method import Method as Method
    from qskd.distillation.method import build_method as build_method
    from qskd.errors import QskdError as QskdError
    from qskd.losses.detection_loss import combine as combine
    from qskd.losses.detection_loss import detection_terms as detection_terms
    from qskd.losses.detection_loss import detection_weights as detection_weights
    from qskd.losses.matching import assign as assign
    from qskd.structures import LossTerm as LossTerm
    from qskd.structures import Targets as Targets
    from qskd.training.distiller import Distiller as Distiller
    from qskd.training.distiller import load_teacher as load_teacher
    from qskd.training.distiller import targets_of as targets_of
    from qskd.training.trainer import DistillationMixin as DistillationMixin

VERBS = (
    "prepare",
    "cache",
    "train",
    "distill",
    "tune",
    "evaluate",
    "predict",
    "label",
    "select",
    "export",
)  # of `pipelines.api`
PIECES = {  # for a loop of one's own: where each is defined
    "Config": "config",
    "Detector": "detectors",
    "DistillationMixin": "training.trainer",
    "Distiller": "training.distiller",
    "Lesson": "distillation.method",
    "LossTerm": "structures",
    "Method": "distillation.method",
    "QskdError": "errors",
    "Targets": "structures",
    "assign": "losses.matching",
    "build_method": "distillation.method",
    "build_student": "detectors",
    "combine": "losses.detection_loss",
    "detection_terms": "losses.detection_loss",
    "detection_weights": "losses.detection_loss",
    "load_detector": "detectors",
    "load_teacher": "training.distiller",
    "save_detector": "detectors",
    "targets_of": "training.distiller",
}


def __getattr__(name: str) -> Any:
    if name in VERBS:
        from qskd.verbs import verb

        found = verb(name)
    elif name in PIECES:
        from importlib import import_module

        found = getattr(import_module(f"qskd.{PIECES[name]}"), name)
    else:
        raise AttributeError(f"module 'qskd' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *VERBS, *PIECES})
