"""What is known of each family before transformers is imported: one row a family. Sizes, notices, ONNX, checkpoints, search spaces
and benchmarks read it; what needs torch is in the family's own file beside this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

Undecayed = Literal["nothing", "norms", "norms_and_biases", "backbone"]
_FUNCTION = "its sampled attention is a function in transformers' file, in which nothing can be quantised from outside"
_VIT_FLOAT = "its groups of queries are copies of heads in training, whose quantisers would never begin"
_VIT_MISSING = "a learning rate of its decoder's own (0.7 of its projector's)"


@dataclass(frozen=True)
class Facts:
    """size: StudentConfig fields that `student.size` sets in another way than for most families; by_size: those that one size
    sets, by its name.

    hybrid: its maps come from the backbone alone, and their cells are the queries to choose from; the sides of images are
    multiples of a number of pixels, and batch norms stand outside the backbone too (RT-DETR's hybrid encoder, LW-DETR's projector)
    but where batch_norms is False.
    vit: the type of the ViT that it stands on, which is its encoder too; empty: any ResNet. width_unit: the width is a multiple
    of it. least_decoder_layers: with fewer transformers can't build it. groups: its queries are embeddings, so that training can
    have groups of them; query_groups: as many as its authors train with. best_pairs: (query, class) pairs that its
    post-processing gives back; None: as many as there are queries; softmax: one class
    a query, of a softmax with "no object". means_timm: its published configurations mean a
    timm ResNet by leaving the backbone out. Of its authors' training, and what the recipe's fields of the same meaning say by
    default: dropout; frozen_stages of a pretrained backbone, the stem with them; sampling_scale, of the learning rate of sampling
    offsets and reference points; layer_decay, of the learning rate from each layer of a ViT to the one before it; undecayed,
    what no weight decay pulls at. missing: what of its authors' training a student here goes without, in words; empty for
    nothing that is known. in_float: why its students can't be quantised; empty where they can.
    """

    title: str
    size: Mapping[str, Any] = field(default_factory=dict)
    by_size: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hybrid: bool = False
    batch_norms: bool = True
    vit: str = ""
    width_unit: int = 4  # for the sine position embedding
    least_decoder_layers: int = 1
    groups: bool = False
    query_groups: int = 1
    best_pairs: int | None = None
    softmax: bool = False
    means_timm: bool = False
    missing: str = ""
    dropout: float = 0.0
    frozen_stages: int = 0
    sampling_scale: float = 1.0
    layer_decay: float = 1.0
    undecayed: Undecayed = "nothing"
    in_float: str = ""


_ONE_MAP = {"feature_levels": 1}
_HYBRID = {"feature_levels": 3, "encoder_layers": 1}  # attention within the coarsest map only


def _lw_detr(
    vit: int, depths: tuple[int, ...], queries: int = 300, levels: int = 1, width: int = 256, heads: int = 8
) -> dict[str, Any]:
    backbone = {"type": "lw_detr_vit", "hidden_sizes": [vit], "depths": list(depths)}
    decoder = {"width": width, "heads": heads, "ffn_width": 2048, "decoder_layers": 3, "queries": queries}
    return {"backbone": backbone, **decoder, "feature_levels": levels}


# LW-DETR's own tiny, small, medium and large (transformers' conversion script has their numbers), under this project's names; nano
# is ours. The sides of images are those of all families.
_LW_DETR = {
    "nano": _lw_detr(96, (2, 2, 2), 100, width=64, heads=4) | {"ffn_width": 256, "decoder_layers": 2},
    "micro": _lw_detr(192, (2, 2, 2), 100),
    "small": _lw_detr(192, (3, 2, 1, 4)),
    "medium": _lw_detr(384, (3, 2, 1, 4)),
    "large": _lw_detr(384, (3, 2, 1, 4), levels=2, width=384, heads=12),
}


def _rf_detr(side: int, decoder_layers: int) -> dict[str, Any]:
    backbone = {"type": "rf_detr_dinov2", "hidden_sizes": [384], "depths": [3, 3, 3, 3]}
    decoder = {"width": 256, "heads": 8, "ffn_width": 2048, "decoder_layers": decoder_layers, "queries": 300}
    return {"backbone": backbone, **decoder, "resize": {"mode": "square", "size": side}}


# RF-DETR's own nano, small, medium and large, under this project's names: all on DINOv2's small ViT; what grows is the image, and
# the decoder. nano is ours.
_RF_DETR = {
    "nano": _rf_detr(320, 2)
    | {"backbone": {"type": "rf_detr_dinov2", "hidden_sizes": [96], "depths": [2, 2, 2]}}
    | {"width": 64, "heads": 4, "ffn_width": 256, "queries": 100},
    "micro": _rf_detr(384, 2),
    "small": _rf_detr(512, 3),
    "medium": _rf_detr(576, 4),
    "large": _rf_detr(704, 4),
}

FACTS: dict[str, Facts] = {
    "detr": Facts("DETR", {**_ONE_MAP, "queries": 100}, softmax=True, means_timm=True, dropout=0.1, frozen_stages=1),
    "table-transformer": Facts(
        "Table Transformer",
        {**_ONE_MAP, "queries": 100},
        softmax=True,
        means_timm=True,
        dropout=0.1,
        frozen_stages=1,
        in_float="transformers writes its attention out in a module of its own, where nothing can be quantised from outside",
    ),
    "conditional_detr": Facts(
        "Conditional DETR", _ONE_MAP, groups=True, best_pairs=100, means_timm=True, dropout=0.1, frozen_stages=1
    ),
    "dab-detr": Facts(
        "DAB-DETR",
        _ONE_MAP,
        groups=True,
        best_pairs=100,
        means_timm=True,
        frozen_stages=1,
        in_float="transformers writes its attention out in its layers, where nothing can be quantised from outside",
    ),
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
    "rt_detr_v2": Facts(
        "RT-DETRv2",
        _HYBRID,
        hybrid=True,
        least_decoder_layers=2,
        undecayed="norms",
        in_float=_FUNCTION,
    ),
    "d_fine": Facts(
        "D-FINE",
        _HYBRID,
        hybrid=True,
        least_decoder_layers=2,
        undecayed="norms_and_biases",
        in_float=_FUNCTION,
    ),
    "deimv2": Facts(
        "DEIMv2",
        _HYBRID,
        hybrid=True,
        least_decoder_layers=2,
        undecayed="norms_and_biases",
        in_float=_FUNCTION,
        missing="mosaics and mixtures of images",
    ),
    "lw_detr": Facts(
        "LW-DETR",
        by_size=_LW_DETR,
        hybrid=True,
        vit="lw_detr_vit",
        groups=True,
        query_groups=13,
        best_pairs=100,
        layer_decay=0.8,
        undecayed="backbone",
        missing=_VIT_MISSING,
        in_float=_VIT_FLOAT,
    ),
    "rf_detr": Facts(
        "RF-DETR",
        {"feature_levels": 1},
        by_size=_RF_DETR,
        hybrid=True,
        batch_norms=False,
        vit="rf_detr_dinov2",
        groups=True,
        query_groups=13,
        best_pairs=100,
        layer_decay=0.8,
        undecayed="backbone",
        missing=_VIT_MISSING,
        in_float=_VIT_FLOAT,
    ),
}

ONNX = "onnx"  # what stands for the model_type of a detector in an ONNX file, which says nothing of its kind

# Detectors that can teach and no more, by their model_type -> what people call them.
TEACHERS_ONLY: dict[str, str] = {
    "grounding-dino": "Grounding DINO",
    "mm-grounding-dino": "MM Grounding DINO",
    "yolos": "YOLOS",
    ONNX: "detector in an ONNX file",
}
BOXES_ALONE: frozenset[str] = frozenset({"yolos", ONNX})  # of these, those that are no DETR: no memory, no attention

if TYPE_CHECKING:
    Family = str
else:
    Family = Literal[tuple(FACTS)]  # what `student.family` may be
