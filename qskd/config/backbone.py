"""The backbone's section of a recipe, and what is known of each kind of backbone before transformers is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from qskd.config.section import Layers, Section, Width


@dataclass(frozen=True)
class Kind:
    """hidden_sizes, depths: the defaults of `BackboneConfig` for it. family: the only one that stands on it; empty: each that reads
    a backbone's stages.

    embeds: whether embedding_size is its own. patch: pixels along a side of a ViT's patches; 0: it has stages, of stride 4 and
    doubled with each. windows: along each side of an image, of a ViT whose layers see a window. strides: of its maps, by
    feature_levels, of a ViT that gives several. batch_norms: whether it has any.
    """

    hidden_sizes: tuple[int, ...]
    depths: tuple[int, ...]
    family: str = ""
    embeds: bool = False
    patch: int = 0
    windows: int = 1
    strides: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    batch_norms: bool = False


_RESNET = Kind((64, 128, 256, 512), (2, 2, 2, 2), embeds=True, batch_norms=True)
_DINOV2 = Kind((384,), (12,), patch=14)
KINDS: dict[str, Kind] = {
    "resnet": _RESNET,
    "rt_detr_resnet": _RESNET,
    "hgnet_v2": Kind((64, 256, 512, 1024), (1, 1, 2, 1), embeds=True, batch_norms=True),  # B0
    "convnext": Kind((96, 192, 384, 768), (3, 3, 9, 3)),  # tiny
    "convnextv2": Kind((40, 80, 160, 320), (2, 2, 6, 2)),  # atto
    "dinov3_convnext": Kind((96, 192, 384, 768), (3, 3, 9, 3)),  # tiny, the smallest that is published
    "dinov2": _DINOV2,  # small
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": Kind((384,), (12,), patch=16),  # small
    "lw_detr_vit": Kind(  # LW-DETR small; P4, and P3 with P5
        (192,), (3, 2, 1, 4), "lw_detr", patch=16, windows=4, strides={1: (16,), 2: (8, 32), 3: (8, 16, 32)}
    ),
    "rf_detr_dinov2": Kind((384,), (3, 3, 3, 3), "rf_detr", patch=16, windows=2, strides={1: (16,)}),  # RF-DETR small
}
FREE = tuple(name for name, kind in KINDS.items() if not kind.family)

TIMM = ("timm_backbone", "timm_wrapper", "timm")  # transformers' names of what it has timm build
NO_TIMM = (
    "a student on timm's network would need timm, and torchvision, wherever it is loaded; students stand on transformers' own: "
    f"{', '.join(FREE)}; timm's ResNet-18 to 152 are read as resnet where they are in a detector (docs/students.md)"
)

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(KINDS)]


class BackboneConfig(Section):
    """A network of stages as transformers builds it (ResNet, HGNetV2, ConvNeXt): stride 4 after the first stage, doubled with each
    further one. Or a ViT: DINOv2's or DINOv3's, one map of its patches for a family that reads one map; LW-DETR's plain one, 16
    windows in an image; RF-DETR's DINOv2, 4 windows (docs/students.md)."""

    # rt_detr_resnet is RT-DETR's own (three small convolutions first, averaging shortcuts). lw_detr reads lw_detr_vit and rf_detr
    # rf_detr_dinov2, which need not be said, and no other family does. RT-DETR, RT-DETRv2, D-FINE and DEIMv2 need stages.
    type: Name = "resnet"
    layer_type: Literal["basic", "bottleneck"] = "basic"  # ResNet-18's and 34's; ResNet-50's and larger ones'
    embedding_size: Width = 64  # channels before the first stage of a ResNet or an HGNetV2 (by default 16 there)
    # Channels of each stage; of a ViT one number. By default ResNet-18's, HGNetV2-B0's, ConvNeXt tiny's, ConvNeXtV2 atto's, DINOv3
    # ConvNeXt tiny's, 192 of lw_detr_vit, 384 of the other ViTs.
    hidden_sizes: tuple[Width, ...] = (64, 128, 256, 512)
    # Layers of each stage, by default as hidden_sizes; of an HGNetV2 blocks of three layers. Of DINOv2's and DINOv3's ViTs one
    # number, 12. Of the ViTs with windows: how many layers come before each map that it gives. lw_detr_vit (by default 3, 2, 1, 4):
    # the last layer of each such group sees the whole image, the others their window; of 3, 2, 1, 4 alone the ninth does instead of
    # the tenth, as its authors have it. rf_detr_dinov2 (by default 3, 3, 3, 3): the first layer of each group but the first does.
    depths: tuple[Layers, ...] = (2, 2, 2, 2)
    init: str = ""  # Hub name or folder of a backbone of this type whose weights to start from; empty: random

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, Mapping) else None
        if kind in TIMM:
            raise ValueError(f"type {kind}: {NO_TIMM}")
        if not isinstance(kind, str) or kind not in KINDS or "resnet" in kind:
            return given
        own: dict[str, Any] = {"hidden_sizes": KINDS[kind].hidden_sizes, "depths": KINDS[kind].depths}
        return own | ({"embedding_size": 16} if kind == "hgnet_v2" else {}) | dict(given)

    @model_validator(mode="after")
    def _same_length(self) -> BackboneConfig:
        if self.is_vit:
            if len(self.hidden_sizes) != 1:
                raise ValueError(f"a ViT has one width: hidden_sizes has {len(self.hidden_sizes)}")
            if self.type == "dinov3_vit" and self.hidden_sizes[0] % 4:
                raise ValueError(
                    f"a dinov3_vit turns channels in fours: its width {self.hidden_sizes[0]} is no multiple of 4"
                )
            if not self.kind.family and len(self.depths) != 1:
                raise ValueError(
                    f"a {self.type} gives one map: depths has {len(self.depths)} numbers of layers, not one"
                )
            return self
        if len(self.hidden_sizes) != len(self.depths):
            raise ValueError(f"hidden_sizes has {len(self.hidden_sizes)} stages but depths has {len(self.depths)}")
        if self.type == "rt_detr_resnet" and self.layer_type == "basic" and self.embedding_size != self.hidden_sizes[0]:
            raise ValueError(
                f"an rt_detr_resnet of basic layers has no shortcut from embedding_size {self.embedding_size} to "
                f"hidden_sizes[0] {self.hidden_sizes[0]}: make them equal"
            )
        return self

    @property
    def kind(self) -> Kind:
        return KINDS[self.type]

    @property
    def is_vit(self) -> bool:
        return bool(self.kind.patch)

    def strides(self, levels: int) -> tuple[int, ...]:
        """Of the maps of a student that chooses its queries among their cells, in pixels, finest first."""
        if self.is_vit:
            return self.kind.strides.get(levels, ())
        return tuple(self.unit // 2**level for level in reversed(range(levels)))

    @property
    def unit(self) -> int:
        """What the sides of a student's images are multiples of, where it matters (`why_unit`): the last stage's stride; so many
        pixels that each of a ViT's windows has whole patches."""
        return self.kind.patch * self.kind.windows if self.is_vit else int(4 * 2 ** (len(self.depths) - 1))

    @property
    def why_unit(self) -> str:
        if not self.is_vit:
            return "the backbone's stride "
        return f"{self.kind.windows**2} windows of whole patches, " if self.kind.windows > 1 else "its patches' side, "
