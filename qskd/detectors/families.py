"""The table of families; a new one is a file of its own and a row here."""

from __future__ import annotations

from typing import Any

from qskd.detectors.conditional_detr import ConditionalDetr
from qskd.detectors.d_fine import DFine
from qskd.detectors.dab_detr import DabDetr
from qskd.detectors.deformable_detr import DeformableDetr
from qskd.detectors.detr import Detr
from qskd.detectors.family import Family
from qskd.detectors.rt_detr import RTDetr
from qskd.detectors.rt_detr_v2 import RTDetrV2
from qskd.detectors.untrusted import shown
from qskd.errors import QskdError

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (Detr(), ConditionalDetr(), DabDetr(), DeformableDetr(), RTDetr(), RTDetrV2(), DFine())
}


def find_family(model_type: Any, where: str) -> Family:
    """The family of a configuration's `model_type`; QskdError when there is none."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise QskdError(
            where,
            f"a model of type {shown(model_type)}",
            f"one of {', '.join(FAMILIES)}",
            "choose a checkpoint of a supported family, or add the family in qskd/detectors (docs/families.md)",
        )
    return family
