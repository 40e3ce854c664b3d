"""The families by name."""

from __future__ import annotations

from typing import Literal

Family = Literal["detr", "conditional_detr", "dab-detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine"]
HYBRID_FAMILIES = ("rt_detr", "rt_detr_v2", "d_fine")  # a hybrid encoder, and queries chosen from its cells
TWO_LAYER_FAMILIES = ("deformable_detr", "d_fine")  # transformers ties a second layer's heads to the first's
