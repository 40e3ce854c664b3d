"""A detector of transformers that is no DETR, seen as one: boxes and classes, and nothing that features could be learnt from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qskd.boxes import extent_wh
from qskd.checkpoints.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from qskd.detectors.detector import Detector
from qskd.detectors.forward.extra_queries import ExtraQueries
from qskd.families.detr import from_softmax
from qskd.families.table import find_family
from qskd.structures import DetectorOutput


class BoxesDetector(Detector):
    """YOLOS: one layer's logits and boxes; no maps, and no attention to them.

    Its sides are whole patches, and it has no mask for padding. Images of each size go through it by themselves, squeezed to whole
    patches, as its own image processor makes them: so no image sees another's padding, and boxes are relative to the image.
    """

    def __init__(self, model: Any) -> None:
        nn.Module.__init__(self)
        self.model, self.family = model, str(model.config.model_type)
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        self.inherited = frozenset()
        self._family = find_family(self.family, type(model).__name__)
        self.classification = self._family.classification
        self.num_queries = self._family.num_queries(model.config)
        self.num_layers, self.num_early = 1, 0
        self.chooses_queries = self._family.chooses_queries(model.config)
        self.memory_channels = self.feature_channels = ()
        self.layer_taps, self.placing, self._encoder_layers = [], [], []
        self.denoises = self.side_distributions = False
        self._compiled = None

    @property
    def memory_strides(self) -> tuple[int, ...]:
        return ()

    @property
    def query_width(self) -> int:
        return 0

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor,
        with_attention: bool = True,
        extra: ExtraQueries | None = None,
        least: tuple[int, int] | None = None,
    ) -> DetectorOutput:
        if extra is not None:
            raise ValueError(f"{self.family} takes no further queries")
        batch, unit = len(pixel_values), self._family.image_unit(self.model.config)
        sizes = [tuple(pixel_values.shape[-2:])] * batch
        if least != sizes[0]:  # else the host knows that none is padded
            real = extent_wh(pixel_mask).flip(-1)
            sizes = [(int(height), int(width)) for height, width in real.tolist()]
        found: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        for height, width in dict.fromkeys(sizes):
            self._family.check_size(self.model.config, height, width)
            own = [number for number, size in enumerate(sizes) if size == (height, width)]
            pixels = pixel_values[own, :, :height, :width]
            whole = height // unit * unit, width // unit * unit
            if whole != (height, width):
                pixels = F.interpolate(pixels, whole, mode="bilinear", antialias=True, align_corners=False)
            outputs = self.model.vit(pixels)
            states = outputs.last_hidden_state[:, -self.num_queries :].float()
            with torch.autocast(pixels.device.type, enabled=False):
                logits, none = from_softmax(self.model.class_labels_classifier(states))
                boxes = self.model.bbox_predictor(states).sigmoid()
            found |= {number: parts for number, *parts in zip(own, logits, none, boxes, states, strict=True)}  # type: ignore[misc]
        logits, none, boxes, states = (
            torch.stack(part) for part in zip(*(found[n] for n in range(batch)), strict=True)
        )
        return boxes_alone(logits, boxes, states, none)


def boxes_alone(logits: Tensor, boxes_cxcywh: Tensor, states: Tensor, no_object: Tensor | None) -> DetectorOutput:
    """[B, Q, K], [B, Q, 4], [B, Q, C] and [B, Q] of the one layer there is, without any map."""
    return DetectorOutput(
        logits=logits[None],
        boxes_cxcywh=boxes_cxcywh[None],
        memory=(),
        memory_valid=(),
        features=(),
        query_states=states,
        attend=nowhere,
        attend_mean=nowhere,
        no_object=None if no_object is None else no_object[None],
        attend_each=nowhere,
    )


def nowhere(queries: Tensor) -> tuple[Tensor, ...]:
    """It has no map to look at."""
    return ()
