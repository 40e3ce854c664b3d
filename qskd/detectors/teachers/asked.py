"""An open-vocabulary detector that has been asked for certain classes, seen as any other detector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.grounding_dino.modeling_grounding_dino import (
    generate_masks_with_special_tokens_and_transfer_map,
)

from qskd.detectors.detector import Detector
from qskd.detectors.forward.extra_queries import ExtraQueries
from qskd.detectors.forward.taps import listening
from qskd.detectors.teachers.prompt import Chunk, Prompt
from qskd.errors import QskdError
from qskd.structures import DetectorOutput

# Of a class that a query was not asked about, for its text was another: as good as certainly not, and small enough in every
# format that it may be subtracted from.
UNASKED_LOGIT = -20.0


class KnownText(nn.Module):
    """Stands for a text model that has been asked all that it will be: gives what it said of the chunk `at`."""

    def __init__(self, text_model: nn.Module, special: Tensor, chunks: Sequence[Chunk]) -> None:
        super().__init__()
        self.at = 0
        for number, chunk in enumerate(chunks):
            tokens = torch.tensor([chunk.tokens])
            masks, places = generate_masks_with_special_tokens_and_transfer_map(tokens, special)
            with torch.inference_mode(False), torch.no_grad():
                said = text_model(tokens, masks[:, None], torch.zeros_like(tokens), places, return_dict=True)
            self.register_buffer(f"tokens_{number}", tokens, persistent=False)
            self.register_buffer(f"states_{number}", said.last_hidden_state, persistent=False)

    def tokens(self) -> Tensor:
        """[1, T]."""
        tokens: Tensor = getattr(self, f"tokens_{self.at}")
        return tokens

    def forward(self, input_ids: Tensor, *_: Any, **__: Any) -> Any:
        states: Tensor = getattr(self, f"states_{self.at}")
        return SimpleNamespace(last_hidden_state=states.expand(len(input_ids), -1, -1))


@contextmanager
def once(module: Any) -> Iterator[None]:
    """Within it the module is run once, whatever it is given; then it says the same again."""
    run, said = module.forward, list[Any]()

    def known(*given: Any, **named: Any) -> Any:
        if not said:
            said.append(run(*given, **named))
        return said[0]

    module.forward = known
    try:
        yield
    finally:
        module.forward = run


class AskedDetector(Detector):
    """As `Detector`, with the classes that it was asked for. It can't be saved: its text model is gone.

    A class's logit is the largest of its tokens'. Where the classes fill more than one text (`prompt.chunks`), the whole detector
    runs once for each, and its answers stand one after another: `num_queries` are of all, each with `UNASKED_LOGIT` of the classes
    that its text did not name. The encoder sees the text too, so that each has a memory of its own: what is given is their mean,
    each attention is of its own.
    """

    def __init__(self, model: Any, prompt: Prompt) -> None:
        super().__init__(model)
        model.config.id2label = dict(enumerate(prompt.labels))
        self.prompt, self._own_queries = prompt, self.num_queries
        self.num_queries *= len(prompt.chunks)
        inner = model.model
        with torch.no_grad():
            self._text = KnownText(inner.text_backbone.eval(), inner.special_tokens, prompt.chunks)
        inner.text_backbone = self._text
        for number, chunk in enumerate(prompt.chunks):
            longest = max(end - begin for begin, end in chunk.spans)
            places = [[min(begin + step, end - 1) for step in range(longest)] for begin, end in chunk.spans]
            self.register_buffer(f"_places_{number}", torch.tensor(places), persistent=False)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor,
        with_attention: bool = True,
        extra: ExtraQueries | None = None,
        least: tuple[int, int] | None = None,
    ) -> DetectorOutput:
        height, width = pixel_values.shape[-2:]
        cells = sum(-(-height // stride) * -(-width // stride) for stride in self.memory_strides)
        if cells < self._own_queries:
            raise QskdError(
                self.family,
                f"images of {height} x {width} pixels, which give {cells} cells to choose {self._own_queries} queries from",
                "at least as many cells as queries",
                "set a larger teacher.resize",
            )
        return super().forward(pixel_values, pixel_mask, with_attention, extra, least)

    def _run(
        self, pixel_values: Tensor, pixel_mask: Tensor, with_attention: bool, extra: ExtraQueries | None
    ) -> DetectorOutput:
        if extra is not None:
            raise ValueError(f"{self.family} takes no further queries")
        parts = []
        with once(self.model.model.backbone):  # which sees no text
            for number in range(len(self.prompt.chunks)):
                self._text.at = number
                tokens = self._text.tokens().expand(len(pixel_values), -1)
                with listening(self.taps(with_attention)):
                    outputs = self.model.model(pixel_values, input_ids=tokens, pixel_mask=pixel_mask, return_dict=True)
                    said = self.read(outputs, pixel_mask, with_attention)
                parts.append(replace(said, logits=self._of_classes(said.logits, number)))
        return parts[0] if len(parts) == 1 else _joined(parts, self._own_queries)

    def _of_classes(self, logits: Tensor, number: int) -> Tensor:
        """[..., T] of a chunk's tokens -> [..., K] of all classes."""
        places: Tensor = getattr(self, f"_places_{number}")
        first = self.prompt.chunks[number].first
        asked = logits[..., places].amax(-1)
        if len(self.prompt.chunks) == 1:
            return asked
        said = asked.new_full((*asked.shape[:-1], len(self.prompt.labels)), UNASKED_LOGIT)
        said[..., first : first + len(places)] = asked
        return said


def _joined(parts: Sequence[DetectorOutput], queries: int) -> DetectorOutput:
    """The answers to several texts as one. queries: of each."""
    first, total = parts[0], queries * len(parts)

    def attend(ways: Sequence[Callable[[Tensor], tuple[Tensor, ...]]], asked: Tensor) -> tuple[Tensor, ...]:
        """Number n * total + i is query i of a layer: see `attention_of_each`."""
        found: list[Tensor] = []
        for number, way in enumerate(ways):
            layer, query = asked.div(total, rounding_mode="floor"), asked % total
            own = (asked >= 0) & (query.div(queries, rounding_mode="floor") == number)
            maps = way(torch.where(own, layer * total + query % queries, -1))
            found = [a + b for a, b in zip(found, maps, strict=True)] if found else list(maps)
        return tuple(found)

    maps = zip(*(part.memory for part in parts), strict=True)
    return replace(
        first,
        logits=torch.cat([part.logits for part in parts], 2),
        boxes_cxcywh=torch.cat([part.boxes_cxcywh for part in parts], 2),
        memory=tuple(torch.stack(level).mean(0) for level in maps),
        query_states=torch.cat([part.query_states for part in parts], 1),
        attend=partial(attend, [part.attend for part in parts]),
        attend_mean=partial(attend, [part.attend_mean for part in parts]),
        attend_each=partial(attend, [part.attend_each for part in parts if part.attend_each is not None]),
    )
