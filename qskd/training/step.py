"""One training step and its state, free of Ray: testable with a plain list of batches.

One DistributedDataParallel wraps all that has gradients (`qskd.training.module`).
Terms are sums with counts; the counts of all terms are averaged over workers in one collective, which makes a run on two
workers equal a run on one at the same global batch. Denoising queries need one number more, which hosts exchange before the
step: the most objects that an image of the global batch has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qskd.config import Config
from qskd.datasets.batch import TrainBatch
from qskd.detectors import Detector
from qskd.distillation.method import Online
from qskd.distillation.shared.unfaded import boosts_of
from qskd.errors import QskdError
from qskd.losses.denoising import Noise, draw_noise
from qskd.losses.detection_loss import combine_with_values
from qskd.precision import autocast, laid_out_as
from qskd.quantization.stages import Stages
from qskd.structures import LossTerm, OnItsWay, Targets, TeacherRecord, to_device
from qskd.teacher.cached import Teacher
from qskd.teacher.pseudo import with_pseudo_objects
from qskd.training.augmentation.student import augmentation_of
from qskd.training.compiling import compile_step
from qskd.training.evaluation_weights import EvaluationWeights
from qskd.training.groups import learning_rate_factor, parameter_groups
from qskd.training.module import StepModule
from qskd.training.norms import put_right, share_statistics
from qskd.training.sharing import mean_counts, most_of_all
from qskd.training.stand_in import stand_in


class Training:
    """A student in training: step module, optimiser, moving average, and the number of steps taken.

    The same seed, batches and world size give the same weights bit for bit on a CPU, also across `state` / `load_state`.
    """

    def __init__(
        self, config: Config, student: Detector, teacher: Teacher | None, total_steps: int, device: torch.device
    ) -> None:
        self.config, self.total_steps, self.device = config, total_steps, device
        self.teacher = teacher and teacher.to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.module = StepModule(config, student, teacher).to(device)
        self.world = world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if world > 1 else 0
        # Workers on GPUs exchange numbers that the host needs beside NCCL, which would have it wait for the device.
        others = world > 1 and self.module.denoising is not None and dist.get_backend() != "gloo"
        self.hosts = dist.new_group(backend="gloo") if others else None
        self.shared_norms = share_statistics(student) if world > 1 and config.student.backbone_norm == "sync" else []
        if device.type == "cpu":
            put_right(student, traced=config.compute.compile)
        if config.compute.compile:
            compile_step(self.module, config)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.module, config.training),
            lr=config.training.learning_rate,
            weight_decay=config.training.weight_decay,
            fused=True,
        )
        # Asked in every step: to go through all modules for them takes as long as to use them.
        self._learning = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        bits = config.student.quantization_taken
        self.stages = Stages(student.model, bits, total_steps) if bits is not None else None
        self.step_module = self._gathering()
        self._averaged: tuple[list[Tensor], list[Tensor]] | None = None
        self.average = (
            {k: v.detach().clone() for k, v in student.state_dict().items()} if config.training.ema_decay else {}
        )
        self.augmentation = augmentation_of(config, student, total_steps)
        self.step = 0
        self.shared_buffers_at = -1  # the step at which every worker had rank 0's buffers
        self._last: tuple[OnItsWay, Tensor, dict[str, Tensor], tuple[int, ...]] | None = None

    @property
    def student(self) -> Detector:
        return self.module.student

    def _gathering(self) -> nn.Module:
        """The step module, with gradients averaged over workers; another one, where other parameters have a gradient."""
        if self.world == 1:
            return self.module
        # Batch statistics are each worker's own, but for `sync`; evaluation takes rank 0's (see `evaluation_weights`).
        devices = [self.device.index or 0] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            self.module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    @property
    def whole(self) -> bool:
        """Whether the student is what it will be in the end: all that is to be quantised is."""
        return self.stages is None or self.step >= self.stages.last

    @property
    def learning_rate(self) -> float:
        """Of the last step, of all but the backbone's parameters."""
        return float(self.optimizer.param_groups[0]["lr"])

    def train_step(self, *parts: TrainBatch) -> dict[str, Tensor]:
        """Forward and backward of this worker's share of a batch, whole or in parts (as many on every worker), and one update.
        Returns each term's value and "total" (means over the parts), as tensors still on the device.

        Raises QskdError when the step before this one had a non-finite loss or gradient: looking one step late means never
        waiting.
        """
        settings = self.config.training
        # The random state is a function of the step, so that a resumed run draws what the first one would have drawn.
        torch.manual_seed(self.config.seed * 1_000_003 + self.step * 1_009 + self.rank)
        said: list[dict[str, Tensor]] = []
        objects = self._count_objects(parts)
        for part in parts:
            with self._syncing(len(said) == len(parts) - 1):
                total, values = self._forward(part, len(parts), objects)
                if not said:
                    self.check_finite()
                    self.optimizer.zero_grad(set_to_none=True)
                (total / len(parts)).backward()
            said.append(values)
        factor = learning_rate_factor(self.step, self.total_steps, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * group["scale"] * factor
        norm = self._clip(settings.clip_norm)
        self.optimizer.step()
        if self.average:
            self._update_average()
        self.step += 1
        if self.stages is not None and (begun := self.stages.advance(self.step)):
            self.optimizer.zero_grad(set_to_none=True)
            self.step_module = self._gathering()
            self.stages.begin_average(self.average, begun, "model.")
        mean = said[0]
        if len(said) > 1:
            mean = {name: torch.stack([values[name] for values in said]).mean() for name in mean}
        images = tuple(image for part in parts for image in part.targets.image_ids)
        self._last = (OnItsWay(mean["total"] + norm), norm, mean, images)
        return mean

    def _syncing(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over workers once a step, with the last part's."""
        if last or not isinstance(self.step_module, DistributedDataParallel):
            return nullcontext()
        no_sync: AbstractContextManager[Any] = self.step_module.no_sync()
        return no_sync

    def _count_objects(self, parts: tuple[TrainBatch, ...]) -> int | None:
        """How many objects this worker's parts have. None where one part is all, or not labels alone say what is an object."""
        if len(parts) == 1 or self.config.data.unlabeled or self.config.data.completed:
            return None
        return sum(sum(part.targets.counts) for part in parts)

    def _to_be_divided(self, terms: Mapping[str, LossTerm], parts: int, objects: int | None) -> dict[str, LossTerm]:
        """A part's terms with their divisors. What is counted by objects is divided by those of all parts, as in the whole batch;
        by its own, the background of a part without objects would count as if there were one."""
        # A floor of 1 on the whole batch's count is 1 / workers on their mean, so that it binds alike on any number.
        found = {name: replace(term, floor=term.floor / self.world) for name, term in terms.items()}
        by_objects = {} if objects is None else {name: term.objects for name, term in terms.items() if term.objects}
        if objects is None or not by_objects:
            return found
        # In one tensor: on a GPU each is a copy or a kernel of its own.
        counts = torch.tensor([each * objects / parts for each in by_objects.values()])
        for name, count in zip(by_objects, counts.to(self.device, non_blocking=True).unbind(), strict=True):
            found[name] = replace(found[name], count=count, floor=terms[name].floor / (self.world * parts))
        return found

    def _forward(self, part: TrainBatch, parts: int, objects: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all terms, with its gradient's graph, and each term's value. objects: of `_count_objects`."""
        real = len(part.images) > 0
        share = part if real else stand_in(self.device, self.config.student.resize, self.teacher)
        if self.student.training != real:  # a stand-in leaves no mark on batch statistics
            self.student.train(real)
        images, sizes, least = share.images, share.sizes, share.least
        if self.augmentation is not None and real:  # the teacher sees the share as it is
            images, sizes = self.augmentation(images, sizes, share.targets.image_ids, self.step)
            least = least if sizes is share.sizes else None
        for norm in self.shared_norms:
            norm.absent = not real
        with autocast(self.config.compute.precision, self.device):
            record = self._ask_teacher(share)
            share = replace(share, targets=self._objects(share, record))
            noise = self._noise(share if real else part)
            terms: dict[str, LossTerm] = self.step_module(
                images, sizes, share.targets, record, self._online(share), noise, least, self._boosts(share)
            )
        if not real:
            terms = {name: _nothing(term) for name, term in terms.items()}
        terms = self._to_be_divided(terms, parts, objects)
        counts = mean_counts(terms)
        weights = self.module.weights_at(self.step, self.total_steps)
        total, values = combine_with_values(terms, weights, counts)
        return total, values | {"total": total.detach()}

    def _ask_teacher(self, batch: TrainBatch) -> TeacherRecord | None:
        if self.teacher is None or self.module.method is None:
            return None
        return self.teacher.record(batch, self.module.method.needs)

    def _objects(self, batch: TrainBatch, record: TeacherRecord | None) -> Targets:
        """What is to be found in the images: what was labelled, else what the teacher is sure of."""
        completed = self.config.data.completed
        if batch.targets.all_labelled and not completed:
            return batch.targets
        if record is None:
            raise QskdError(
                "data.unlabeled", "images without labels, and no teacher", "a distillation", "`qskd distill`"
            )
        return with_pseudo_objects(batch.targets, record, self.config.data.unlabeled_score, completed)

    def _boosts(self, batch: TrainBatch) -> tuple[Tensor, ...]:
        if self.module.method is None:
            return ()
        return boosts_of(self.config.distillation, batch.targets, self.step, self.total_steps)

    def _noise(self, part: TrainBatch) -> Noise | None:
        """Of this share's denoising queries; None without any. All workers ask at once: the groups are the global batch's."""
        if self.module.denoising is None:
            return None
        objects = most_of_all(max(part.targets.counts, default=0), self.world, self.hosts)
        if not objects or not len(part.images):
            return None
        queries = self.module.denoising_queries
        noise = draw_noise(self.config.seed, self.step, part.targets.image_ids, objects, queries)
        pinned = replace(noise, uniform=noise.uniform.pin_memory()) if self.device.type == "cuda" else noise
        return to_device(pinned, self.device)

    def _online(self, batch: TrainBatch) -> Online | None:
        """The teacher itself, for a method that asks it in its own way."""
        asks = self.teacher is not None and self.module.method is not None and self.module.method.needs.online
        return self.teacher.online(batch) if asks and self.teacher is not None else None

    def _clip(self, most: float) -> Tensor:
        """The norm of all gradients, which are cut to `most` where that is not 0. All workers have the same gradients, so
        that it tells each of them of any one's broken batch."""
        if most:
            return nn.utils.clip_grad_norm_(self._learning, most)
        return nn.utils.get_total_norm([p.grad for p in self._learning if p.grad is not None])

    def check_finite(self) -> None:
        """Raise QskdError, with the terms and the image ids, if the last step's loss or gradient was not finite."""
        if self._last is None:
            return
        checked, norm, values, image_ids = self._last
        self._last = None
        if not math.isfinite(checked.read().item()):
            listed = ", ".join(f"{name} {value.item():.4g}" for name, value in values.items())
            broken = "gradient" if math.isfinite(values["total"].item()) else "loss"
            raise QskdError(
                f"training step {self.step - 1}",
                f"the {broken} is not finite: {listed}; gradient norm {norm.item():.4g}; images {list(image_ids)}",
                "finite loss terms, and a finite gradient of them on every worker",
                "look at these images and their boxes; lower training.learning_rate, or set training.clip_norm",
            )

    @torch.no_grad()
    def _update_average(self) -> None:
        # A young average forgets fast, so that the random start does not linger in it.
        decay = min(self.config.training.ema_decay, (1 + self.step) / (10 + self.step))
        if self._averaged is None:
            current = {k: v for k, v in self.student.state_dict().items() if v.is_floating_point()}
            self._averaged = [self.average[k] for k in current], list(current.values())
        torch._foreach_lerp_(*self._averaged, 1 - decay)

    def evaluation_weights(self) -> AbstractContextManager[Any]:
        """Within it the student carries the moving average (where there is one) and rank 0's batch statistics.

        The first time at a step all workers must enter together; after that rank 0 may alone, to save the student.
        """
        return EvaluationWeights(self)

    def state(self) -> dict[str, Tensor]:
        """All tensors a resumed run needs, by flat name (safetensors can hold them)."""
        self.check_finite()
        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        if self.stages is not None:
            tensors |= {f"calibration.{name}": counts for name, counts in self.stages.state().items()}
        named = {id(p): name for name, p in self.module.named_parameters()}
        for parameter, slots in self.optimizer.state.items():
            tensors |= {f"optimizer.{slot}.{named[id(parameter)]}": value for slot, value in slots.items()}
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def load_state(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Continue from `state()` after `step` steps."""
        self.module.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("module.")})
        now = self.student.state_dict()
        averages = {k[8:]: v for k, v in tensors.items() if k.startswith("average.")}
        self.average, self._averaged = {k: laid_out_as(v, now[k]) for k, v in averages.items()}, None
        parameters = dict(self.module.named_parameters())
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, slot, name = key.split(".", 2)
                if name not in parameters:
                    raise QskdError(
                        "the checkpoint's optimizer",
                        f"state of {name}, which does not learn in this recipe",
                        "the parameters that the run was begun with",
                        "set student.frozen_stages, student.backbone_norm and student.train_backbone as they were then",
                    )
                self.optimizer.state[parameters[name]][slot] = laid_out_as(value, parameters[name])
        self.step = step
        if self.stages is not None:
            seen = {k[12:]: v for k, v in tensors.items() if k.startswith("calibration.")}
            self.stages.load(seen, step)
            self.step_module = self._gathering()


def _nothing(term: LossTerm) -> LossTerm:
    """A stand-in's: in the graph, and counted by nobody."""
    return replace(
        term, total=0.0 * term.total, count=0.0 * term.count, rest=None if term.rest is None else 0.0 * term.rest
    )
