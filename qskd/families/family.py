"""What a family of detectors has to say for itself to stand behind `Detector`: one subclass in one file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qskd.config import StudentConfig
from qskd.families.places import check_whole_patches, fixed_places, patch_of
from qskd.quantization.layers import QuantisedLinear
from qskd.structures import Classification, Queries, SideDistributions


@dataclass(frozen=True)
class Memory:
    """What a decoder reads. tokens: [B, N, C], the cells of all maps, one map after the other. shapes: (H, W) of each map. valid:
    [B, H, W] bool of each. masked: whether any cell may be padding; where none is, nothing is asked of the device."""

    tokens: Tensor
    shapes: tuple[tuple[int, int], ...]
    valid: tuple[Tensor, ...]
    masked: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """(B, N)."""
        return int(self.tokens.shape[0]), int(self.tokens.shape[1])

    @property
    def mask(self) -> Tensor:
        """[B, N] bool."""
        return torch.cat([part.flatten(1) for part in self.valid], 1)

    def levels(self) -> dict[str, Any]:
        """As transformers' sampled attention is told of the maps."""
        device = self.tokens.device
        cells = [height * width for height, width in self.shapes]
        starts = [sum(cells[:level]) for level in range(len(cells))]
        return {
            "spatial_shapes": torch.tensor(self.shapes, dtype=torch.long).to(device, non_blocking=True),
            "spatial_shapes_list": list(self.shapes),
            "level_start_index": torch.tensor(starts, dtype=torch.long).to(device, non_blocking=True),
        }


@dataclass(frozen=True)
class Predictions:
    """logits: [L, B, Q, K]; boxes_cxcywh: [L, B, Q, 4]; query_states: [B, Q, D] of the last layer, after its norm.

    no_object [L, B, Q], sides: as in `DetectorOutput`. early_logits, early_boxes_cxcywh: one [B, Q, K] and [B, Q, 4] each for
    every prediction before the layers. Where queries were added, they come before the model's own, in all but the proposals.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    query_states: Tensor
    no_object: Tensor | None = None
    early_logits: tuple[Tensor, ...] = ()
    early_boxes_cxcywh: tuple[Tensor, ...] = ()
    sides: SideDistributions | None = None


@dataclass(frozen=True)
class GroupParts:
    """Of a model whose code has groups of queries in training: places, an embedding with a row a query; lists, of modules, one of
    each a group, the student's own first; switches, the modules that look at their `training` to know whether there are groups."""

    places: nn.Embedding
    lists: tuple[nn.ModuleList, ...]
    switches: tuple[nn.Module, ...]


class Family(ABC):
    """One family of transformers' detectors. Stateless; `model` is always its `...ForObjectDetection`."""

    name: ClassVar[str]  # config.model_type
    model_class: ClassVar[Any]
    processor_class: ClassVar[Any]  # the image processor that works without torchvision
    many_maps: ClassVar[bool] = False  # reads `feature_levels` maps, not one
    refinement_optional: ClassVar[bool] = False  # `box_refinement` can be chosen
    masks_padding: ClassVar[bool] = True  # False: boxes come relative to the padded image, and padding is looked at
    classification: ClassVar[Classification] = (
        "focal"  # the class term of its training loss (qskd.losses.detection_loss)
    )
    no_object_rows: ClassVar[int] = 0  # rows of a class head after those of the classes
    num_early: ClassVar[int] = 0  # E, predictions before the decoder's layers that its training loss has
    denoises: ClassVar[bool] = False  # its own training adds denoising queries (qskd.losses.denoising)
    other_weights: ClassVar[tuple[str, ...]] = ()  # names that begin so are another task's, and are left out
    side_distributions: ClassVar[bool] = False  # its boxes are `SideDistributions`, with losses of their own
    query_kind: ClassVar[Literal["embedding", "boxes"]] = "embedding"  # what its `Queries` are
    query_has_state: ClassVar[bool] = False  # of "boxes": a query is more than its box
    projects_memory: ClassVar[bool] = True  # its decoder projects what it reads of the memory
    boxes_alone: ClassVar[bool] = False  # is no DETR: says boxes and classes, and no more
    asked_in_words: ClassVar[bool] = False  # finds what a prompt names; has no classes of its own

    # --- what it can do ---------------------------------------------------------------------------------------------
    def check(self, config: Any) -> None:  # noqa: B027
        """Raise QskdError for a configuration of transformers whose model can't be shown as a DetectorOutput."""

    def image_unit(self, config: Any) -> int:
        """What the sides of images are multiples of, in pixels: of a plain ViT whole patches, for it cuts off what is left over."""
        return patch_of(config.backbone_config)

    def check_size(self, config: Any, height: int, width: int) -> None:
        """Raise QskdError for a batch of images, padding included, of a size that the model can't take."""
        check_whole_patches(self.name, self.image_unit(config), height, width)

    def chooses_queries(self, config: Any) -> bool:
        """Whether queries are chosen in each image: a query's number then says nothing of what it asks."""
        return False

    def classes_replaceable(self, config: Any) -> bool:
        """Whether a student may start from this model with other classes than it has."""
        return True

    # --- where things are -------------------------------------------------------------------------------------------
    @abstractmethod
    def projections(self, model: Any) -> list[nn.Module]:
        """The modules that project backbone maps to the encoder's width, finest map first."""

    @abstractmethod
    def class_heads(self, model: Any) -> list[nn.Linear]:
        """Every linear layer that gives class logits (modules may share parameters)."""

    def memory_sources(self, model: Any) -> list[nn.Module]:
        """The modules whose outputs the decoder's cross-attention reads; `memory` makes maps of them."""
        return [model.model.encoder]

    def backbone(self, model: Any) -> nn.Module:
        """The part that learns at its own rate."""
        backbone: nn.Module = model.model.backbone
        return backbone

    def trunk(self, model: Any) -> nn.Module:
        """The network in `backbone` that a checkpoint of its own may hold: transformers' ...Backbone."""
        return self.backbone(model).get_submodule("model")

    def reading(self, model: Any) -> list[nn.Module]:
        """The modules whose inputs are as wide as the backbone's maps."""
        return self.projections(model)

    def strides(self, config: Any) -> tuple[int, ...] | None:
        """Pixels that a cell of each memory map is wide, finest first; None where the backbone's maps tell."""
        return None

    def decoder_layers(self, model: Any) -> list[nn.Module]:
        return list(model.model.decoder.layers)

    def self_attentions(self, model: Any) -> list[nn.Module]:
        """One module a decoder layer, where queries see each other."""
        return [layer.self_attn for layer in model.model.decoder.layers]

    def cross_attentions(self, model: Any) -> list[nn.Module]:
        """One module a decoder layer; called with keyword arguments, which `attention` receives."""
        return [layer.encoder_attn for layer in model.model.decoder.layers]

    def masked_attentions(self, model: Any) -> list[nn.Module]:
        """The modules that are given a mask of a map's cells, whose attention is dense (`qskd.detectors.forward.unasked`)."""
        return [] if self.many_maps else [model.model.encoder, model.model.decoder]

    def placing(self, model: Any) -> list[nn.Module]:
        """The modules that say where a box or a reference point is, and which queries are chosen: under autocast they run in
        float32 (`qskd.detectors.forward.exact`). Not those that only `predict` runs, which is in float32 as a whole."""
        return []

    # --- what it computes -------------------------------------------------------------------------------------------
    def memory(self, returned: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """What `memory_sources` returned -> maps [B, C, H, W], finest first. shapes: (H, W) of each projected map."""
        tokens = returned[0].last_hidden_state.transpose(1, 2)  # one encoder over the tokens of all maps
        parts = tokens.split([height * width for height, width in shapes], dim=2)
        return tuple(part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True))

    @abstractmethod
    def predict(self, model: Any, outputs: Any, layer_states: Sequence[Tensor]) -> Predictions:
        """The heads on every decoder layer, given the base model's outputs and each layer's own [B, Q, D]."""

    @abstractmethod
    def attention(
        self, module: Any, given: dict[str, Any], queries: Tensor, shapes: Sequence[tuple[int, int]], valid: Tensor
    ) -> Tensor:
        """Cross-attention [B, S, N] float32, mean over heads, of query indices `queries` [B, S] (all >= 0).

        module, given: a cross-attention module and the keyword arguments of its last call. shapes: (H, W) of each map,
        N = sum of H * W. valid: [B, N] bool, False on padding.
        """

    def query_embedding(self, model: Any) -> nn.Embedding | None:
        """What all of the queries is read from in a forward, one row a query: a longer one makes more queries. None where there
        is no such thing."""
        return None

    def group_parts(self, model: Any) -> GroupParts | None:
        """What of a query is not in `query_embedding`, of families whose own code has groups of queries."""
        return None

    def reference_points(self, model: Any) -> Tensor | None:
        """[Q, 2] x, y in 0..1 where queries first look, before any image; None where there is no such place."""
        return None

    def num_queries(self, config: Any) -> int:
        return int(config.num_queries)

    def memory_channels(self, config: Any) -> int:
        """Width of the memory maps."""
        return int(config.d_model)

    def feature_channels(self, config: Any) -> int:
        """Width of the projected backbone maps."""
        return self.memory_channels(config)

    # --- its decoder alone (qskd.detectors.decoding) ----------------------------------------------------------------
    def kind_of_queries(self, config: Any) -> Literal["embedding", "boxes"]:
        return self.query_kind

    @property
    def decodes(self) -> bool:
        """Whether its decoder can be run on a memory that it is given."""
        return type(self).decode is not Family.decode

    def own_queries(self, model: Any, memory: Memory) -> Queries:
        """Those that the model itself asks about this memory."""
        raise NotImplementedError(self.name)

    def decode(self, model: Any, memory: Memory, queries: Queries) -> Any:
        """The decoder run on a memory: outputs as `predict` reads them, without proposals."""
        raise NotImplementedError(self.name)

    def exchanged(self, model: Any, outputs: Any, states: Sequence[Tensor], before: Sequence[Tensor]) -> Any:
        """The outputs of `decode` with other states of its layers, each computed from what the layer before gave in `decode`
        (`before`); `predict` makes predictions of them that are relative to the same reference points."""
        return outputs

    def drop_front(self, model: Any) -> None:
        """Let go (in place) of all that comes before the memory."""
        inner = model.model
        inner.backbone, inner.encoder, inner.input_projection = nn.Identity(), nn.Identity(), nn.Identity()

    # --- making a student -------------------------------------------------------------------------------------------
    @abstractmethod
    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        """transformers' configuration for a student; `backbone` is a ResNetConfig whose out_features are set."""

    @abstractmethod
    def initialise(self, model: Any) -> None:
        """Start the detection parts of a random model where training gets going (in place)."""

    def place_queries(self, model: Any, first: int) -> None:  # noqa: B027
        """Spread the reference points of the queries from `first` on, which would all lie near its middle, over the image."""

    def drop_unused(self, model: Any) -> None:  # noqa: B027
        """Drop (in place) what no evaluation asks: all groups of queries but the first, of a model whose own training has more."""

    def for_one_size(self, model: Any, height: int, width: int) -> AbstractContextManager[None]:
        """Within it the model takes images of this size alone: what depends on the size alone is a constant in a graph."""
        embeddings: Any = getattr(self.trunk(model), "embeddings", None)
        fits = hasattr(embeddings, "interpolate_pos_encoding")
        return fixed_places(embeddings, height, width) if fits else nullcontext()

    def prepare_student(self, model: Any) -> None:  # noqa: B027
        """Freeze or drop (in place) what training never uses: DDP waits for the gradient of every parameter. Of random
        students and of those that start from a checkpoint alike."""

    def follow(self, model: Any, other: Any) -> str:
        """Take on (in place) what `other`'s decoder layers mean and no shape shows, before they are copied; else why it can't."""
        return ""

    def sizes(self, config: Any) -> dict[str, Any]:
        """StudentConfig field -> its value in a configuration of transformers, to tell a contradiction."""
        return {
            "family": config.model_type,
            "width": self.memory_channels(config),
            "encoder_layers": config.encoder_layers,
            "decoder_layers": config.decoder_layers,
            "heads": config.encoder_attention_heads,
            "ffn_width": config.encoder_ffn_dim,
            "queries": self.num_queries(config),
        }


def detr_sizes(config: StudentConfig, backbone: Any, labels: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments that the configurations of all DETR families share."""
    return {
        "backbone_config": backbone,
        "d_model": config.width,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.ffn_width,
        "decoder_ffn_dim": config.ffn_width,
        "num_queries": config.queries,
        "dropout": config.dropout_taken,
        "auxiliary_loss": False,  # True would change the forward pass of Conditional DETR
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def tokens_of(maps: Sequence[Tensor]) -> Tensor:
    """[B, C, H, W] each -> the cells of all, [B, N, C], one map after the other."""
    return torch.cat([map_.flatten(2) for map_ in maps], 2).transpose(1, 2)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)), bounded as transformers bounds it."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def shift_boxes(delta: Tensor, reference: Tensor) -> Tensor:
    """Box logits [..., 4] moved by reference points [..., 2] or boxes [..., 4] in 0..1 -> boxes in 0..1."""
    moved = inverse_sigmoid(reference)
    if moved.shape[-1] == 4:
        return (delta + moved).sigmoid()
    return torch.cat([delta[..., :2] + moved, delta[..., 2:]], dim=-1).sigmoid()


def head_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Dot products of queries [B, S, D] and keys [B, N, D], head by head: [B, heads, S, N]."""
    return torch.einsum("bshd,bnhd->bhsn", query.unflatten(-1, (heads, -1)), key.unflatten(-1, (heads, -1)))


def dense_attention(scores: Tensor, valid: Tensor) -> Tensor:
    """Scaled scores [B, heads, S, N], valid [B, N] -> attention [B, S, N], mean over heads, none of it on padding."""
    return scores.masked_fill(~valid[:, None, None], float("-inf")).softmax(-1).mean(1)


def linear32(module: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float32, whatever the precision of its weights and of `x`; of a quantised one with the weights that it
    uses."""
    weight = module.used_weight() if isinstance(module, QuantisedLinear) else module.weight
    return F.linear(x.float(), weight.float(), None if module.bias is None else module.bias.float())


def take(states: Tensor, queries: Tensor) -> Tensor:
    """Rows of [B, Q, ...] by index [B, S] -> [B, S, ...]."""
    index = queries.reshape(*queries.shape, *[1] * (states.dim() - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)
