"""Distillation in transformers' own Trainer: a mixin, which needs nothing but a `Distiller`."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qskd.errors import QskdError
from qskd.training.distiller import Distiller

log = logging.getLogger("qskd")
FILE = "distiller.safetensors"  # in each of the Trainer's checkpoints: the method's own parts


class DistillationMixin:
    """Before `Trainer` in a class's bases, it adds what a teacher has to say to every step's loss:

        class Distilling(qskd.DistillationMixin, transformers.Trainer): ...

        Distilling(model=student, args=arguments, ..., distiller=qskd.Distiller(student, "teacher", processor)).train()

    The model's own loss stays as it is. The method's projectors are trained with the Trainer's learning rate, clipped to its
    `max_grad_norm` by themselves, and kept in its checkpoints; each of its terms is logged as `distillation/TERM`.
    `remove_unused_columns=False` is needed, as for every detector. One process only where a method has projectors, and one GPU:
    QskdError otherwise.
    """

    def __init__(self, *arguments: Any, distiller: Distiller, **keywords: Any) -> None:
        self.distiller = distiller
        self._said: dict[str, list[torch.Tensor]] = defaultdict(list)
        super().__init__(*arguments, **keywords)
        from transformers import TrainerCallback

        class OwnParts(TrainerCallback):
            """The Trainer clips and clears the model's gradients alone."""

            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if args.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(distiller.parameters(), args.max_grad_norm)

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                distiller.zero_grad(set_to_none=True)

        self.add_callback(OwnParts())  # type: ignore[attr-defined]
        if (devices := self.args.n_gpu) > 1:  # type: ignore[attr-defined]
            raise QskdError(
                "DistillationMixin",
                f"{devices} GPUs in one process, whose copies of the student are not heard",
                "one GPU",
                "export CUDA_VISIBLE_DEVICES=0, or use `qskd distill`, which trains on any number",
            )
        distiller.follow(self.args.device)  # type: ignore[attr-defined]
        processes = self.args.world_size  # type: ignore[attr-defined]
        if processes > 1 and any(True for _ in distiller.parameters()):
            raise QskdError(
                "DistillationMixin",
                f"{processes} processes, and the method has projectors, whose gradients nobody would average",
                "one process",
                "use `qskd distill`, which trains on any number",
            )

    def create_optimizer(self, *arguments: Any, **keywords: Any) -> Any:
        optimizer = super().create_optimizer(*arguments, **keywords)  # type: ignore[misc]
        known = {id(each) for group in optimizer.param_groups for each in group["params"]}
        added = [each for each in self.distiller.parameters() if id(each) not in known]
        if added:
            optimizer.add_param_group({"params": added})
        return optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **keywords: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **keywords)  # type: ignore[misc]
        if model.training:
            self.distiller.step = self.state.global_step  # type: ignore[attr-defined]  # of updates: it may add up batches
            said = self.distiller(inputs)
            loss = loss + said.loss
            for name, value in said.terms.items():
                self._said[f"distillation/{name}"].append(value)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        if "loss" in logs and self._said:
            logs = {**logs, **{name: float(torch.stack(values).mean()) for name, values in self._said.items()}}
            self._said.clear()
        super().log(logs, *arguments, **keywords)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=_internal_call)  # type: ignore[misc]
        if _internal_call and output_dir is not None:  # a checkpoint to go on from; the student alone is the result
            own = {name: value.detach().cpu().contiguous() for name, value in self.distiller.state_dict().items()}
            save_file(own, Path(output_dir) / FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        file = Path(resume_from_checkpoint) / FILE
        if not file.is_file():
            log.warning("%s has no %s: the method's projectors begin anew", resume_from_checkpoint, FILE)
            return
        self.distiller.load_state_dict(load_file(file))
