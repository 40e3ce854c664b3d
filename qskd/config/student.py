"""The student's section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qskd.config.backbone import FREE, KINDS, BackboneConfig
from qskd.config.images import ResizeConfig
from qskd.config.quantization import QuantizationConfig
from qskd.config.section import Count, Fraction, Layers, Section, Width
from qskd.config.student_sizes import SizeName, resolve
from qskd.families.facts import FACTS, TEACHERS_ONLY, Family

_REST_OF_RANDOM = 0.5  # docs/quantization.md has what came of 0 and of this


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
    # deformable_detr (`--dropout` in their authors' main.py), 0 for dab-detr (its main.py), lw_detr, rf_detr, rt_detr, rt_detr_v2,
    # d_fine and deimv2 (`dropout: 0.` in their configs/). Each worker draws its own: with dropout, two are not one bit for bit.
    dropout: Fraction | None = None
    # How many maps: the last backbone stages, at most 3. deformable_detr makes further ones by stride 2. RT-DETR, RT-DETRv2, D-FINE
    # and DEIMv2 were made with 3; LW-DETR takes 1 to 3; the other families read one map.
    feature_levels: Count = 1
    box_refinement: bool = True  # deformable_detr only: the others always refine, or never
    # frozen is right for pretrained backbones and tiny batches. sync: batch norms over the images of all workers together, outside
    # the backbone too (RT-DETR, RT-DETRv2, D-FINE, DEIMv2); on one worker the same as batch.
    backbone_norm: Literal["batch", "frozen", "sync"] = "batch"
    train_backbone: bool = True  # false: it keeps its weights, and its norms stay frozen too
    # First stages of the backbone that keep their weights and norms, the stem with them; 0: everything learns. null: the family's
    # own of a ResNet whose weights are given (backbone.init or init) and not inherited: 1 for detr, table-transformer,
    # conditional_detr, dab-detr and deformable_detr (models/backbone.py of their authors trains layer2 to layer4 only), 0 for
    # rt_detr, rt_detr_v2, d_fine and deimv2 (`freeze_at: -1` in the configs/ of their small models). Of other backbones, of random
    # weights, or of a teacher's that were thinned out: 0.
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
        if not self.init:
            self._check_backbone()
        return self

    @property
    def dropout_taken(self) -> float:
        """Of a student that is made from sizes; one that starts from `init` has its checkpoint's."""
        return FACTS[self.family].dropout if self.dropout is None else self.dropout

    def frozen_stages_taken(self, family: str) -> int:
        """family: of the student, which `init` decides where it is given."""
        if self.frozen_stages is not None:
            return self.frozen_stages
        pretrained = bool(self.init or (self.backbone.init and "resnet" in self.backbone.type)) and not self.inherit
        return FACTS[family].frozen_stages if pretrained else 0

    @property
    def quantization_taken(self) -> QuantizationConfig | None:
        """With a number for `rest_from`. Ranges begin as those of the network that is watched: of random layers they are wrong for
        the one that it becomes."""
        bits = self.quantization
        if bits is None or bits.rest_from is not None:
            return bits
        return bits.model_copy(update={"rest_from": 0.0 if self.init or self.inherit else _REST_OF_RANDOM})

    def cells(self, size: int) -> int:
        """Cells of a square image's maps, of all levels."""
        return sum((size // stride) ** 2 for stride in self.backbone.strides(self.feature_levels))

    def _check_backbone(self) -> None:
        """A hybrid encoder lays doubled maps on finer ones, a ViT has whole patches; cells are the queries to choose from."""
        facts, backbone = FACTS[self.family], self.backbone
        fitting = (facts.vit,) if facts.vit else tuple(n for n in FREE if not (facts.hybrid and KINDS[n].patch))
        if backbone.type not in fitting:
            wanted = f"a {fitting[0]}" if len(fitting) == 1 else f"one of {', '.join(fitting)}"
            raise ValueError(f"{self.family} stands on {wanted}, backbone.type is {backbone.type}")
        unit, size = backbone.unit, self.resize.size
        if facts.hybrid:
            most = len(backbone.kind.strides if backbone.is_vit else backbone.depths[:3])
            if self.feature_levels > most:
                raise ValueError(
                    f"{self.family} reads backbone stages only: feature_levels {self.feature_levels} is more than {most}"
                )
        if (facts.hybrid or backbone.is_vit) and (self.resize.mode != "square" or size % unit):
            who = self.family if facts.hybrid else backbone.type
            raise ValueError(
                f"{who} needs images whose sides are multiples of {backbone.why_unit}{unit}: "
                f"set resize: {{mode: square, size: {max(round(size / unit), 1) * unit}}}"
            )
        if backbone.type in ("convnext", "convnextv2", "dinov3_convnext") and size < unit:
            raise ValueError(
                f"a {backbone.type} of {len(backbone.depths)} stages needs images of {unit} pixels, resize.size is {size}"
            )
        if facts.hybrid and (cells := self.cells(size)) < self.queries:
            raise ValueError(
                f"{self.family} chooses queries among the cells of its maps: queries {self.queries} are more than the "
                f"{cells} cells of {self.feature_levels} level(s) at resize.size {size}"
            )
