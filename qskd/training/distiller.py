"""Distillation beside a training loop of one's own: what a method adds to the loss of a transformers model.

The model runs as its owner runs it, and computes its own loss; hooks keep what its last forward went through, and from that
and the teacher the method's terms are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from qskd.boxes import extent_wh
from qskd.config import DetectionLossConfig, MethodSettings, ResizeConfig
from qskd.config.distillation import DEFAULT, settings_class
from qskd.datasets.classes import map_classes
from qskd.datasets.views import resized_size
from qskd.detectors import Detector, Preprocessing, load_detector, preprocessing_of, read_preprocessing, words_for
from qskd.detectors.decoding import decode
from qskd.detectors.forward.taps import Tap
from qskd.distillation.method import Lesson, Online, build_method
from qskd.distillation.shared.apart import matched, prediction
from qskd.errors import QskdError
from qskd.families.facts import TEACHERS_ONLY
from qskd.families.table import FAMILIES
from qskd.losses.detection_loss import combine
from qskd.losses.matching import assign
from qskd.structures import DetectorOutput, Queries, Targets, TeacherNeeds, TeacherRecord
from qskd.teacher.memory.basis import IMAGES
from qskd.teacher.memory.moments import Directions, Moments
from qskd.teacher.online import OnlineTeacher, facts_of
from qskd.training.query_groups import first_queries


@dataclass(frozen=True)
class DistillationLoss:
    """What to add to a step's loss. loss: the weighted sum, a scalar with gradient. terms: each term's value, unweighted and
    without gradient, still on the device."""

    loss: Tensor
    terms: dict[str, Tensor]


def load_teacher(
    path: str | Path,
    labels: Sequence[str],
    class_map: Mapping[str, str] | None = None,
    resize: ResizeConfig | None = None,
) -> OnlineTeacher:
    """A frozen teacher from a Hub name or folder with safetensors.

    labels: the student's classes, by slot; the teacher's are found by name, or by `class_map` (class: teacher's label). A teacher
    that is asked in words is asked for these.
    resize: other than its own image processor's. Raises QskdError.
    """
    detector = load_detector(path, words=words_for(labels, class_map))
    slots = map_classes(labels, detector.labels, class_map or {})
    return OnlineTeacher(detector, slots, read_preprocessing(path, resize))


def targets_of(labels: Sequence[Mapping[str, Any]], pixel_mask: Tensor) -> tuple[Targets, Tensor]:
    """transformers' labels of a batch -> targets, and [B, 4]: what its boxes are multiplied by on the way.

    labels: one mapping an image: "class_labels" [n], "boxes" [n, 4] (cx, cy, w, h in 0..1), and, as transformers' processors
    give it, "size" (height, width in pixels), which the boxes are relative to: of the padded batch, where they pad. Without it
    they are relative to the image. Targets are relative to the image. pixel_mask: [B, H, W] bool, False on padding.
    """
    device, batch = pixel_mask.device, len(labels)
    if batch != len(pixel_mask):
        raise QskdError("labels", f"of {batch} images", f"of the {len(pixel_mask)} images of pixel_values")
    real = extent_wh(pixel_mask).flip(-1).float()  # height, width
    said = [each.get("size") for each in labels]
    frames = [real[i] if size is None else torch.as_tensor(size, device=device).float() for i, size in enumerate(said)]
    scale = ((torch.stack(frames) if frames else real) / real).flip(1).repeat(1, 2)  # x, y, x, y
    counts = tuple(len(each["class_labels"]) for each in labels)
    boxes = torch.zeros(batch, max(counts, default=0), 4, device=device)
    classes = torch.zeros(boxes.shape[:2], dtype=torch.int64, device=device)
    for i, each in enumerate(labels):
        if counts[i]:
            boxes[i, : counts[i]] = torch.as_tensor(each["boxes"], device=device).float() * scale[i]
            classes[i, : counts[i]] = torch.as_tensor(each["class_labels"], device=device).long()
    slots = torch.arange(boxes.shape[1], device=device)
    valid = slots[None, :] < torch.tensor(counts, dtype=torch.int64, device=device)[:, None]
    ids = tuple(int(torch.as_tensor(each.get("image_id", i)).flatten()[0]) for i, each in enumerate(labels))
    return Targets(boxes, classes, valid, ids, counts), scale


class Distiller(nn.Module):
    """A distillation method for a student that someone else's loop trains.

        outputs = student(**batch)                         # as before: transformers' own loss
        loss = outputs.loss + distiller(batch).loss        # what the teacher has to say of the same batch

    student: a transformers detector (`...ForObjectDetection`) of a family that qskd knows, on its device. teacher: a Hub name
    or folder, or what `load_teacher` gives. processor: the image processor that makes the batches. method: settings of a
    distillation method, or its fields with "method" among them; QSKD with its defaults where none are given.
    total_steps: of the training, for a method's warm-up and decay; without it, its weights are constant. `step` counts calls
    in training mode; a loop that adds up the gradients of several batches sets it to its own number of steps before each call.
    look_at: batches like those of the loop, labels or not, of which the teacher is shown 256 images (whole batches, the first)
    before anything is trained: QSKD then weighs features by how its memory varies, as `qskd distill` does. Without: it doesn't.

    Its parameters (projectors from the student's width to the teacher's) belong into the optimizer; neither student nor teacher
    are among them. The student keeps hooks, and its own forward is unchanged. Its denoising queries, where its owner's loss has
    them, learn nothing of the teacher.
    Raises QskdError where this student can't learn from this teacher in this way.
    """

    def __init__(
        self,
        student: Any,
        teacher: str | Path | OnlineTeacher,
        processor: Any,
        *,
        method: MethodSettings | Mapping[str, Any] | None = None,
        class_map: Mapping[str, str] | None = None,
        total_steps: int | None = None,
        look_at: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        if (kind := student.config.model_type) in TEACHERS_ONLY:
            expected = f"a detector of {', '.join(FAMILIES)}"
            raise QskdError("student", f"a {TEACHERS_ONLY[kind]}, which can only teach", expected)
        auxiliary = getattr(student.config, "auxiliary_loss", False)
        detector = Detector(student)
        student.config.auxiliary_loss = auxiliary  # its owner's loss is its owner's business
        if not isinstance(teacher, OnlineTeacher):
            teacher = load_teacher(teacher, detector.labels, class_map)
        self.settings = _settings(method)
        self.preprocessing = processor if isinstance(processor, Preprocessing) else preprocessing_of(processor)
        self.total_steps, self.step = total_steps, 0
        self.costs = DetectionLossConfig()
        # Not registered: an optimizer, or a checkpoint, of this module is to have the method's own parts alone.
        self._others = (detector, teacher)
        device = next(student.parameters()).device
        teacher.to(device)
        if look_at is not None:
            teacher.directions = self._directions(look_at, device)
        built = build_method(self.settings, facts_of(detector, self.preprocessing.resize), teacher.facts)
        if built is None:
            raise QskdError(
                "method", "none", "a distillation method", "leave the distiller out to train without a teacher"
            )
        self.method = built
        self._base = Tap(student.model)
        student.register_forward_pre_hook(self._listen)
        self._decoder = teacher.decoder if built.needs.decoder else None
        self._device: torch.device | None = None
        self.follow(device)

    @property
    def student(self) -> Detector:
        return self._others[0]

    @property
    def teacher(self) -> OnlineTeacher:
        return self._others[1]

    def follow(self, device: torch.device) -> None:
        """Move the method's parts and the teacher there, if they are elsewhere. Each call of the distiller does, to its batch: the
        student may have been moved since (transformers' Trainer moves the model alone)."""
        if device == self._device:
            return
        self.to(device)
        for part in (self.teacher, self._decoder):
            if part is not None:
                part.to(device)
        self._device = device

    def _taps(self) -> Iterator[Tap]:
        yield from (self._base, *self.student.taps(self.method.reads_attention))

    def _listen(self, student: nn.Module, _: Any) -> None:
        """Before each forward: keep what a training one goes through, and nothing of an evaluation."""
        for tap in self._taps():
            tap.start(student.training)

    def forward(self, batch: Mapping[str, Any]) -> DistillationLoss:
        """The method's terms for the batch that the student has just seen, in training mode.

        batch: "pixel_values" [B, 3, H, W] float and "pixel_mask" [B, H, W] (all ones where it is missing), as the processor
        makes them; "labels", see `targets_of`. Raises QskdError when the student has not seen it.
        """
        pixels, mask = _pictures(batch)
        self.follow(pixels.device)
        targets, scale = targets_of(batch["labels"], mask)
        student = self._heard(mask, scale)
        if len(student.logits[-1]) != len(pixels):
            raise QskdError("distiller", f"a batch of {len(pixels)} images", "the one that the student has just seen")
        images, sizes = self._as_teacher_sees(pixels, mask)
        record: TeacherRecord = self.teacher(images, sizes, self.method.needs)
        online = Online(self.teacher, images, sizes) if self.method.needs.online else None
        kind = self.student.classification
        sides = [(student.logits, student.boxes_cxcywh), prediction(record)]
        own, theirs = assign(sides, targets, self.costs, [kind])
        theirs = matched(record, theirs, targets)
        ask = partial(self._ask, student, mask, scale)
        terms = self.method(Lesson(student, record, targets, own, theirs, online, self._decoder, ask, costs=self.costs))
        weights = self.method.weights
        if self.total_steps is not None:
            weights = self.method.weights_at(min(self.step, self.total_steps - 1), self.total_steps)
        self.step += self.training
        values = {name: term.total.detach() / term.own_count.clamp(min=term.floor) for name, term in terms.items()}
        return DistillationLoss(combine(terms, weights), values)

    @torch.no_grad()
    def _directions(self, batches: Iterable[Mapping[str, Any]], device: torch.device) -> tuple[Directions, ...]:
        moments, seen = Moments(self.teacher.facts.channels), 0
        for batch in batches:
            pixels, mask = (part.to(device) for part in _pictures(batch))
            record = self.teacher(*self._as_teacher_sees(pixels, mask), TeacherNeeds(memory=True))
            moments.add_maps(record.memory, record.memory_valid)
            seen += len(pixels)
            if seen >= IMAGES:
                break
        if not seen:
            raise QskdError("look_at", "no batch", "batches as of the loop, 256 images of which are looked at")
        return moments.directions()

    def _ask(self, student: DetectorOutput, mask: Tensor, scale: Tensor, queries: Queries) -> DetectorOutput:
        """What the student's decoder says of the batch when it is asked these."""
        own = next(self.student.parameters()).dtype
        memory = [each.to(own) for each in student.memory]
        output = decode(self.student, memory, student.memory_valid, queries, pixel_mask=mask).output
        return self._in_frame(_in_float32(output), scale)

    def _in_frame(self, output: DetectorOutput, scale: Tensor) -> DetectorOutput:
        """With boxes relative to the image. scale: as of `targets_of`."""
        if not self.student.masks_padding:
            return output  # it is relative to the image already
        # Its owner's loss teaches such a student boxes of the frame that the labels' are of.
        return replace(output, boxes_cxcywh=output.boxes_cxcywh * scale[None, :, None])

    def _heard(self, mask: Tensor, scale: Tensor) -> DetectorOutput:
        """The student's last forward; forgotten by this. scale: as of `targets_of`."""
        taps = list(self._taps())
        outputs = self._base.returned
        try:
            if outputs is None:
                raise QskdError(
                    "distiller",
                    "the student has not run since the last call, or not in training mode",
                    "a forward of the student on the same batch before each call",
                    "call student(**batch) first; student.train()",
                )
            output = self.student.read(outputs, mask, self.method.reads_attention)
            if output.logits.shape[2] > self.student.num_queries:  # groups that only training has (LW-DETR)
                output = first_queries(output, self.student.num_queries)
            if not torch.is_autocast_enabled(mask.device.type):  # it was around the student's forward alone
                output = _in_float32(output)
        finally:
            for tap in taps:
                tap.start(False)
        return self._in_frame(output, scale)

    @torch.no_grad()
    def _as_teacher_sees(self, pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's pictures for the teacher: uint8 [B, H, W, 3], padded, and their sizes [B, 2]."""
        own = self.preprocessing
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (own.mean, own.std))
        plain = 255 * (pixels.float() * std + mean)
        sizes = extent_wh(mask).flip(-1)
        if self.teacher.resize != own.resize:
            pictures = []
            for picture, (height, width) in zip(plain, sizes.tolist(), strict=True):
                wanted = resized_size(height, width, self.teacher.resize)
                real = picture[None, :, :height, :width]
                pictures.append(F.interpolate(real, wanted, mode="bilinear", antialias=True, align_corners=False)[0])
            sizes = torch.tensor([picture.shape[1:] for picture in pictures], device=pixels.device)
            high, wide = sizes.max(0).values.tolist()
            plain = torch.stack([F.pad(p, (0, wide - p.shape[2], 0, high - p.shape[1])) for p in pictures])
        return plain.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous(), sizes


def _in_float32(output: DetectorOutput) -> DetectorOutput:
    """What came in half precision, as a loss outside autocast needs it."""

    def whole(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(whole, value))
        return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value

    return replace(output, **{each.name: whole(getattr(output, each.name)) for each in fields(output)})


def _pictures(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """A batch's pixels and their mask, bool: all ones where it has none."""
    pixels = batch["pixel_values"]
    mask = batch.get("pixel_mask")
    mask = torch.ones(pixels.shape[0], *pixels.shape[-2:], device=pixels.device) if mask is None else mask
    return pixels, mask.bool()


def _settings(method: MethodSettings | Mapping[str, Any] | None) -> MethodSettings:
    if isinstance(method, MethodSettings):
        return method
    given = dict(method or {})
    try:
        return settings_class(str(given.get("method", DEFAULT))).model_validate(given)
    except ValidationError as error:
        raise QskdError("method", str(error), "the fields of that method's settings (docs/recipe.md)") from None
