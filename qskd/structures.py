"""The values that flow between the rooms: targets, a detector's output, what a teacher said, a loss term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from qskd.errors import QskdError

T = TypeVar("T")


def to_device(value: T, device: torch.device | str, non_blocking: bool = True) -> T:
    """Move every tensor in a dataclass, tuple, dict or tensor to `device`, one that is there twice once; leave the rest."""
    there: dict[int, Tensor] = {}

    def move(item: Any) -> Any:
        if isinstance(item, Tensor):
            if id(item) not in there:
                there[id(item)] = item.to(device, non_blocking=non_blocking)
            return there[id(item)]
        if isinstance(item, tuple):
            return tuple(move(part) for part in item)
        if isinstance(item, dict):
            return {name: move(part) for name, part in item.items()}
        if hasattr(item, "__dataclass_fields__"):
            return replace(item, **{each.name: move(getattr(item, each.name)) for each in fields(item)})
        return item

    moved: T = move(value)
    return moved


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in a dataclass, tuple, dict or tensor, each once."""
    found: dict[int, Tensor] = {}

    def look(item: Any) -> None:
        if isinstance(item, Tensor):
            found[id(item)] = item
        elif isinstance(item, tuple):
            for part in item:
                look(part)
        elif isinstance(item, dict):
            look(tuple(item.values()))
        elif hasattr(item, "__dataclass_fields__"):
            look(tuple(getattr(item, each.name) for each in fields(item)))

    look(value)
    return list(found.values())


class OnItsWay:
    """A tensor being copied to the host behind whatever its device has been given to do before; nobody waits meanwhile."""

    def __init__(self, values: Tensor) -> None:
        # Of a GPU's: into pinned memory. Of other accelerators' nothing says when it has arrived, so that one waits for it here.
        self._host = values.detach().to("cpu", non_blocking=values.is_cuda)
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived is not None:  # in the stream of the tensor's own device, which need not be the current one
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> Tensor:
        """On the host. Waits for what the device was given before the copy, not for what it was given since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch, padded to the batch's largest number of objects M (which may be 0). Crowds are left out.

    boxes_cxcywh: [B, M, 4] float32, relative to the view (0..1); zeros in the padding.
    labels: [B, M] int64, contiguous class indices 0..K-1; 0 in the padding.
    valid: [B, M] bool, False in the padding. Valid objects come first.
    image_ids: the dataset's ids, on the host.
    counts: objects per image, on the host, so that nothing has to wait for the device to know them.
    labelled: on the host, False for an image of which nobody has said what is in it; empty: all are labelled. Such an image's
    objects are pseudo-objects, once the teacher was asked (`qskd.teacher.pseudo`).
    unsure_xyxy: [B, U, 4], boxes (0..1) of what the teacher half sees there: what lies in them is neither an object nor
    background. unsure: [B, U] bool, False in the padding. None: there is no such image.
    packed: image and slot of each of the N objects, [N] int64 each; made of `counts` by whoever needs them and has them not.
    """

    boxes_cxcywh: Tensor
    labels: Tensor
    valid: Tensor
    image_ids: tuple[int, ...]
    counts: tuple[int, ...]
    labelled: tuple[bool, ...] = ()
    unsure_xyxy: Tensor | None = None
    unsure: Tensor | None = None
    packed: tuple[Tensor, Tensor] | None = None

    @property
    def all_labelled(self) -> bool:
        return all(self.labelled)


# How a detector's classes are trained and matched: a sigmoid each, or one softmax with "no object".
Classification = Literal["focal", "varifocal", "matchability", "iou_aware", "softmax"]

# What a teacher's record has for a class that it knows nothing of (`teacher.class_map: {NAME: null}`): finite in half precision
# too, and no detector's own.
SILENT_LOGIT = -10_000.0

# Query indices [B, S] (int64, -1 = nothing) -> one attention map per memory level, each [B, S, H, W], float32, mean over
# heads. A query's weights sum to 1 over all its levels and positions; rows of -1 are zero.
Attend = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class SideDistributions:
    """Where the four sides of a box lie, as a distribution over bins each: D-FINE's boxes.

    logits: of each decoder layer [B, Q, 4 * (N + 1)], sides in the order left, top, right, bottom.
    about_cxcywh: [B, Q, 4], the boxes that the sides are measured from, without gradient.
    values: [N + 1], rising, what each bin says: its side lies (scale / 2 + value) * size / scale from the middle of its box
        in `about_cxcywh`, where size is that box's width or height. scale: a scalar, or [1].
    """

    logits: tuple[Tensor, ...]
    about_cxcywh: Tensor
    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class ExtraPredictions:
    """What became of queries that were added to a training step: the fields of `DetectorOutput`, of these queries alone.
    There is no proposal of the encoder among their early predictions."""

    logits: Tensor
    boxes_cxcywh: Tensor
    early_logits: Tensor | None = None
    early_boxes_cxcywh: Tensor | None = None
    sides: SideDistributions | None = None


@dataclass(frozen=True)
class DetectorOutput:
    """What any family's detector says about a batch of B images, with Q queries, K classes and L decoder layers.

    logits: [L, B, Q, K], in the model's own class order; last layer last. In every family sigmoid(logit) is the
        probability of the class; where classes share a softmax, logits are made so that it is.
    boxes_cxcywh: [L, B, Q, 4] in 0..1, relative to the image without its padding.
    memory: the maps the decoder's cross-attention reads, [B, C, H, W], finest first; one for single-scale families.
    memory_valid: [B, H, W] bool for each map, False on padding.
    features: the projected backbone maps the encoder was given, [B, C', H, W], of the sizes of `memory`'s first maps.
    query_states: [B, Q, D], the last decoder layer's, after its norm.
    attend: last-layer cross-attention of the queries asked for, recomputed from what the layer was given, so that the
        fast attention kernel stays on. `attend_mean` is the same, averaged over the decoder's layers; `attend_each` is any
        layer's: a query's number is there as in `TeacherRecord.attention_queries`.
    no_object: [L, B, Q] log-probability that a query shows nothing, of families whose classes share a softmax with it.
    early_logits, early_boxes_cxcywh: [E, B, Q, K], [E, B, Q, 4], what is predicted before the decoder's layers have their
        say: the encoder's chosen proposals, initial boxes. Its own training loss needs them; they are never distilled.
    sides: of families whose boxes are distributions.
    extra: of queries that were added for this step (`qskd.detectors.forward.extra_queries`), which nothing else here has.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    memory: tuple[Tensor, ...]
    memory_valid: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    query_states: Tensor
    attend: Attend
    attend_mean: Attend
    no_object: Tensor | None = None
    early_logits: Tensor | None = None
    early_boxes_cxcywh: Tensor | None = None
    sides: SideDistributions | None = None
    extra: ExtraPredictions | None = None
    attend_each: Attend | None = None


@dataclass(frozen=True)
class TeacherRecord:
    """What the teacher said about a batch, raw (no groups) and in the dataset's class order; from the cache or online.

    logits: [L', B, Q, K]; L' is 1 (the last layer) unless a method asked for all layers. `SILENT_LOGIT` throughout for
        a class that the teacher says nothing of (`silent`).
    boxes_cxcywh: [L', B, Q, 4].
    memory: maps [B, C, H, W], finest first; empty when no method asked for them.
    memory_valid: [B, H, W] bool for each.
    attention_queries: [B, A] int64, the queries whose attention is known, -1 = none. Holds at least every query whose
        GIoU with some object reaches the floor that was asked for. Where every layer's attention was asked for, query i
        of the layer n before the last is numbered n * Q + i: numbers below Q are the last layer's.
    attention: [B, A, H, W] for each memory map; a query sums to 1 over all of the teacher's maps.
    extra: what further columns hold, by their names (`qskd.teacher.columns`), [B, ...] each.
    derived: [B] bool, whether it was said of another view of the image, and made into one of this (`data.views.derived`); None
        where nothing was.
    absent: [L', B, Q] bool, queries that a derived crop has dropped: they say `SILENT_LOGIT` of every class, and are of no object;
        None where nothing was cropped.
    parts: of several teachers (`qskd.distillation.shared.apart`) how many queries and maps each has, one after another; empty: it
        is of one.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    memory: tuple[Tensor, ...] = ()
    memory_valid: tuple[Tensor, ...] = ()
    attention_queries: Tensor | None = None
    attention: tuple[Tensor, ...] = ()
    extra: dict[str, Tensor] = field(default_factory=dict)
    derived: Tensor | None = None
    absent: Tensor | None = None
    parts: tuple[tuple[int, int], ...] = ()

    @property
    def silent(self) -> Tensor:
        """[K] bool: the classes that the teacher says nothing of, and teaches nothing of."""
        return (self.logits <= SILENT_LOGIT / 2).flatten(0, -2).all(0)

    def matched(self, assignment: Tensor) -> Tensor:
        """[L', B, M], the query of each object -> the same, -1 for those that only an absent query was left for."""
        if self.absent is None:
            return assignment
        return assignment.masked_fill(self.absent.gather(2, assignment.clamp(min=0)), -1)


@dataclass(frozen=True)
class TeacherNeeds:
    """What a distillation method wants of the teacher; the cache reader loads these columns only.

    attention_giou_floor: attention is wanted of queries with at least this GIoU with some object (and of the matched ones).
    columns: further columns of the cache, by name. directions: of the memory, from beside the cache: by its variance, or by what
    moves the decoder. online: the teacher itself is asked in every step, which no cache can stand for. reasons: for a need that a
    cache may fail, by the name of its field here: (the field of the method's section that causes it, in words what it asks for).
    decoder: the teacher's decoder and heads are asked in every step, about the memory of the record (which `memory` asks for): no
    pixels are needed.
    attended: the memory is looked at only where the attention that is asked for reaches.
    """

    memory: bool = False
    attention: bool = False
    attention_layers: str = "last"  # or "mean", "all"
    all_layers: bool = False
    attention_giou_floor: float = 1.0
    columns: frozenset[str] = frozenset()
    directions: str = ""  # or "variance", "decoder"
    online: bool = False
    decoder: bool = False
    attended: bool = False
    reasons: Mapping[str, tuple[str, str]] = field(default_factory=dict, compare=False)

    def joined(self, other: TeacherNeeds) -> TeacherNeeds:
        """What serves both. QskdError where nothing can."""
        both = {each.attention_layers for each in (self, other) if each.attention}
        if len(both) > 1 and "mean" in both:  # "all" holds the last one too
            raise QskdError(
                "distillation",
                f"methods that want the attention of the {self.attention_layers} and of the {other.attention_layers} layer(s)",
                "methods that read the same attention",
                "set attention_layers alike",
            )
        ways = {each.directions for each in (self, other)} - {""}
        if len(ways) > 1:
            raise QskdError(
                "distillation",
                f"methods that weigh memory by {' and by '.join(sorted(ways))}",
                "one way for all",
                "set features.whitened_by alike",
            )
        lower = self if self.attention_giou_floor <= other.attention_giou_floor else other
        reasons = {**other.reasons, **self.reasons}
        if "attention_giou_floor" in lower.reasons:
            reasons["attention_giou_floor"] = lower.reasons["attention_giou_floor"]
        return TeacherNeeds(
            memory=self.memory or other.memory,
            attention=self.attention or other.attention,
            attention_layers="all" if "all" in both else min(both, default="last"),
            all_layers=self.all_layers or other.all_layers,
            attention_giou_floor=lower.attention_giou_floor,
            columns=self.columns | other.columns,
            directions=max(ways, default=""),
            online=self.online or other.online,
            decoder=self.decoder or other.decoder,
            attended=all(each.attended for each in (self, other) if each.memory),
            reasons=reasons,
        )


@dataclass(frozen=True)
class Queries:
    """What a decoder is asked, by its family's `query_kind`. A first dimension of 1 is every image's.

    embedding: [1 or B, N, E], of families whose queries are rows of an embedding ("embedding").
    places: [1 or B, N, 4], of families whose queries are boxes ("boxes"): cx, cy, w, h before the sigmoid, relative to the image.
    states: [1 or B, N, D], what the first layer is given beside the boxes; None: zeros.
    """

    embedding: Tensor | None = None
    places: Tensor | None = None
    states: Tensor | None = None


@dataclass(frozen=True)
class LossTerm:
    """A sum and what to divide it by, kept apart so that several workers can average the divisor before dividing.

    total: scalar with gradient. count: scalar without one (numbers of boxes, pairs, images). The term's value is
    total / max(mean of count over workers, floor / workers): as on one worker with the whole batch.
    rest: a second count, of what another term takes. Two means are then added with the weights sqrt(count) and sqrt(rest), over
    their sum (D-FINE's DDF); `with_rest` gives the divisor that does this, of both counts averaged over workers.
    objects: where the count is a multiple of the number of objects, how many times it counts each; 0: it counts something else.
    """

    total: Tensor
    count: Tensor
    floor: float = 1.0
    rest: Tensor | None = None
    objects: float = 0.0

    @property
    def own_count(self) -> Tensor:
        """What the total is divided by on one worker, but for the floor."""
        return self.count if self.rest is None else with_rest(self.count, self.rest)


def with_rest(count: Tensor, rest: Tensor) -> Tensor:
    """total / count * root(count) / (root(count) + root(rest)) is total / this."""
    return count + (count * rest).sqrt()
