"""Distillation in a loop of one's own, and in transformers' Trainer: the model runs as ever, the teacher's terms come beside."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import EASY_SELECTION, LABELS, SIZE, STUDENT, arrays, own, random_teacher, recipe, shake, silent_student
from transformers import Trainer, TrainerCallback, TrainingArguments

from qskd.config import FACTS, ResizeConfig
from qskd.detectors import Detector, Preprocessing, to_pixels
from qskd.distillation.qskd.whitening import metric
from qskd.errors import QskdError
from qskd.structures import Targets, TeacherNeeds
from qskd.training.distiller import Distiller, targets_of
from qskd.training.trainer import FILE, DistillationMixin

SEEN_AS = Preprocessing(ResizeConfig(size=SIZE))
METHOD = {"selection": EASY_SELECTION}


def student_of(family: str) -> Any:
    """A plain transformers model."""
    detector = silent_student(recipe(own(family, 2 if family == "deformable_detr" else 1)).student, LABELS, 3)
    shake(detector, 3)
    return detector.model


def batch_of(counts: list[int], seed: int = 0, padded: tuple[int, int] | None = None) -> dict[str, Any]:
    """What transformers' processors make; `padded`: the last image's real height and width."""
    made = arrays(counts, seed)
    sizes = torch.full((len(counts), 2), SIZE)
    if padded:
        sizes[-1] = torch.tensor(padded)
    pixels, mask = to_pixels(torch.from_numpy(made["images"]), sizes, SEEN_AS.mean, SEEN_AS.std)
    labels = [
        {
            "class_labels": torch.from_numpy(made["labels"][i, :count]),
            "boxes": torch.from_numpy(made["boxes_cxcywh"][i, :count]),
            "size": torch.tensor([SIZE, SIZE]),
        }
        for i, count in enumerate(counts)
    ]
    return {"pixel_values": pixels, "pixel_mask": mask.long(), "labels": labels}


def sure_teacher() -> Any:
    """Random, but its scores are far from a fresh student's."""
    teacher = random_teacher()
    with torch.no_grad():
        for name, parameter in teacher.detector.named_parameters():
            if "class_embed" in name and name.endswith("bias"):
                parameter.add_(4.0)
    return teacher


@pytest.mark.parametrize("family", FACTS)
def test_a_forward_of_the_model_s_owner_says_what_the_detector_s_own_says(family: str) -> None:
    model = student_of(family).eval()
    model.config.auxiliary_loss = True
    batch = batch_of([2, 1])
    distiller = Distiller(model, random_teacher(), SEEN_AS, method=METHOD)
    assert model.config.auxiliary_loss is True
    expected = distiller.student(batch["pixel_values"], batch["pixel_mask"].bool(), with_attention=False)
    model.train()
    for module in model.modules():  # batch statistics and dropout as in evaluation
        if module is not model:
            module.training = False
    outputs = model(**batch)
    heard = distiller._heard(batch["pixel_mask"].bool(), targets_of(batch["labels"], batch["pixel_mask"].bool())[1])
    assert torch.isfinite(outputs.loss)
    for name in ("logits", "boxes_cxcywh", "query_states"):
        torch.testing.assert_close(getattr(heard, name), getattr(expected, name))
    torch.testing.assert_close(heard.memory, expected.memory)
    torch.testing.assert_close(heard.boxes_cxcywh[-1], outputs.pred_boxes)


@pytest.mark.parametrize("family", ["rt_detr", "conditional_detr"])
def test_its_terms_fall_and_their_gradients_reach_the_student_but_not_the_teacher(family: str) -> None:
    torch.manual_seed(0)
    model, teacher = student_of(family).train(), sure_teacher()
    distiller = Distiller(model, teacher, SEEN_AS, method=METHOD)
    batch = batch_of([2, 1, 0])
    model(**batch)
    distiller(batch).loss.backward()
    touched = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.abs().sum() > 0}
    assert any("backbone" in name for name in touched)
    assert any("decoder" in name for name in touched)
    assert all(each.grad is None for each in teacher.parameters())
    own = {id(each) for each in distiller.parameters()}
    assert own
    assert not own & {id(each) for each in (*model.parameters(), *teacher.parameters())}
    optimizer = torch.optim.AdamW([*model.parameters(), *distiller.parameters()], lr=2e-3)
    rows = []
    for _ in range(25):
        model(**batch)
        said = distiller(batch)
        optimizer.zero_grad()
        said.loss.backward()
        optimizer.step()
        rows.append({name: value.item() for name, value in said.terms.items()})
    assert rows[0].keys() == {"agfd", "lapd_class", "lapd_l1", "lapd_giou"}
    assert {name: (rows[0][name], rows[-1][name]) for name in rows[0] if rows[-1][name] >= rows[0][name]} == {}


def test_it_weighs_features_by_how_the_memory_of_the_images_it_is_shown_varies() -> None:
    """As `qskd distill` does: of no more than 256 images, and of none that it isn't shown."""
    model, teacher = student_of("conditional_detr").train(), sure_teacher()
    batches = [batch_of([2, 1], seed, (SIZE, SIZE // 2)) for seed in range(3)]
    cells = []
    for batch in batches:
        images = (batch["pixel_values"] * torch.tensor(SEEN_AS.std).view(3, 1, 1)) + torch.tensor(SEEN_AS.mean).view(
            3, 1, 1
        )
        shown = (255 * images).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        sizes = torch.tensor([[SIZE, SIZE], [SIZE, SIZE // 2]])
        record = teacher(shown, sizes, TeacherNeeds(memory=True))
        cells.append(record.memory[1].movedim(1, -1)[record.memory_valid[1]])  # the map that this student meets
    expected = torch.cat(cells).double()
    covariance = np.cov(expected.numpy().T, bias=True)
    distiller = Distiller(model, teacher, SEEN_AS, method=METHOD, look_at=iter(batches))
    found = teacher.directions[1]
    np.testing.assert_allclose(found.vectors * found.variances @ found.vectors.T, covariance, atol=1e-5)
    torch.testing.assert_close(dict(distiller.named_buffers())["method.features.metric_0"], metric(found, 1.0, 0.97))
    model(**batches[0])
    whitened = distiller(batches[0]).terms["agfd"]
    teacher.directions = ()
    plain = Distiller(model, teacher, SEEN_AS, method=METHOD)
    model(**batches[0])
    assert plain(batches[0]).terms["agfd"] != whitened
    with pytest.raises(QskdError, match="look_at: no batch"):
        Distiller(model, teacher, SEEN_AS, look_at=[])
    with pytest.raises(QskdError, match="no directions are known"):
        Distiller(model, teacher, SEEN_AS, method={"features": {"whitening": 1.0}})
    numbers = itertools.count()
    Distiller(model, teacher, SEEN_AS, look_at=(batch_of([0] * 100, number) for number in numbers))
    assert next(numbers) == 3  # batches were taken, and no more


def test_boxes_of_a_padded_batch_are_taken_back_to_their_image() -> None:
    mask = torch.zeros(2, 40, 80, dtype=torch.bool)
    mask[0], mask[1, :20, :40] = True, True
    box = torch.tensor([[0.25, 0.25, 0.5, 0.5]])  # of the padded batch: the whole second image
    label = {"class_labels": torch.tensor([1]), "boxes": box}
    targets, scale = targets_of([{**label, "size": torch.tensor([40, 80])}] * 2, mask)
    assert targets.boxes_cxcywh[0, 0].tolist() == [0.25, 0.25, 0.5, 0.5]
    assert targets.boxes_cxcywh[1, 0].tolist() == [0.5, 0.5, 1.0, 1.0]
    assert scale.tolist() == [[1.0] * 4, [2.0] * 4]
    alone, _ = targets_of([label, {**label, "size": [20, 40]}], mask)  # relative to their images
    assert alone.boxes_cxcywh[:, 0].tolist() == [box[0].tolist()] * 2
    assert isinstance(targets, Targets)
    assert targets.counts == (1, 1)


def test_a_teacher_of_another_size_sees_the_same_pictures() -> None:
    teacher = random_teacher()
    teacher.preprocessing = Preprocessing(ResizeConfig(size=2 * SIZE), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    distiller = Distiller(student_of("conditional_detr"), teacher, SEEN_AS, method=METHOD)
    batch = batch_of([2, 1], padded=(32, 64))
    images, sizes = distiller._as_teacher_sees(batch["pixel_values"], batch["pixel_mask"].bool())
    assert sizes.tolist() == [[2 * SIZE, 2 * SIZE]] * 2
    small = torch.from_numpy(arrays([2, 1])["images"])
    halved = images.float().unflatten(1, (SIZE, 2)).unflatten(3, (SIZE, 2)).mean((2, 4))
    assert (halved[0] - small[0].float()).abs().mean() < 12
    distiller.teacher.preprocessing = SEEN_AS
    same, _ = distiller._as_teacher_sees(batch["pixel_values"], batch["pixel_mask"].bool())
    assert torch.equal(same[0], small[0])


def test_what_can_not_be_distilled_is_said_by_name() -> None:
    model = student_of("conditional_detr").train()
    distiller = Distiller(model, random_teacher(), SEEN_AS, method=METHOD)
    batch = batch_of([1, 1])
    with pytest.raises(QskdError, match="the student has not run"):
        distiller(batch)
    model(**batch)
    distiller(batch)
    with pytest.raises(QskdError, match="the student has not run"):
        distiller(batch)  # what was heard is forgotten, not used twice
    model.eval()
    model(**batch)
    with pytest.raises(QskdError, match="training mode"):
        distiller(batch)
    with pytest.raises(QskdError, match="weihgt"):
        Distiller(model, random_teacher(), SEEN_AS, method={"method": "mimic", "weihgt": 1})
    with pytest.raises(QskdError, match="a distillation method"):
        Distiller(model, random_teacher(), SEEN_AS, method={"method": "none"})


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        batch = batch_of([2, 1, 1, 2])
        self.rows = [
            {"pixel_values": batch["pixel_values"][i], "labels": batch["labels"][i]}
            for i in range(len(batch["labels"]))
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": [row["labels"] for row in rows],
    }


def trainer_of(folder: Path, steps: int, **more: Any) -> Any:
    class Distilling(DistillationMixin, Trainer):
        pass

    torch.manual_seed(0)
    model = student_of("conditional_detr")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=3,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"per_device_train_batch_size": 4, **more},
    )
    distiller = Distiller(model, random_teacher(), SEEN_AS, method=METHOD)
    return Distilling(
        model=model, args=arguments, train_dataset=Pictures(), data_collator=together, distiller=distiller
    )


def test_transformers_trainer_trains_student_and_projectors_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    trainer = trainer_of(tmp_path, 6)
    before = {name: value.clone() for name, value in trainer.distiller.state_dict().items()}
    trainer.train()
    logged = [row for row in trainer.state.log_history if "distillation/agfd" in row]
    assert len(logged) == 6
    assert logged[-1]["distillation/agfd"] < logged[0]["distillation/agfd"]
    assert all(row["loss"] > 0 for row in logged)
    after = trainer.distiller.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "checkpoint-3" / FILE).is_file()
    again = trainer_of(tmp_path, 6)
    again._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    kept = load_file(tmp_path / "checkpoint-3" / FILE)
    for name, value in again.distiller.state_dict().items():
        assert torch.equal(value, kept[name])
        assert not torch.equal(value, after[name])
    # The result is a plain transformers folder, without the method's parts.
    again.save_model(str(tmp_path / "student"))
    assert FILE not in {file.name for file in (tmp_path / "student").iterdir()}
    assert isinstance(Detector(type(again.model).from_pretrained(tmp_path / "student")), Detector)
    assert STUDENT["queries"] == Detector(again.model).num_queries


def test_the_trainer_s_steps_are_of_one_step_s_gradients_and_clipped(tmp_path: Path) -> None:
    """transformers' Trainer clips and clears the model's alone."""
    trainer = trainer_of(tmp_path, 4, max_grad_norm=0.5, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    norms: list[float] = []
    own = list(trainer.distiller.parameters())
    steps: list[int] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in own])))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert all(p.grad is None for p in own)
            steps.append(trainer.distiller.step)

    trainer.add_callback(Watch())
    trainer.train()
    assert len(norms) == 4
    assert max(norms) <= 0.5 * 1.001
    assert steps == [1, 2, 3, 4]  # updates, not batches


def test_a_student_in_mixed_precision_is_heard(tmp_path: Path) -> None:
    """The Trainer's autocast is around the model's forward alone."""
    trainer = trainer_of(tmp_path, 2, bf16=True)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "distillation/agfd" in row]
    assert len(rows) == 2
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("method", ["crosskd", "kd-detr"])
def test_a_decoder_that_is_asked_in_a_loop_of_mixed_precision_answers(method: str) -> None:
    model = student_of("conditional_detr")
    distiller = Distiller(model, random_teacher("conditional"), SEEN_AS, method={"method": method})
    batch = batch_of([2, 1])
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(**batch)
    assert torch.isfinite(distiller(batch).loss)


def test_what_teaches_follows_the_student_to_its_device() -> None:
    distiller = Distiller(student_of("conditional_detr"), random_teacher(), SEEN_AS, method={"method": "crosskd"})
    distiller.follow(torch.device("meta"))
    assert distiller._decoder is not None
    networks = [distiller.method, distiller.teacher.detector, distiller._decoder.detector]
    assert {p.device.type for network in networks for p in network.parameters()} == {"meta"}


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    with pytest.raises(QskdError, match="2 GPUs in one process"):
        trainer_of(tmp_path, 1)
