"""From detections to AP, and how alike student and teacher are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qskd.evaluation.average_precision import CocoResult, evaluate_coco
    from qskd.evaluation.detections import Detections, GroundTruth

__all__ = ["CocoResult", "Detections", "GroundTruth", "evaluate_coco"]


def __getattr__(name: str) -> Any:
    """Light until one of these is asked for."""
    from importlib import import_module

    rooms = {"Detections": "detections", "GroundTruth": "detections"}
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{rooms.get(name, 'average_precision')}"), name)
