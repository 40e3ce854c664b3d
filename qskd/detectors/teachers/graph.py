"""A detector in an ONNX file, run by onnxruntime and seen as any other: boxes and classes, and nothing besides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qskd.boxes import extent_wh
from qskd.checkpoints.graphs import Graph
from qskd.checkpoints.json_files import first_line
from qskd.detectors.forward.extra_queries import ExtraQueries
from qskd.detectors.teachers.answers import as_batch, check_boxes, check_logits
from qskd.detectors.teachers.asked import UNASKED_LOGIT
from qskd.detectors.teachers.boxes import BoxesDetector, boxes_alone
from qskd.detectors.teachers.session import open_session
from qskd.errors import QskdError
from qskd.families.detr import from_softmax
from qskd.structures import SILENT_LOGIT, DetectorOutput

Floats = NDArray[np.float32]
Size = tuple[int, int]  # width and height
# logits [Q, K], boxes_cxcywh [Q, 4] and, of a softmax, log-probability of none [Q]
Said = tuple[Floats, Floats, Floats | None]
GREY = 114 / 255  # what ultralytics puts around a picture
_SURE = 1e-6  # a score of 0 or 1 has no finite logit


class _Graph(nn.Module):
    """Stands where other detectors have a model of transformers. It has no numbers: its weights are onnxruntime's."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph, self.config = graph, graph.config
        self.at = nn.Parameter(torch.empty(0), requires_grad=False)  # the device that images come from


class GraphDetector(BoxesDetector):
    """What a graph says of pictures, in `DetectorOutput`'s terms; computed on the CPU, wherever the pictures are.

    Where it says boxes, scores and labels, a box is a query, the best first, and the score is its class's probability; of equal
    boxes each one's in its class. Of other classes it says `UNASKED_LOGIT`. An image has as many queries as the graph may give
    boxes; those that it did not give say `SILENT_LOGIT` of every class.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(_Graph(graph))
        self.graph = graph
        self._session = open_session(
            Path(graph.file).expanduser(), torch.get_num_threads(), remedy="export it again, for this onnxruntime"
        )
        self._half = any(each.type == "tensor(float16)" for each in self._session.get_inputs())

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
        device, batch = pixel_values.device, len(pixel_values)
        pixels = pixel_values.detach().float().cpu().numpy()
        sizes = [(height, width) for width, height in extent_wh(pixel_mask).tolist()]
        pictures, corners = [], []
        for image, (height, width) in zip(pixels, sizes, strict=True):
            picture, corner = self._framed(image[:, :height, :width])
            pictures.append(picture)
            corners.append(corner)
        found: dict[int, Said] = {}
        for size in dict.fromkeys(picture.shape for picture in pictures):
            own = [number for number, picture in enumerate(pictures) if picture.shape == size]
            for part in self._batches(own):
                said = self._ask(np.stack([pictures[number] for number in part]))
                scales = np.array([[*corners[n], *sizes[n][::-1]] for n in part], np.float32)
                found |= dict(zip(part, self._read(said, scales, (size[2], size[1])), strict=True))
        parts = zip(*(found[number] for number in range(batch)), strict=True)
        logits, boxes, none = (torch.from_numpy(np.stack(part)).to(device) for part in parts)
        states = logits.new_zeros(batch, self.num_queries, 0)
        return boxes_alone(logits, boxes, states, none if self.graph.softmax else None)

    def _framed(self, image: Floats) -> tuple[Floats, tuple[int, int]]:
        """An image as the graph takes it, and where in it its left top corner lies (x, y)."""
        height, width = image.shape[-2:]
        side = self.graph.side
        words = self.graph.words
        if words is None or not self.graph.letterbox:
            if side is not None and (height, width) != (side, side):
                raise QskdError(
                    self.graph.file, f"an image of {height} x {width} pixels", f"{side} x {side}", "leave the size out"
                )
            return image, (0, 0)
        side = words.size or side or max(height, width)
        # By DETR's rule a picture whose shorter side needs no change may be a pixel longer.
        image = image[:, :side, :side]
        height, width = image.shape[-2:]
        left, top = round((side - width) / 2 - 0.1), round((side - height) / 2 - 0.1)
        grey = (GREY - np.array(words.mean)) / np.array(words.std)
        framed = np.tile(grey.astype(np.float32)[:, None, None], (1, side, side))
        framed[:, top : top + height, left : left + width] = image
        return framed, (left, top)

    def _batches(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        """Images of one size, as many at a time as the graph takes."""
        graph = self.graph
        most = graph.batch or len(numbers) if graph.rank == 4 and graph.batched else 1
        for first in range(0, len(numbers), most):
            yield numbers[first : first + most]

    def _ask(self, pictures: Floats) -> list[Floats]:
        """The outputs, in the form's order, each with a batch in front. pictures: [b, 3, h, w]."""
        graph, count = self.graph, len(pictures)
        full = pictures
        if graph.rank == 4 and graph.batch and count < graph.batch:  # a graph of a fixed batch wants it full
            full = np.concatenate([pictures, np.repeat(pictures[-1:], graph.batch - count, axis=0)])
        given: dict[str, Any] = {graph.given: full.astype(np.float16 if self._half else np.float32, copy=False)}
        if graph.rank == 3:
            given[graph.given] = given[graph.given][0]
        if graph.sizes_input:  # boxes in pixels of what it sees
            given[graph.sizes_input] = np.tile(np.array([pictures.shape[:1:-1]], np.int64), (len(full), 1))
        try:
            said = self._session.run(list(graph.outputs), given)
        except Exception as error:
            shape = " x ".join(map(str, full.shape))
            raise QskdError(graph.file, f"onnxruntime fails on images {shape}: {first_line(error)}") from error
        return [each[:count] for each in as_batch(graph, said, len(full))]

    def _read(self, said: Sequence[Floats], frames: Floats, size: Size) -> Iterator[Said]:
        """Of each image. frames: [b, 4], left, top, width and height of the image in what the graph has seen, of this size."""
        graph = self.graph
        if graph.form == "logits":
            logits, boxes = said
            check_logits(graph, logits, boxes)
            none = np.zeros(logits.shape[:2], np.float32)
            if graph.softmax:
                logits, none = (each.numpy() for each in from_softmax(torch.from_numpy(logits)))
            for number, frame in enumerate(frames):
                seen = _relative(self._corners(boxes[number], size), frame)
                yield logits[number], _as_cxcywh(seen), none[number]
            return
        boxes, scores, labels = said[0][..., :4], said[0][..., -2 if graph.form == "rows" else -1], said[-1]
        if graph.form == "rows":
            labels = labels[..., 5]
        elif graph.form == "detections":
            scores = said[1]
        check_boxes(graph, boxes, scores, labels)
        for number, frame in enumerate(frames):
            yield self._queries(boxes[number], scores[number], labels[number], frame, size)

    def _queries(self, boxes: Floats, scores: Floats, labels: Floats, frame: Floats, size: Size) -> Said:
        """Of one image."""
        corners = np.asarray(np.clip(_relative(self._corners(boxes, size), frame), 0, 1), np.float32)
        there = (scores > 0) & (corners[:, 2:] > corners[:, :2]).all(1)
        logits = np.full((self.num_queries, len(self.graph.labels)), SILENT_LOGIT, np.float32)
        seen = np.tile(np.array([0.5, 0.5, 0, 0], np.float32), (self.num_queries, 1))
        queries = dict[bytes, int]()
        sure = np.clip(scores.astype(np.float64), _SURE, 1 - _SURE)
        for row in np.flatnonzero(there)[np.argsort(-scores[there], kind="stable")]:
            query = queries.setdefault(corners[row].tobytes(), len(queries))
            if query >= self.num_queries:
                break
            if logits[query, 0] == SILENT_LOGIT:
                logits[query], seen[query] = UNASKED_LOGIT, _as_cxcywh(corners[row])
            label = int(labels[row])
            logits[query, label] = max(logits[query, label], np.log(sure[row] / (1 - sure[row])))
        return logits, seen, np.zeros(self.num_queries, np.float32)

    def _corners(self, boxes: Floats, size: Size) -> Floats:
        """Boxes as the graph writes them -> xyxy in pixels of what it has seen."""
        if self.graph.units == "relative":
            boxes = np.asarray(boxes * np.tile(np.array(size, np.float32), 2), np.float32)
        first: Floats = boxes[..., :2]
        second: Floats = boxes[..., 2:4]
        if self.graph.boxes == "xywh":
            second = first + second
        elif self.graph.boxes == "cxcywh":
            first, second = np.asarray(first - second / 2), np.asarray(first + second / 2)
        return np.concatenate([first, second], -1)


def _relative(corners: Floats, frame: Floats) -> Floats:
    """xyxy in pixels of what the graph has seen -> shares of the image that lies at `frame` in it."""
    corner, size = np.tile(frame[:2], 2), np.tile(frame[2:], 2)
    return np.asarray((corners - corner) / size, np.float32)


def _as_cxcywh(corners: Floats) -> Floats:
    first, second = corners[..., :2], corners[..., 2:]
    return np.concatenate([(first + second) / 2, second - first], -1)
