"""The teacher in the training step: frozen, in the dataset's class order, and no more than was asked of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import LABELS, TEACHER_LABELS, arrays, random_teacher
from torch import Tensor, nn

from qskd.datasets.batch import train_batch
from qskd.datasets.classes import map_classes
from qskd.detectors import to_pixels
from qskd.errors import QskdError
from qskd.structures import TeacherNeeds, TeacherRecord
from qskd.teacher.online import OnlineTeacher

EVERYTHING = TeacherNeeds(memory=True, attention=True, all_layers=True, attention_giou_floor=-1.0)


def pixels() -> tuple[Tensor, Tensor]:
    batch = arrays([2, 1])
    sizes = torch.from_numpy(batch["sizes"])
    sizes[1] = torch.tensor([40, 64])
    return torch.from_numpy(batch["images"]), sizes


@pytest.fixture(scope="module", params=["conditional", "refined"])
def teacher(request: pytest.FixtureRequest) -> OnlineTeacher:
    return random_teacher(request.param)


def test_it_stays_in_evaluation_mode_whatever_it_is_part_of(teacher: OnlineTeacher) -> None:
    whole = nn.ModuleList([teacher])
    whole.train()
    assert not any(module.training for module in teacher.modules())
    teacher.train(True)
    assert not any(module.training for module in teacher.modules())


def test_nothing_of_it_has_a_gradient(teacher: OnlineTeacher) -> None:
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with torch.enable_grad():
        record = teacher(*pixels(), EVERYTHING)
    tensors = [record.logits, record.boxes_cxcywh, *record.memory, *record.attention]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_logits_are_in_the_order_of_the_dataset_s_classes(teacher: OnlineTeacher) -> None:
    images, sizes = pixels()
    own = teacher.detector(*to_pixels(images, sizes, teacher.preprocessing.mean, teacher.preprocessing.std))
    record = teacher(images, sizes, TeacherNeeds())
    assert own.logits.shape[-1] == len(TEACHER_LABELS)
    assert record.logits.shape == (1, 2, 10, len(LABELS))
    for index, label in enumerate(LABELS):
        torch.testing.assert_close(record.logits[..., index], own.logits[-1:, ..., TEACHER_LABELS.index(label)])
    torch.testing.assert_close(record.boxes_cxcywh, own.boxes_cxcywh[-1:])


def test_it_gives_what_was_asked_and_no_more(teacher: OnlineTeacher) -> None:
    record = teacher(*pixels(), TeacherNeeds())
    assert (len(record.logits), record.memory, record.attention_queries, record.attention) == (1, (), None, ())
    record = teacher(*pixels(), TeacherNeeds(memory=True))
    assert len(record.memory) == len(record.memory_valid) == len(teacher.facts.channels)
    assert record.attention_queries is None
    record = teacher(*pixels(), EVERYTHING)
    assert record.logits.shape == (3, 2, 10, 3)
    assert record.boxes_cxcywh.shape == (3, 2, 10, 4)
    assert [tuple(part.shape) for part in record.memory] == [
        (2, channels, *valid.shape[1:])
        for channels, valid in zip(teacher.facts.channels, record.memory_valid, strict=True)
    ]


def test_a_method_s_questions_spare_the_device_what_the_host_knows(teacher: OnlineTeacher) -> None:
    """The sizes that the loader knows go along, as with the teacher's own record of the batch."""

    class Listening(OnlineTeacher):
        def forward(self, *given: Any, **named: Any) -> TeacherRecord:
            heard.append(named.get("least", given[4] if len(given) > 4 else None))
            return super().forward(*given, **named)

    heard: list[Any] = []
    slots = tuple(teacher.get_buffer("class_slots").tolist())
    listening, batch = Listening(teacher.detector, slots, teacher.preprocessing), train_batch(arrays([2, 1]))
    asked, own = listening.online(batch).ask(EVERYTHING), listening.record(batch, EVERYTHING)
    assert heard == [batch.teacher_least] * 2
    assert batch.teacher_least is not None
    torch.testing.assert_close(asked.logits, own.logits)
    torch.testing.assert_close(asked.attention, own.attention)


def test_all_layers_end_with_the_last_one(teacher: OnlineTeacher) -> None:
    every, last = teacher(*pixels(), EVERYTHING), teacher(*pixels(), TeacherNeeds())
    torch.testing.assert_close(every.logits[-1:], last.logits)
    torch.testing.assert_close(every.boxes_cxcywh[-1:], last.boxes_cxcywh)
    assert not torch.allclose(every.logits[0], every.logits[-1])


@pytest.mark.parametrize("layers", ["last", "mean"])
def test_every_query_has_attention_that_sums_to_one_on_the_real_part(teacher: OnlineTeacher, layers: str) -> None:
    record = teacher(*pixels(), TeacherNeeds(memory=True, attention=True, attention_layers=layers))
    assert record.attention_queries is not None
    assert record.attention_queries.tolist() == [list(range(10))] * 2
    mass = sum(part.flatten(2).sum(-1) for part in record.attention)
    assert isinstance(mass, Tensor)
    torch.testing.assert_close(mass, torch.ones(2, 10))
    for part, valid in zip(record.attention, record.memory_valid, strict=True):
        assert (part * ~valid[:, None]).abs().max() == 0
    assert not all(bool(valid[1].all()) for valid in record.memory_valid)  # the second image is padded


def test_attention_of_the_last_layer_is_not_the_mean_of_all(teacher: OnlineTeacher) -> None:
    last, mean = (
        teacher(*pixels(), TeacherNeeds(attention=True, attention_layers=layers)).attention[0]
        for layers in ("last", "mean")
    )
    assert not torch.allclose(last, mean)


def test_its_pixels_are_normalised_as_its_own_preprocessing_says(teacher: OnlineTeacher) -> None:
    images, sizes = pixels()
    plain = OnlineTeacher(
        teacher.detector,
        map_classes(LABELS, teacher.detector.labels, {}),
        type(teacher.preprocessing)(teacher.preprocessing.resize, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    )
    expected = teacher.detector(*to_pixels(images, sizes, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    record = plain(images, sizes, TeacherNeeds())
    torch.testing.assert_close(record.boxes_cxcywh, expected.boxes_cxcywh[-1:])
    assert not torch.allclose(record.logits, teacher(images, sizes, TeacherNeeds()).logits)


def test_a_dataset_class_the_teacher_does_not_know_is_refused() -> None:
    with pytest.raises(QskdError, match="cow"):
        random_teacher(labels=("cat", "cow"))


def test_class_slots_are_no_part_of_what_is_saved(teacher: OnlineTeacher) -> None:
    assert "class_slots" not in teacher.state_dict()
