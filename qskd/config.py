"""The whole configuration: strict and frozen. A field no one knows is an error, never ignored (`qskd.recipe` reads it).

Sizes of what is built, not how a machine runs it, decide a run's result; what only says where and how fast (`compute`,
`tracking`) is kept in branches of its own. The distillation's sections are in `qskd.config_distillation`, and imported
from here like all others. A field's comment and a section's docstring are what docs/recipe.md says of them
(`qskd.recipe_reference`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qskd.config_distillation import DistillationConfig as DistillationConfig
from qskd.config_distillation import FeatureDistillationConfig as FeatureDistillationConfig
from qskd.config_distillation import PredictionDistillationConfig as PredictionDistillationConfig
from qskd.config_distillation import QuerySelectionConfig as QuerySelectionConfig
from qskd.section import Fraction, NonNegative, Positive, Section
from qskd.student_sizes import SizeName, resolve


class ResizeConfig(Section):
    """How a view becomes the pixels a model sees."""

    # square: height = width = `size`. shortest_edge: shorter side to `size`, longer at most `longest`, aspect ratio kept, and
    # the batch padded to its largest image (DETR's own way).
    mode: Literal["square", "shortest_edge"] = "square"
    size: Positive = 320  # pixels: both sides, or the shorter one
    longest: Positive = 1333  # pixels, for shortest_edge

    @property
    def usual_pixels(self) -> int:
        """Of a photograph whose longer side is 1.5 times the shorter: for estimates."""
        return self.size * (self.size if self.mode == "square" else int(min(self.longest, 1.5 * self.size)))


class ViewConfig(Section):
    """The seeded views of each image that training cycles through: 1 costs least to cache, more augments more.

    Their seed is not the run's: runs of other seeds see the same views and share one cache of teacher outputs.
    """

    count: Positive = 1  # different views of an image; every one in an epoch is number epoch % count
    seed: int = 0  # with the image's id and the view's number, it decides the view
    flip_probability: Fraction = 0.5  # of a view that is mirrored left and right
    crop_probability: Fraction = 0.0  # of a view that is a crop
    crop_min_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5  # smallest crop side over the image's side
    min_visible: Fraction = 0.25  # a box that keeps less of its area than this in a crop is dropped


class DataConfig(Section):
    """Shard folders made by `qskd prepare`."""

    train: str = ""  # a path or a URI
    val: str = ""  # the same, of the images for evaluation
    views: ViewConfig = ViewConfig()
    shuffle_window_images: Positive = 4096  # mixed with one another; a reader holds up to two windows in memory


class BackboneConfig(Section):
    """A ResNet as transformers builds it. Stride is 4 after the first stage and doubles with each further one."""

    # Any family reads either; rt_detr_resnet is RT-DETR's own (three small convolutions first, averaging shortcuts).
    type: Literal["resnet", "rt_detr_resnet"] = "resnet"
    layer_type: Literal["basic", "bottleneck"] = "basic"  # ResNet-18's and 34's; ResNet-50's and larger ones'
    embedding_size: Positive = 64  # channels before the first stage
    hidden_sizes: tuple[Positive, ...] = (64, 128, 256, 512)  # channels of each stage
    depths: tuple[Positive, ...] = (2, 2, 2, 2)  # residual layers of each stage
    init: str = ""  # Hub name or folder of a ResNet whose weights to start from; empty: random

    @model_validator(mode="after")
    def _same_length(self) -> BackboneConfig:
        if len(self.hidden_sizes) != len(self.depths):
            raise ValueError(f"hidden_sizes has {len(self.hidden_sizes)} stages but depths has {len(self.depths)}")
        if self.type == "rt_detr_resnet" and self.layer_type == "basic" and self.embedding_size != self.hidden_sizes[0]:
            raise ValueError(
                f"an rt_detr_resnet of basic layers has no shortcut from embedding_size {self.embedding_size} to "
                f"hidden_sizes[0] {self.hidden_sizes[0]}: make them equal"
            )
        return self

    @property
    def stride(self) -> int:
        """Of the last stage, in pixels."""
        return int(4 * 2 ** (len(self.depths) - 1))


Family = Literal["detr", "conditional_detr", "dab-detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine"]
HYBRID_FAMILIES = ("rt_detr", "rt_detr_v2", "d_fine")  # a hybrid encoder, and queries chosen from its cells
TWO_LAYER_FAMILIES = ("deformable_detr", "d_fine")  # transformers ties a second layer's heads to the first's


class StudentConfig(Section):
    """The small detector. `init` starts from a whole detector instead; the sizes below must then be left alone, and `resize`
    is that detector's own unless it is given.

    `size` sets backbone, width, layers, heads, ffn_width, queries, feature_levels and resize, each unless it is given
    (docs/students.md); what it set is kept, the name is not. docs/families.md has what each family offers. A field that has
    no effect on the family is said in a warning.
    """

    size: SizeName = ""  # sets what is named above; empty: nothing
    init: str = ""  # Hub name or folder of a detector to start from (its head is re-made when the classes differ)
    family: Family = "conditional_detr"  # of transformers' DETR families
    backbone: BackboneConfig = BackboneConfig()
    width: Positive = 256  # d_model
    encoder_layers: Positive = 6  # of the transformer
    decoder_layers: Positive = 6  # of the transformer
    heads: Positive = 8  # of each attention; they divide `width`
    ffn_width: Positive = 1024  # inner width of each feed-forward part
    queries: Positive = 300  # for objects, in each image
    dropout: Fraction = 0.0  # in the transformer, while it is trained
    # The last backbone stages, at most 3. deformable_detr makes further levels by stride 2; RT-DETR and D-FINE were made
    # with 3. The other families read one map.
    feature_levels: Positive = 1
    box_refinement: bool = True  # deformable_detr only: the others always refine, or never
    backbone_norm: Literal["batch", "frozen"] = "batch"  # frozen is right for pretrained backbones and tiny batches
    train_backbone: bool = True  # false: it keeps its weights, and its norms stay frozen too
    resize: ResizeConfig = ResizeConfig()
    # Start from the teacher's weights: layers and channels evenly chosen where the student has fewer, heads and queries; of
    # another family the backbone alone.
    inherit: bool = False

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, given: Any) -> Any:
        return resolve(given, cls.model_fields["family"].default) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _buildable(self) -> StudentConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 for the sine position embedding")
        if self.family == "deformable_detr" and self.width % 32:
            raise ValueError(f"deformable_detr normalises in 32 groups: width {self.width} is not a multiple of 32")
        if self.family in TWO_LAYER_FAMILIES and self.decoder_layers < 2 and not self.init:
            raise ValueError(f"{self.family} needs 2 decoder_layers or more: transformers cannot build it with one")
        if self.family in HYBRID_FAMILIES and not self.init:
            self._check_hybrid()
        return self

    def cells(self, size: int) -> int:
        """Cells of a square image's maps, of all levels."""
        return sum((size * 2**level // self.backbone.stride) ** 2 for level in range(self.feature_levels))

    def _check_hybrid(self) -> None:
        """The hybrid encoder lays doubled maps on finer ones, and its cells are the queries to choose from."""
        stride, size = self.backbone.stride, self.resize.size
        if self.feature_levels > min(3, len(self.backbone.depths)):
            raise ValueError(
                f"{self.family} reads backbone stages only: feature_levels {self.feature_levels} is more than "
                f"{min(3, len(self.backbone.depths))}"
            )
        if self.resize.mode != "square" or size % stride:
            raise ValueError(
                f"{self.family} needs images whose sides are multiples of the backbone's stride {stride}: "
                f"set resize: {{mode: square, size: {max(round(size / stride), 1) * stride}}}"
            )
        cells = self.cells(size)
        if cells < self.queries:
            raise ValueError(
                f"{self.family} chooses queries among the cells of its maps: queries {self.queries} are more than the "
                f"{cells} cells of {self.feature_levels} level(s) at resize.size {size}"
            )


class TeacherCacheConfig(Section):
    """The teacher's outputs, computed once by `qskd cache` and read by every `qskd distill` of the same recipe."""

    path: str = ""  # the cache's folder, a path or a URI; empty: no cache, the teacher runs in every training step
    # int8: memory in 255 steps of its channel's largest value, logits float16, attention in 255 steps. Or all float16/32.
    precision: Literal["int8", "float16", "float32"] = "int8"
    # Attention is kept of queries whose GIoU with some object reaches this: no boundary can go below it later. -1: of all.
    attention_giou_floor: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.3
    attention_layers: Literal["last", "mean"] = "last"  # the last decoder layer's attention, or the mean of all layers'
    all_layers: bool = False  # logits and boxes of every decoder layer, for predictions.teacher_layers: same_index
    batch_size: Positive = 16  # images the teacher sees at once while the cache is made


class TeacherConfig(Section):
    """The large detector."""

    path: str = ""  # a Hub name, or a folder that transformers can load
    cache: TeacherCacheConfig = TeacherCacheConfig()
    resize: ResizeConfig | None = None  # null: what the checkpoint's own image processor says
    # Dataset category name: the teacher's label (or its logit slot as text, "17"), where the names differ.
    class_map: dict[str, str] = Field(default={})


class DetectionLossConfig(Section):
    """Matching costs and loss weights. class_weight 1 is transformers' value; the original repositories of Conditional and
    Deformable DETR use 2.

    The class term is the student's family's own: focal loss (Conditional, DAB and Deformable DETR), varifocal loss
    (RT-DETR, RT-DETRv2, D-FINE; it has an alpha of its own) or cross-entropy with "no object" (DETR, whose own class_cost
    is 1).
    """

    class_cost: NonNegative = 2.0  # of matching a query with an object, the teacher's queries too
    l1_cost: NonNegative = 5.0  # of matching
    giou_cost: NonNegative = 2.0  # of matching
    class_weight: NonNegative = 1.0  # of the loss
    l1_weight: NonNegative = 5.0  # of the loss
    giou_weight: NonNegative = 2.0  # of the loss
    focal_alpha: Fraction = 0.25  # of the focal loss, and of the class cost of matching
    auxiliary: bool = True  # every decoder layer is supervised, not only the last (and what comes before the layers)
    dense_weight: NonNegative = (
        0.0  # a training-only dense head on the encoder's input: lets a random backbone learn fast
    )


class TrainingConfig(Section):
    """How long, and by what steps: AdamW, on batches over all workers."""

    epochs: Positive = 50  # passes over `data.train`
    max_steps: Annotated[int, Field(ge=0)] = (
        0  # end after so many steps, if that comes before the last epoch; 0 = no limit
    )
    batch_size: Positive = 16  # over all workers
    # Images that a worker runs at once: where its share of a batch does not fit into memory, it takes it in parts of at most so
    # many, adds up their gradients (each part's terms are averaged over its own objects) and steps once. 0 = all at once.
    micro_batch_size: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4  # the highest
    backbone_learning_rate_scale: NonNegative = 0.1  # the backbone's learning rate over that of the rest
    weight_decay: NonNegative = 1e-4  # of all weights that are trained
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # in which the learning rate rises linearly
    schedule: Literal["cosine", "step", "constant"] = "step"  # of the learning rate; cosine: down to 0
    step_at: Fraction = 0.8  # of the schedule, for "step": learning rate / 10
    clip_norm: NonNegative = 0.1  # of all gradients together; 0 = no clipping
    evaluate_every_epochs: Positive = 1  # and after the last in any case
    checkpoint_every_steps: Annotated[int, Field(ge=0)] = 0  # besides the one at each epoch's end; 0 = none
    ema_decay: Fraction = 0.0  # of a moving average of the weights, which is what is evaluated and kept; 0 = off


class ComputeConfig(Section):
    """Where and how fast; changes no result beyond float rounding (batch statistics of a `batch` norm excepted)."""

    workers: Positive = 1  # processes that train; of `qskd cache`, actors that hold the teacher
    # Elastic: begin with so many workers when no more can be had, and take up to `workers` when they can. 0 = always `workers`.
    min_workers: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU for each worker where Ray has so many now, else CPUs
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 autocast where the GPU has it
    threads_per_worker: Annotated[int, Field(ge=0)] = 1  # CPU threads of torch; 0 = torch's choice
    loader_workers: Positive = (
        1  # that read and decode: a training's, over the whole cluster; of `qskd cache`, tasks ahead for each teacher
    )
    compile: bool = False  # the student's backbone, by torch.compile
    max_failures: Annotated[int, Field(ge=-1)] = 3  # of workers; -1 = any number
    max_preemptions: Annotated[int, Field(ge=-1)] = -1  # nodes that were taken away after a notice count apart

    @model_validator(mode="after")
    def _a_range(self) -> ComputeConfig:
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        return self


class TrackingConfig(Section):
    """MLflow."""

    experiment: str = "qskd"  # made where there is none of the name
    uri: str = ""  # empty: MLFLOW_TRACKING_URI, else sqlite in the working folder
    run_name: str = ""  # empty: the recipe's name


class CardConfig(Section):
    """What the student's model card (README.md) says and a run can't know. Empty: the card says that it is not stated."""

    data: str = ""  # the data's name
    data_licence: str = ""  # as text
    teacher_licence: str = ""  # as text
    licence: str = ""  # of the student itself, as the Hub spells it: apache-2.0
    baseline: str = ""  # folder of a finished run of the same student without a teacher, whose AP stands beside
    evaluate_teacher: bool = False  # run the teacher over the validation images at the end, for its AP


class Config(Section):
    """What stands at the top of a recipe, beside the sections."""

    # Of the run, which is OUTPUT/NAME: letters, digits, dots, underscores and hyphens.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "qskd"
    seed: int = 0  # of random weights, of dropout and of the images' order; of a sweep's proposals
    output: str = "runs"  # checkpoints and results go to OUTPUT/NAME; a path or a pyarrow filesystem URI
    data: DataConfig = DataConfig()
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    distillation: DistillationConfig = DistillationConfig()
    detection: DetectionLossConfig = DetectionLossConfig()
    training: TrainingConfig = TrainingConfig()
    compute: ComputeConfig = ComputeConfig()
    tracking: TrackingConfig = TrackingConfig()
    card: CardConfig = CardConfig()
