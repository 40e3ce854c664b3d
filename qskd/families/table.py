"""The table of families; a new one is a file of its own and a row here."""

from __future__ import annotations

from typing import Any

from qskd.checkpoints.json_files import shown
from qskd.errors import QskdError
from qskd.families.conditional_detr import ConditionalDetr
from qskd.families.d_fine import DFine
from qskd.families.dab_detr import DabDetr
from qskd.families.deformable_detr import DeformableDetr
from qskd.families.deimv2 import Deimv2
from qskd.families.detr import Detr
from qskd.families.family import Family
from qskd.families.grounding_dino import GroundingDino, MMGroundingDino
from qskd.families.lw_detr import LwDetr
from qskd.families.onnx_file import OnnxFile
from qskd.families.rf_detr import RfDetr
from qskd.families.rt_detr import RTDetr
from qskd.families.rt_detr_v2 import RTDetrV2
from qskd.families.table_transformer import TableTransformer
from qskd.families.yolos import Yolos

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(Detr(), ConditionalDetr(), DabDetr(), DeformableDetr(), RTDetr(), RTDetrV2(), DFine()),
        *(Deimv2(), LwDetr(), RfDetr(), TableTransformer()),
    )
}

TEACHERS: dict[str, Family] = {
    family.name: family for family in (GroundingDino(), MMGroundingDino(), Yolos(), OnnxFile())
}  # and no students


def find_family(model_type: Any, where: str) -> Family:
    """The family of a configuration's `model_type`, which may be one that only teaches; QskdError when there is none."""
    known = FAMILIES | TEACHERS
    family = known.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise QskdError(
            where,
            f"a model of type {shown(model_type)}",
            f"one of {', '.join(known)}",
            "choose a checkpoint of a supported family, or add the family in qskd/families (docs/families.md)",
        )
    return family
