"""What is known of each family before transformers is imported: one row a family. Sizes, notices, ONNX, checkpoints, search spaces
and benchmarks read it; what needs torch is in the family's own file beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

Undecayed = Literal["nothing", "norms", "norms_and_biases"]


@dataclass(frozen=True)
class Facts:
    """size: StudentConfig fields that `student.size` sets in another way than for most families.

    hybrid: a hybrid encoder, on backbone stages alone; its cells are the queries to choose from, and its batch norms stand
    outside the backbone too. width_unit: the width is a multiple of it. least_decoder_layers: with fewer transformers can't
    build it. groups: its queries are one embedding, so that training can have groups of them. best_pairs: (query, class) pairs
    that its post-processing gives back; None: as many as there are queries. means_timm: its published configurations mean a
    timm ResNet by leaving the backbone out. Of its authors' training, and what the recipe's fields of the same meaning say by
    default: dropout; frozen_stages of a pretrained backbone, the stem with them; sampling_scale, of the learning rate of sampling
    offsets and reference points; undecayed, what no weight decay pulls at. missing: what of its authors' training a student here
    goes without, in words; empty for nothing that is known.
    """

    title: str
    size: Mapping[str, Any] = field(default_factory=dict)
    hybrid: bool = False
    width_unit: int = 4  # for the sine position embedding
    least_decoder_layers: int = 1
    groups: bool = False
    best_pairs: int | None = None
    means_timm: bool = False
    missing: str = ""
    dropout: float = 0.0
    frozen_stages: int = 0
    sampling_scale: float = 1.0
    undecayed: Undecayed = "nothing"


_ONE_MAP = {"feature_levels": 1}
_HYBRID = {"feature_levels": 3, "encoder_layers": 1}  # attention within the coarsest map only

FACTS: dict[str, Facts] = {
    "detr": Facts("DETR", {**_ONE_MAP, "queries": 100}, means_timm=True, dropout=0.1, frozen_stages=1),
    "conditional_detr": Facts(
        "Conditional DETR", _ONE_MAP, groups=True, best_pairs=100, means_timm=True, dropout=0.1, frozen_stages=1
    ),
    "dab-detr": Facts("DAB-DETR", _ONE_MAP, groups=True, best_pairs=100, means_timm=True, frozen_stages=1),
    "deformable_detr": Facts(
        "Deformable DETR",
        width_unit=32,  # it normalises in 32 groups
        least_decoder_layers=2,  # transformers ties a second layer's heads to the first's
        groups=True,
        best_pairs=100,
        means_timm=True,
        dropout=0.1,
        frozen_stages=1,
        sampling_scale=0.1,
    ),
    "rt_detr": Facts("RT-DETR", _HYBRID, hybrid=True, undecayed="norms_and_biases"),
    "rt_detr_v2": Facts("RT-DETRv2", _HYBRID, hybrid=True, undecayed="norms"),
    "d_fine": Facts(
        "D-FINE",
        _HYBRID,
        hybrid=True,
        least_decoder_layers=2,
        undecayed="norms_and_biases",
        missing="the union of its layers' matchings for its box terms (GO-LSD)",
    ),
}

if TYPE_CHECKING:
    Family = str
else:
    Family = Literal[tuple(FACTS)]  # what `student.family` may be
