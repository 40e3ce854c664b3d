"""The student's section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qskd.config.images import ResizeConfig
from qskd.config.quantization import QuantizationConfig
from qskd.config.section import Count, Fraction, Layers, Section, Width
from qskd.config.student_sizes import SizeName, resolve
from qskd.families.facts import FACTS, TEACHERS_ONLY, Family

_VIT_DEFAULTS: dict[str, dict[str, tuple[int, ...]]] = {
    "lw_detr_vit": {"hidden_sizes": (192,), "depths": (3, 2, 1, 4)},  # LW-DETR small
    "rf_detr_dinov2": {"hidden_sizes": (384,), "depths": (3, 3, 3, 3)},  # RF-DETR small: DINOv2's
}
VIT_PATCH = 16  # pixels
VIT_WINDOWS = {"lw_detr_vit": 4, "rf_detr_dinov2": 2}  # along each side of an image
_VIT_STRIDES: dict[str, dict[int, tuple[int, ...]]] = {  # by feature_levels
    "lw_detr_vit": {1: (16,), 2: (8, 32), 3: (8, 16, 32)},  # P4, and P3 with P5
    "rf_detr_dinov2": {1: (16,)},
}


class BackboneConfig(Section):
    """A ResNet as transformers builds it: stride 4 after the first stage, doubled with each further one. Or a ViT, of patches of
    16 pixels: LW-DETR's plain one, 16 windows in an image, or RF-DETR's DINOv2, 4 windows."""

    # Any family but these two reads a ResNet; rt_detr_resnet is RT-DETR's own (three small convolutions first, averaging
    # shortcuts). lw_detr reads lw_detr_vit and rf_detr rf_detr_dinov2, which need not be said.
    type: Literal["resnet", "rt_detr_resnet", "lw_detr_vit", "rf_detr_dinov2"] = "resnet"
    layer_type: Literal["basic", "bottleneck"] = "basic"  # ResNet-18's and 34's; ResNet-50's and larger ones'
    embedding_size: Width = 64  # channels before a ResNet's first stage
    # Channels of each stage; of a ViT one number, by default 192 (lw_detr_vit) or 384.
    hidden_sizes: tuple[Width, ...] = (64, 128, 256, 512)
    # Residual layers of each stage. Of a ViT the layers up to each map that it gives, by default 3, 2, 1, 4 of lw_detr_vit: the
    # last of each such group sees the whole image, the others their window (of 3, 2, 1, 4 as LW-DETR's authors have it, the ninth,
    # not the tenth); by default 3, 3, 3, 3 of rf_detr_dinov2: the first of each group but the first does.
    depths: tuple[Layers, ...] = (2, 2, 2, 2)
    init: str = ""  # Hub name or folder of a backbone of this type whose weights to start from; empty: random

    @model_validator(mode="before")
    @classmethod
    def _of_a_vit(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, Mapping) else None
        return {**_VIT_DEFAULTS[kind], **given} if isinstance(kind, str) and kind in _VIT_DEFAULTS else given

    @model_validator(mode="after")
    def _same_length(self) -> BackboneConfig:
        if self.is_vit:
            if len(self.hidden_sizes) != 1:
                raise ValueError(f"a ViT has one width: hidden_sizes has {len(self.hidden_sizes)}")
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
    def is_vit(self) -> bool:
        return self.type in _VIT_DEFAULTS

    def strides(self, levels: int) -> tuple[int, ...]:
        """Of the maps of a student that chooses its queries among their cells, in pixels, finest first."""
        if self.is_vit:
            return _VIT_STRIDES[self.type].get(levels, ())
        return tuple(self.unit // 2**level for level in reversed(range(levels)))

    @property
    def unit(self) -> int:
        """What the sides of such a student's images are multiples of: a ResNet's last stride; so many pixels that each of a ViT's
        windows has whole patches."""
        return VIT_PATCH * VIT_WINDOWS[self.type] if self.is_vit else int(4 * 2 ** (len(self.depths) - 1))


class StudentConfig(Section):
    """The small detector. `init` starts from a whole detector instead; the sizes below must then be left alone, and `resize`
    is that detector's own unless it is given.

    `size` sets backbone, width, layers, heads, ffn_width, queries, feature_levels and resize, each unless it is given
    (docs/students.md); what it set is kept, the name is not. docs/families.md has what each family offers. A field that has
    no effect on the family is said in a warning.
    """

    size: SizeName = ""  # sets what is named above; empty: nothing
    init: str = (
        ""  # Hub name or folder of a detector, or of a run, to start from (its head is re-made when the classes differ)
    )
    family: Family = "conditional_detr"  # of transformers' DETR families
    backbone: BackboneConfig = BackboneConfig()
    width: Width = 256  # d_model
    encoder_layers: Layers = 6  # of the transformer
    decoder_layers: Layers = 6  # of the transformer
    heads: Count = 8  # of each attention; they divide `width`
    ffn_width: Count = 1024  # inner width of each feed-forward part
    queries: Count = 300  # for objects, in each image
    # In the transformer, while it is trained. null: the family's own: 0.1 for detr, table-transformer, conditional_detr and
    # deformable_detr (`--dropout` in their authors' main.py), 0 for dab-detr (its main.py), rt_detr, rt_detr_v2, d_fine and deimv2
    # (`dropout: 0.` in their configs/). Each worker draws its own: with dropout, two are not one bit for bit.
    dropout: Fraction | None = None
    # The last backbone stages, at most 3. deformable_detr makes further levels by stride 2; RT-DETR and D-FINE were made
    # with 3. The other families read one map.
    feature_levels: Count = 1
    box_refinement: bool = True  # deformable_detr only: the others always refine, or never
    # frozen is right for pretrained backbones and tiny batches. sync: batch norms over the images of all workers together, outside
    # the backbone too (RT-DETR, RT-DETRv2, D-FINE); on one worker the same as batch.
    backbone_norm: Literal["batch", "frozen", "sync"] = "batch"
    train_backbone: bool = True  # false: it keeps its weights, and its norms stay frozen too
    # First stages of the backbone that keep their weights and norms, the stem with them; 0: everything learns. null: the family's
    # own where backbone.init or init gives the weights and inherit does not: 1 for detr, table-transformer, conditional_detr,
    # dab-detr and deformable_detr (models/backbone.py of their authors trains layer2 to layer4 only), 0 for rt_detr, rt_detr_v2,
    # d_fine and deimv2 (`freeze_at: -1` in the configs/ of their small models). Of random weights, or a teacher's that were thinned
    # out: 0.
    frozen_stages: Annotated[int, Field(ge=0, le=256)] | None = None
    resize: ResizeConfig = ResizeConfig()
    # Start from the teacher's weights: layers and channels evenly chosen where the student has fewer, heads and queries; of
    # another family the backbone alone.
    inherit: bool = False
    # Few bits: a short word such as w8a8 or w4a4-attn8, or a section (docs/quantization.md). Students of detr, conditional_detr,
    # deformable_detr and rt_detr. null: float.
    quantization: QuantizationConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        made = resolve(given, cls.model_fields["family"].default)
        family, backbone = made.get("family"), made.get("backbone", {})
        if isinstance(family, str) and family in TEACHERS_ONLY:
            raise ValueError(
                f"family {family}: {TEACHERS_ONLY[family]} can only teach (teacher.path); a student is one of {', '.join(FACTS)}"
            )
        facts = FACTS.get(family) if isinstance(family, str) else None
        if facts is None or not facts.vit or made.get("init") or not isinstance(backbone, Mapping):
            return made
        return {**made, "backbone": {"type": facts.vit, **backbone}}

    @model_validator(mode="after")
    def _buildable(self) -> StudentConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 for the sine position embedding")
        facts = FACTS[self.family]
        if self.quantization is not None and facts.in_float and not self.init:
            raise ValueError(f"quantization: students of {self.family} can't be quantised: {facts.in_float}")
        if self.width % facts.width_unit:
            unit = facts.width_unit
            raise ValueError(
                f"{self.family} normalises in {unit} groups: width {self.width} is not a multiple of {unit}"
            )
        least = facts.least_decoder_layers
        if self.decoder_layers < least and not self.init:
            raise ValueError(
                f"{self.family} needs {least} decoder_layers or more: transformers cannot build it with fewer"
            )
        if not self.init and (facts.vit or "resnet") not in self.backbone.type:
            wanted = facts.vit or "resnet or rt_detr_resnet"
            raise ValueError(f"{self.family} stands on a {wanted}, backbone.type is {self.backbone.type}")
        if facts.hybrid and not self.init:
            self._check_hybrid()
        return self

    @property
    def dropout_taken(self) -> float:
        """Of a student that is made from sizes; one that starts from `init` has its checkpoint's."""
        return FACTS[self.family].dropout if self.dropout is None else self.dropout

    def frozen_stages_taken(self, family: str) -> int:
        """family: of the student, which `init` decides where it is given."""
        if self.frozen_stages is not None:
            return self.frozen_stages
        pretrained = bool(self.init or self.backbone.init) and not self.inherit
        return FACTS[family].frozen_stages if pretrained else 0

    def cells(self, size: int) -> int:
        """Cells of a square image's maps, of all levels."""
        return sum((size // stride) ** 2 for stride in self.backbone.strides(self.feature_levels))

    def _check_hybrid(self) -> None:
        """A hybrid encoder lays doubled maps on finer ones, a ViT has whole windows; cells are the queries to choose from."""
        unit, size = self.backbone.unit, self.resize.size
        most = len(_VIT_STRIDES.get(self.backbone.type, self.backbone.depths[:3]))
        if self.feature_levels > most:
            raise ValueError(
                f"{self.family} reads backbone stages only: feature_levels {self.feature_levels} is more than {most}"
            )
        if self.resize.mode != "square" or size % unit:
            windows = VIT_WINDOWS.get(self.backbone.type, 1) ** 2
            why = f"{windows} windows of whole patches, " if self.backbone.is_vit else "the backbone's stride "
            raise ValueError(
                f"{self.family} needs images whose sides are multiples of {why}{unit}: "
                f"set resize: {{mode: square, size: {max(round(size / unit), 1) * unit}}}"
            )
        cells = self.cells(size)
        if cells < self.queries:
            raise ValueError(
                f"{self.family} chooses queries among the cells of its maps: queries {self.queries} are more than the "
                f"{cells} cells of {self.feature_levels} level(s) at resize.size {size}"
            )
