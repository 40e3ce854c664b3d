"""The whole configuration: strict and frozen. A field no one knows is an error, never ignored (`qskd.config.recipe` reads it).

`compute` and `tracking` say where and how fast a run goes; all other sections decide its result. What `distillation`
holds depends on its method (`qskd.config.distillation`). A field's comment and a section's docstring are
what docs/recipe.md says of them (`qskd.config.reference`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from qskd.config.augmentation import AugmentationConfig
from qskd.config.distillation import DEFAULT, DistillationConfig, settings_class
from qskd.config.images import ResizeConfig, ViewConfig
from qskd.config.section import Fraction, NonNegative, Positive, Section
from qskd.config.student import StudentConfig
from qskd.families.facts import FACTS, Undecayed


class DataConfig(Section):
    """Shard folders made by `qskd prepare`.

    On images of `unlabeled` a distillation learns from pseudo-objects, the teacher's predictions of at least `unlabeled_score`:
    query selection and all losses take these for the objects. What the teacher half sees there (0.1 to that score) is never taught
    as background (docs/unlabeled.md).
    """

    train: str = (
        ""  # a path or a URI; empty, with `unlabeled`: no image is labelled, and the classes are those of `val`
    )
    val: str = ""  # the same, of the images for evaluation
    # folders made by `qskd prepare --unlabeled`, for `qskd distill`: images that the teacher alone says something of
    unlabeled: tuple[str, ...] = ()
    # part of each batch that is drawn from `unlabeled`, rounded to images; an epoch is a pass over `train`, where there is one
    unlabeled_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    unlabeled_score: Annotated[float, Field(gt=0.1, lt=1.0)] = 0.5  # lowest score of a pseudo-object
    # Labelled images too get the teacher's pseudo-objects, where they overlap no object, and what it half sees is not background:
    # for labels that lack classes which the teacher knows (docs/new_classes.md).
    completed: bool = False
    # Files that `qskd select` wrote, of `train` or a folder of `unlabeled` each: of that one only the chosen images are trained on,
    # as often as their weights say. A cache stays that of all.
    selection: tuple[str, ...] = ()
    views: ViewConfig = ViewConfig()
    shuffle_window_images: Positive = 4096  # mixed with one another; a reader holds up to two windows in memory


def _ascending(levels: tuple[int, ...]) -> tuple[int, ...]:
    if list(levels) != sorted(set(levels)):
        raise ValueError(f"{list(levels)}: each map once, the finest first")
    return levels


class TeacherCacheConfig(Section):
    """The teacher's outputs, computed once by `qskd cache` and read by every `qskd distill` of the same recipe."""

    path: str = ""  # the cache's folder, a path or a URI; empty: no cache, the teacher runs in every training step
    # int8: memory in 255 steps of its channel's largest value, logits float16, attention in 255 steps. Or all float16/32.
    precision: Literal["int8", "float16", "float32"] = "int8"
    # Attention is kept of queries whose GIoU with some object reaches this: no boundary can go below it later. -1: of all.
    attention_giou_floor: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.3
    # The last decoder layer's attention; the mean of all layers'; or all: each layer's of its own queries (so many times the
    # bytes), for method qskd-tprd. It serves what reads the last one too.
    attention_layers: Literal["last", "mean", "all"] = "last"
    all_layers: bool = False  # logits and boxes of every decoder layer, for predictions.teacher_layers: same_index
    # Whose memory is kept: of all cells, or of those that the kept attention reaches, and their neighbours. It serves methods whose
    # features are compared there alone: QSKD with features.background: 0, for student maps at least half as fine (docs/cache.md).
    cells: Literal["all", "attended"] = "all"
    # Below 1: a cell's memory is kept along as few directions as hold this share of the memory's variance, by map; all else of
    # it is lost (docs/cache.md). 1: all of it.
    memory_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    # further columns, for a method that asks for them: sides, states (docs/cache.md)
    columns: Annotated[tuple[str, ...], AfterValidator(lambda names: tuple(sorted(set(names))))] = ()
    batch_size: Positive = 16  # images the teacher sees at once while the cache is made

    @model_validator(mode="after")
    def _layers_have_boxes(self) -> TeacherCacheConfig:
        if self.attention_layers == "all" and not self.all_layers:
            raise ValueError(
                "attention_layers: all chooses each layer's queries by its own boxes: set all_layers: true"
            )
        return self


Levels = (
    Annotated[tuple[Annotated[int, Field(ge=0, lt=64)], ...], Field(min_length=1), AfterValidator(_ascending)] | None
)


class FurtherTeacherConfig(Section):
    """A teacher beside the first one, which knows other classes (docs/new_classes.md). It sees the pictures as the first does."""

    path: Annotated[str, Field(min_length=1)]  # a detector, as `teacher.path`; no file of detections
    levels: Levels = None  # as `teacher.levels`, of its own maps
    # As `teacher.class_map`. Classes of the dataset that it has no label for need no entry: another teacher knows them.
    class_map: dict[str, str | None] = Field(default={})


class TeacherConfig(Section):
    """The large detector."""

    # a Hub name, a folder that transformers can load, or a run's; an ONNX file, or a file of detections, with a cache
    # (docs/teachers.md)
    path: str = ""
    # More teachers, each a section under a name, for classes that the ones before it don't know: each class is taught by the first
    # that has a label for it, and of it the others are silent. For qskd and qskd-tprd (docs/new_classes.md).
    also: dict[str, FurtherTeacherConfig] = Field(default_factory=dict)
    cache: TeacherCacheConfig = TeacherCacheConfig()
    # Of a teacher of several memory maps those that are taught and cached, by number, 0 the finest; null: all. A student of one map
    # learns from one: of an RT-DETR's three the coarsest has a twentieth of the bytes (docs/cache.md).
    levels: Levels = None
    resize: ResizeConfig | None = None  # null: what the checkpoint's own image processor says
    # Dataset category name: the teacher's label (or its logit slot as text, "17"), where the names differ; null leaves a
    # category to nobody: the teacher says nothing of it, and what it says is not learnt. Of a teacher that is asked in words
    # (Grounding DINO) it is what it is asked for the category.
    class_map: dict[str, str | None] = Field(default={})

    @model_validator(mode="after")
    def _also_after_a_first(self) -> TeacherConfig:
        for name in self.also:
            if not self.path:
                raise ValueError(f"also.{name} stands beside a first teacher: set path")
            if not name.isidentifier():
                raise ValueError(f"also.{name}: a name of letters, digits and underscores")
        return self


class DetectionLossConfig(Section):
    """Matching costs and loss weights. class_weight 1 is transformers' value; the original repositories of Conditional and
    Deformable DETR use 2.

    The class term is the student's family's own: focal loss (Conditional, DAB and Deformable DETR), varifocal loss
    (RT-DETR, RT-DETRv2, D-FINE), matchability-aware loss (DEIMv2), IoU-aware cross-entropy (LW-DETR, RF-DETR; these losses have
    an alpha or gamma of their own) or cross-entropy with "no object" (DETR, whose own class_cost is 1).
    """

    class_cost: NonNegative = 2.0  # of matching a query with an object, the teacher's queries too
    l1_cost: NonNegative = 5.0  # of matching
    giou_cost: NonNegative = 2.0  # of matching
    class_weight: NonNegative = 1.0  # of the loss
    l1_weight: NonNegative = 5.0  # of the loss
    giou_weight: NonNegative = 2.0  # of the loss
    focal_alpha: Fraction = 0.25  # of the focal loss, and of the class cost of matching
    auxiliary: bool = True  # every decoder layer is supervised, not only the last (and what comes before the layers)
    # Groups of queries in training, the student's own among them: each is matched with the objects by itself, the others are never
    # distilled, and are not in the saved student (Group DETR, Chen et al., ICCV 2023, has 11). 1: its own alone. Conditional, DAB
    # and Deformable DETR, LW-DETR, RF-DETR. null: the family's own: 13 for lw_detr (`--group_detr` in its authors' scripts/) and
    # rf_detr (rfdetr/config.py), 1 for all others.
    query_groups: Annotated[int | None, Field(ge=1, le=32)] = None
    query_group_weight: NonNegative = 1.0  # of the other groups' mean loss, all their layers
    # Denoising of RT-DETR, RT-DETRv2, D-FINE and DEIMv2 students: so many queries at most, but each object's once, that begin
    # near an image's objects, under some wrong names, to find back; and as many further off, to be refused. 0 = off; needs
    # `auxiliary`. null: a third of the student's queries, as published (100 of 300).
    denoising_queries: Annotated[int | None, Field(ge=0, le=2**16)] = None
    # D-FINE, DEIMv2: of the loss of a side's distribution against the object's side (FGL). null: 0.15, as published.
    fgl_weight: NonNegative | None = None
    # D-FINE, DEIMv2: of the loss of a side's distribution in a layer against the last layer's (DDF). null: 1.5, as published.
    ddf_weight: NonNegative | None = None
    # Which queries learn an object's box in a layer. false: the one that the layer has matched with it. true: all that any layer
    # has matched with it, so that layers agree, as D-FINE and DEIMv2 are published (GO-LSD, Peng et al., ICLR 2025); classes keep
    # the layer's own. Needs `auxiliary`. No gain has been shown (docs/families.md).
    united_matches: bool = False
    # a training-only dense head on the encoder's input: lets a random backbone learn fast
    dense_weight: NonNegative = 0.0

    @model_validator(mode="after")
    def _layers_to_unite(self) -> DetectionLossConfig:
        if self.united_matches and not self.auxiliary:
            raise ValueError("united_matches unites the matches of all layers: set auxiliary: true")
        return self


class TrainingConfig(Section):
    """How long, and by what steps: AdamW, on batches over all workers."""

    epochs: Positive = 50  # passes over `data.train`
    # end after so many steps, if that comes before the last epoch; 0 = no limit
    max_steps: Annotated[int, Field(ge=0)] = 0
    batch_size: Positive = 16  # over all workers
    # Images that a worker runs at once: where its share of a batch does not fit into memory, it takes it in parts of at most so
    # many, adds up their gradients and steps once. What is counted by labelled objects (classes but for DETR's softmax, boxes) is
    # then as in the whole share; all else (that softmax, denoising queries, FGL and DDF, united matches, the dense head, what a
    # teacher teaches) is the mean over the parts. 0 = all at once.
    micro_batch_size: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4  # the highest
    backbone_learning_rate_scale: NonNegative = 0.1  # the backbone's learning rate over that of the rest
    # The learning rate of sampling offsets and reference points over that of the rest. null: the family's own: 0.1 for
    # deformable_detr (`--lr_linear_proj_mult` in its authors' main.py), 1 for all others.
    sampling_learning_rate_scale: NonNegative | None = None
    # The learning rate of what `student.inherit` copied over that of the rest; sampling offsets have their own scale besides, and
    # a copied backbone has its own alone. StyleKD (Xu et al., ECCV 2022) trains what it copies at 0.01.
    inherited_learning_rate_scale: NonNegative = 1.0
    weight_decay: NonNegative = 1e-4  # of all weights that are trained, but for those of `undecayed`
    # The learning rate of each layer of a ViT over that of the layer after it. null: the family's own, where the ViT's weights are
    # given (init, backbone.init or inherit): 0.8 for lw_detr (`--lr_vit_layer_decay` in its authors' scripts/) and rf_detr;
    # of random ones: 1.
    backbone_layer_decay: Fraction | None = None
    # What of the student has no weight decay. null: the family's own: norms_and_biases for rt_detr (rtdetr_r18vd_6x_coco.yml of its
    # authors), d_fine (dfine_hgnetv2_s_coco.yml) and deimv2 (deimv2_hgnetv2_n_coco.yml), norms for rt_detr_v2
    # (rtdetrv2_r18vd_120e_coco.yml), backbone for lw_detr (util/get_param_dicts.py: its ViT's norms, biases, scales of layers and
    # place embeddings) and rf_detr (rfdetr/models/backbone: its ViT's norms, biases and all embeddings), nothing for all others.
    undecayed: Undecayed | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # in which the learning rate rises linearly
    schedule: Literal["cosine", "step", "constant"] = "step"  # of the learning rate; cosine: down to 0
    step_at: Fraction = 0.8  # of the schedule, for "step": learning rate / 10
    clip_norm: NonNegative = 0.1  # of all gradients together; 0 = no clipping
    evaluate_every_epochs: Positive = 1  # and after the last in any case
    # Evaluations in a row without a better AP that end the training, as a finished run; 0 = it goes to its end.
    patience: Annotated[int, Field(ge=0)] = 0
    # Whose student OUTPUT/NAME/student is: that of the best AP on `data.val`, or that of the last step. The best so far is kept in
    # OUTPUT/NAME/best in any case. last: to compare methods by an AP that chose nothing.
    result: Literal["best", "last"] = "best"
    checkpoint_every_steps: Annotated[int, Field(ge=0)] = 0  # besides the one at each epoch's end; 0 = none
    ema_decay: Fraction = 0.0  # of a moving average of the weights, which is what is evaluated and kept; 0 = off


class ComputeConfig(Section):
    """Where and how fast; changes no result beyond float rounding (batch statistics of a `batch` norm, and dropout, excepted)."""

    workers: Positive = 1  # processes that train; of `qskd cache`, actors that hold the teacher
    # Elastic: begin with so many workers when no more can be had, and take up to `workers` when they can. 0 = always `workers`.
    min_workers: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU for each worker where Ray has so many now, else CPUs
    # auto: bfloat16 autocast where the GPU has it; a cache of teacher outputs is then computed in float32 all the same. A GPU
    # multiplies float32 in TF32.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # Images of an evaluation that all workers together run at once, without gradients; 0 = training.batch_size.
    evaluation_batch_size: Annotated[int, Field(ge=0)] = 0
    # Of evaluations, `qskd evaluate` too. float32: what a student says wherever it runs later; the others as in `precision`, faster
    # on a GPU, with scores that are rounded.
    evaluation_precision: Literal["float32", "auto", "bfloat16"] = "float32"
    threads_per_worker: Annotated[int, Field(ge=0)] = 1  # CPU threads of torch; 0 = torch's choice
    # Processes that read and decode, for each training worker; of `qskd cache`, tasks ahead of each teacher. 0 = as the free
    # CPUs allow: 1 beside a worker on a CPU, up to 8 beside a GPU.
    loader_workers: Annotated[int, Field(ge=0)] = 0
    # By torch.compile: the losses, and the student as one graph where images are squares of one size, else its backbone. Minutes at
    # the start.
    compile: bool = False
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
    distillation: DistillationConfig = Field(default_factory=lambda: settings_class(DEFAULT)())
    detection: DetectionLossConfig = DetectionLossConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    training: TrainingConfig = TrainingConfig()
    compute: ComputeConfig = ComputeConfig()
    tracking: TrackingConfig = TrackingConfig()
    card: CardConfig = CardConfig()

    @model_validator(mode="after")
    def _a_family_that_has_groups(self) -> Config:
        asked = self.detection.query_groups or 1
        if asked > 1 and not self.student.init and not FACTS[self.student.family].groups:
            able = ", ".join(name for name, facts in FACTS.items() if facts.groups)
            raise ValueError(
                f"detection.query_groups: the queries of a {self.student.family} have no groups; those of {able} can"
            )
        return self

    @model_validator(mode="after")
    def _every_size_has_room_for_the_queries(self) -> Config:
        student, wanted = self.student, self.augmentation
        if wanted.changes_sizes and FACTS[student.family].hybrid and not student.init:
            for scale, size in zip(
                wanted.scales, wanted.sizes(student.resize.size, student.backbone.unit), strict=True
            ):
                if student.cells(size) < student.queries:
                    raise ValueError(
                        f"augmentation.scales has {scale:g}, which is {size} pixels: {student.cells(size)} cells on the maps "
                        f"of a {student.family}, which chooses its {student.queries} queries among them; leave that scale out"
                    )
        return self
