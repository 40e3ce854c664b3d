"""A detector's decoder and heads on a memory that is given: any queries, without pixels, backbone and encoder.

The decoder is transformers' own, called as the whole model calls it (`Family.decode`). So the model's own queries give the model's
own predictions, to rounding; `tests/test_decoding_memory.py` holds that for every family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qskd.detectors.detector import Detector
from qskd.detectors.forward.exact import exactly
from qskd.detectors.forward.parting import real_part, without_padding
from qskd.detectors.forward.taps import listening, not_kept
from qskd.detectors.forward.unasked import knowing
from qskd.families.family import Family, Memory, inverse_sigmoid, tokens_of
from qskd.families.table import FAMILIES
from qskd.structures import DetectorOutput, Queries


@dataclass(frozen=True)
class LayerCall:
    """How a decoder layer was called, and what it gave."""

    module: Any
    args: tuple[Any, ...]
    given: dict[str, Any]
    state: Tensor


@dataclass(frozen=True)
class Decoded:
    """What a decoder has said of a memory, asked `queries`, and all that `through_layers` needs to exchange the memory."""

    output: DetectorOutput
    queries: Queries
    outputs: Any
    memory: Memory
    calls: tuple[LayerCall, ...]


def decode(
    detector: Detector,
    maps: Sequence[Tensor],
    valid: Sequence[Tensor],
    queries: Queries | None = None,
    masked: bool = True,
    pixel_mask: Tensor | None = None,
) -> Decoded:
    """maps: [B, C, H, W], finest first, as `DetectorOutput.memory` has them; valid: [B, H, W] bool of each.

    queries: those to ask; the detector's own where there are none. masked: False where no cell is padding, which the host knows.
    pixel_mask: [B, H, W] bool, False on padding; needed only for families that do not mask padding (RT-DETR's kind), and there
    only if there is any: their maps must then hold what lies on it. The output has no features, no early predictions and no
    attention.
    """
    family, model = FAMILIES[detector.family], detector.model
    memory = Memory(tokens_of(maps), tuple((int(m.shape[-2]), int(m.shape[-1])) for m in maps), tuple(valid), masked)
    device = memory.tokens.device.type
    layers = detector.layer_taps
    if pixel_mask is not None and (family.masks_padding or not masked):
        pixel_mask = None
    if queries is not None and queries.places is not None and pixel_mask is not None:
        queries = replace(queries, places=inverse_sigmoid(queries.places.sigmoid() * real_part(pixel_mask)))
    with listening(layers), exactly(detector.placing, device), knowing([], None, model):
        asked = family.own_queries(model, memory) if queries is None else queries
        outputs = family.decode(model, memory, asked)
        calls = tuple(LayerCall(tap.module, tap.args, tap.given, tap.state) for tap in layers)
    output = _read(family, model, outputs, [call.state for call in calls], tuple(maps), tuple(valid), pixel_mask)
    return Decoded(output, asked, outputs, memory, calls)


def through_layers(detector: Detector, decoded: Decoded, maps: Sequence[Tensor]) -> DetectorOutput:
    """What each decoder layer says where the memory is another one, of the same shapes; every layer is given what it was given in
    `decoded`, its queries and reference points, so that no layer sees what another has made of the other memory."""
    family, model = FAMILIES[detector.family], detector.model
    others = tokens_of(maps)

    def exchanged(value: Any) -> Any:
        return others if value is decoded.memory.tokens else value

    states = []
    with exactly(detector.placing, others.device.type), knowing([], None, model):
        for call in decoded.calls:
            args, given = tuple(map(exchanged, call.args)), {key: exchanged(each) for key, each in call.given.items()}
            said = call.module(*args, **given)
            states.append(said[0] if isinstance(said, tuple) else said)
        outputs = family.exchanged(model, decoded.outputs, states, [call.state for call in decoded.calls])
    return _read(family, model, outputs, states, tuple(maps), decoded.memory.valid)


def _read(
    family: Family,
    model: Any,
    outputs: Any,
    states: Sequence[Tensor],
    maps: tuple[Tensor, ...],
    valid: tuple[Tensor, ...],
    pixel_mask: Tensor | None = None,
) -> DetectorOutput:
    with torch.autocast(maps[0].device.type, enabled=False):
        predictions = family.predict(model, outputs, states)
        if pixel_mask is not None:
            predictions = without_padding(replace(predictions, early_logits=(), early_boxes_cxcywh=()), pixel_mask)
    return DetectorOutput(
        logits=predictions.logits,
        boxes_cxcywh=predictions.boxes_cxcywh,
        memory=maps,
        memory_valid=valid,
        features=(),
        query_states=predictions.query_states,
        attend=not_kept,
        attend_mean=not_kept,
        no_object=predictions.no_object,
        sides=predictions.sides,
        attend_each=not_kept,
    )
