"""Any family's detector behind one output: what the rest of qskd sees of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qskd.checkpoints.clean_config import CATEGORY_IDS
from qskd.checkpoints.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Channels, Preprocessing
from qskd.config import ResizeConfig
from qskd.datasets.classes import UNNAMED
from qskd.detectors.forward.compiled import CompiledForward, compiled, varies
from qskd.detectors.forward.exact import Exact, exactly
from qskd.detectors.forward.extra_queries import ExtraQueries, QueryInlet, added
from qskd.detectors.forward.parting import of_extra, of_sides, real_part, stacked, taken, without_padding
from qskd.detectors.forward.taps import (
    CrossAttention,
    Tap,
    attention_of,
    attention_of_each,
    detached,
    listening,
    not_kept,
)
from qskd.detectors.forward.unasked import KnownMask, always, hides_nothing, knowing
from qskd.families.table import find_family
from qskd.precision import lay_out
from qskd.structures import DetectorOutput


def _size(map_: Tensor) -> tuple[int, int]:
    return int(map_.shape[-2]), int(map_.shape[-1])


class Detector(nn.Module):
    """A detector of transformers, seen as logits, boxes, memory and attention.

    model: transformers' own module; what is saved. labels: class names by slot. family: its `model_type`.
    num_queries: Q. num_layers: L, decoder layers. memory_channels, feature_channels: C of each memory map and of each
    projected backbone map, finest first. classification: the class term of its training loss. num_early: E, predictions
    before the decoder's layers. chooses_queries: queries are chosen in each image, their numbers mean nothing. mean, std: what
    the pixels that its weights know were normalised with (of values in 0..1, RGB); ImageNet's until someone who knows says so.
    inherited: names, in `model`, of what `inherit` copied from a teacher.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        config.auxiliary_loss = False  # True changes the forward pass of Conditional DETR
        self.model = model
        self.mean: Channels = IMAGENET_MEAN
        self.std: Channels = IMAGENET_STD
        self.inherited: frozenset[str] = frozenset()
        self.family: str = config.model_type
        self._family = family = find_family(self.family, type(model).__name__)
        family.check(config)
        self.classification = family.classification
        self.num_queries = family.num_queries(config)
        self.num_layers: int = config.decoder_layers
        self.num_early = family.num_early
        self.chooses_queries = family.chooses_queries(config)
        self._projections = [Tap(module) for module in family.projections(model)]
        self._memory = [Tap(module) for module in family.memory_sources(model)]
        levels = max(len(self._projections), len(self._memory))
        self.memory_channels: tuple[int, ...] = (family.memory_channels(config),) * levels
        self.feature_channels: tuple[int, ...] = (family.feature_channels(config),) * len(self._projections)
        self._encoder_layers = [m for m in model.modules() if type(m).__name__.endswith("EncoderLayer")]
        self.layer_taps = [Tap(module) for module in family.decoder_layers(model)]
        self._cross_attentions = [Tap(module) for module in family.cross_attentions(model)]
        self._masked = [KnownMask(module) for module in family.masked_attentions(model)]
        self.placing = [Exact(module) for module in family.placing(model)]
        self.denoises = family.denoises
        self.side_distributions = family.side_distributions
        self._inlet = QueryInlet(model.model.decoder) if family.denoises else None
        self._compiled: Callable[..., DetectorOutput] | None = None
        self._compiled_backbone: CompiledForward | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by slot of the logits."""
        return labels_of(self.model.config)

    @property
    def category_ids(self) -> tuple[int, ...] | None:
        """The category id that each slot has in the dataset it was trained on; None where the checkpoint does not say."""
        ids = getattr(self.model.config, CATEGORY_IDS, None)
        return None if ids is None else tuple(ids)

    @category_ids.setter
    def category_ids(self, ids: Sequence[int]) -> None:
        if len(ids) != len(self.labels):
            raise ValueError(f"{len(ids)} category ids for {len(self.labels)} classes")
        setattr(
            self.model.config, CATEGORY_IDS, [int(one) for one in ids]
        )  # `save_pretrained` writes it to config.json

    def train(self, mode: bool = True) -> Detector:
        """As any module's; but encoder layers without dropout stay as in evaluation themselves (not what is in them): all they
        do otherwise in training is to ask the device whether every number is finite, and to wait for the answer. The step
        asks that once (`qskd.training.step`)."""
        super().train(mode)
        for layer in self._encoder_layers:
            if not getattr(layer, "dropout", 1.0) and not getattr(layer, "activation_dropout", 0.0):
                layer.training = False
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Detector:
        """Moved to another device, it lies there as that one wants it (`qskd.precision`)."""
        super()._apply(fn, recurse)
        lay_out(self.backbone)
        return self

    def preprocessing(self, resize: ResizeConfig) -> Preprocessing:
        """What it is to be given, at this size."""
        return Preprocessing(resize, self.mean, self.std)

    @cached_property
    def memory_strides(self) -> tuple[int, ...]:
        """Pixels that a cell of each memory map is wide, finest first."""
        known = self._family.strides(self.model.config)
        if known is not None:
            return known
        side = 256
        # A copy without numbers: the forward pass costs nothing and leaves no mark on batch statistics.
        backbone = copy.deepcopy(self.backbone).to("meta").eval()
        with torch.no_grad():
            maps = backbone(
                torch.zeros(1, 3, side, side, device="meta"), torch.ones(1, side, side, dtype=torch.bool, device="meta")
            )
        levels = len(self.memory_channels)
        strides = [side // int(map_.shape[-1]) for map_, _ in maps][-levels:]
        while len(strides) < levels:
            strides.append(2 * strides[-1])
        return tuple(strides)

    def memory_cells(self, resize: ResizeConfig) -> tuple[float, ...]:
        """Cells of each memory map for an image of the usual size (`ResizeConfig.usual_pixels`)."""
        return tuple(resize.usual_pixels / stride**2 for stride in self.memory_strides)

    @property
    def masks_padding(self) -> bool:
        """Whether the model leaves padding out of account; others' boxes come relative to the padded batch."""
        return self._family.masks_padding

    @property
    def reads_raw_memory(self) -> bool:
        """Whether its decoder reads the memory's channels as they are, by layers of its own, not a teacher's."""
        inherits = any(name.startswith("model.decoder.layers.") for name in self.inherited)
        return not (self._family.projects_memory or inherits)

    @property
    def query_kind(self) -> str:
        """What its `Queries` are: "embedding" or "boxes"."""
        return self._family.kind_of_queries(self.model.config)

    @property
    def query_width(self) -> int:
        """Of its queries' embedding, or of the states beside their boxes; 0 where queries are boxes and no more."""
        width = self.memory_channels[0]
        if self.query_kind == "boxes":
            return width if self._family.query_has_state else 0
        embedding = self._family.query_embedding(self.model)
        return width if embedding is None else embedding.embedding_dim

    @property
    def backbone(self) -> nn.Module:
        """The part that learns at its own rate."""
        return self._family.backbone(self.model)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor,
        with_attention: bool = True,
        extra: ExtraQueries | None = None,
        least: tuple[int, int] | None = None,
    ) -> DetectorOutput:
        """Detect, in training and evaluation alike with all decoder layers.

        pixel_values: [B, 3, H, W] float, normalised, 0 on padding. pixel_mask: [B, H, W] bool, False on padding.
        with_attention=False keeps nothing for `attend`, which then raises. Logits, boxes and query states are float32
        also under autocast; memory and features have the precision that the model ran in. `attend` uses the weights as
        they are when it is called: call it before the optimizer's step. In training it has a gradient, and is never compiled.
        extra: queries to add for this forward, of families that `denoises`; the model's own do not see them. The output has
        them in `extra` alone. least: height and width that each image has at least, as
        `pixel_mask` says it, where the host knows; without it transformers may ask the device, and wait.
        """
        self._family.check_size(self.model.config, *pixel_values.shape[-2:])
        padded, full, run = _size(pixel_values), None, self._run
        learns = self.training and torch.is_grad_enabled()
        whole = self._compiled if learns and not with_attention else None
        if whole is not None:
            # Sizes are fixed, and so is the answer; where images may have padding all the same, a mask is taken as it is.
            full, run = (always if least == padded else None), partial(whole, self)
            if extra is not None:
                varies(1, extra.states, extra.boxes_cxcywh)
                varies(0, extra.group)
        elif least is not None:
            full = partial(self._hides_nothing, least, padded)
        with (
            exactly(self.placing, pixel_values.device.type),
            knowing(self._masked, full, self.model, traced=whole is not None),
            compiled(self._compiled_backbone, learns),
        ):
            return run(pixel_values, pixel_mask, with_attention, extra)

    def _hides_nothing(self, least: tuple[int, int], padded: tuple[int, int]) -> bool:
        return hides_nothing(least, padded, _size(self._projections[0].returned))

    def _run(
        self, pixel_values: Tensor, pixel_mask: Tensor, with_attention: bool, extra: ExtraQueries | None
    ) -> DetectorOutput:
        """All of a forward that is tensors."""
        with listening(self.taps(with_attention)):
            if extra is None:
                outputs = self.model.model(pixel_values, pixel_mask=pixel_mask, return_dict=True)
            elif self._inlet is None:
                raise ValueError(f"{self.family} takes no further queries")
            else:
                placed = extra if self.masks_padding else extra.within(real_part(pixel_mask))
                with self._inlet.adding(placed):
                    outputs = self.model.model(pixel_values, pixel_mask=pixel_mask, return_dict=True)
                placed.join(outputs)
            return self.read(outputs, pixel_mask, with_attention)

    def compile_training(self, **options: Any) -> None:
        """Let forwards in training, of images of one size, go through `torch.compile` as a whole; others stay as they are.
        options: of `torch.compile`. Parameters and their names stay."""
        self._compiled = torch.compile(Detector._run, **options)

    def compile_backbone(self, **options: Any) -> None:
        """Let the backbone alone go through `torch.compile` in forwards in training: of images of any size."""
        self._compiled_backbone = CompiledForward(self.backbone, **options)

    def taps(self, with_attention: bool = True) -> list[Tap]:
        """What has to listen to a forward of the model that `read` is to tell of."""
        return [
            *self._projections,
            *self._memory,
            *self.layer_taps,
            *(self._cross_attentions if with_attention else []),
        ]

    def read(self, outputs: Any, pixel_mask: Tensor, with_attention: bool = True) -> DetectorOutput:
        """What a forward of the model has said, while its taps still hold what they heard.

        outputs: of the base model (`model.model`). pixel_mask: [B, H, W] bool, as it was given. Denoising queries, ours or
        those that the model made of labels, are in `extra` of what is returned and nowhere else.
        """
        extra = added(outputs)
        features: tuple[Tensor, ...] = tuple(tap.returned for tap in self._projections)
        memory = self._family.memory([tap.returned for tap in self._memory], [_size(map_) for map_ in features])
        states = [tap.state for tap in self.layer_taps]
        taps = self._cross_attentions if with_attention else []
        learns = self.training and torch.is_grad_enabled()  # a student's, of which a method compares the attention
        cross = [CrossAttention(tap.module, tap.given if learns else detached(tap.given)) for tap in taps]

        # Heads in float32: bf16 has 8 bits, less than a pixel needs.
        with torch.autocast(pixel_mask.device.type, enabled=False):
            predictions = self._family.predict(self.model, outputs, states)
            if not self._family.masks_padding:
                predictions = without_padding(predictions, pixel_mask)

        shapes = [_size(map_) for map_ in memory]
        # As transformers shrinks a mask, so that it is the very one that the model has used.
        valid = [functional.interpolate(pixel_mask[None].float(), size=shape)[0].bool() for shape in shapes]
        everywhere = torch.cat([part.flatten(1) for part in valid], dim=1)
        attend = partial(attention_of, self._family, shapes=shapes, valid=everywhere, first=extra, learns=learns)
        own = slice(extra - predictions.logits.shape[2], None)  # from the end: proposals are of these alone
        return DetectorOutput(
            logits=taken(predictions.logits, own),
            boxes_cxcywh=taken(predictions.boxes_cxcywh, own),
            memory=memory,
            memory_valid=tuple(valid),
            features=features,
            query_states=taken(predictions.query_states, own, 1),
            attend=partial(attend, cross[-1:]) if with_attention else not_kept,
            attend_mean=partial(attend, cross) if with_attention else not_kept,
            no_object=predictions.no_object,
            early_logits=stacked(predictions.early_logits, own),
            early_boxes_cxcywh=stacked(predictions.early_boxes_cxcywh, own),
            sides=of_sides(predictions.sides, own),
            extra=of_extra(predictions, extra) if extra else None,
            attend_each=partial(attention_of_each, attend, cross, self.num_queries) if with_attention else not_kept,
        )


def labels_of(config: Any) -> tuple[str, ...]:
    """Class names by slot; slots that a configuration leaves unnamed are "N/A", as COCO's 91-slot heads call them."""
    return tuple(str(config.id2label.get(slot, UNNAMED)) for slot in range(config.num_labels))
