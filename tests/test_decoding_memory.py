"""A detector's decoder on a memory that it is given: it says what the whole detector says, of its own queries and of others."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from qskd.checks import check_decoder
from qskd.config import Config, ResizeConfig, StudentConfig
from qskd.datasets.classes import map_classes
from qskd.detectors import Detector, save_detector
from qskd.detectors.decoding import decode, through_layers
from qskd.errors import QskdError
from qskd.families.table import FAMILIES
from qskd.structures import DetectorOutput, Queries, TeacherNeeds, TeacherRecord
from qskd.teacher.columns.table import collate, columns_for, decode_batch, encode
from qskd.teacher.decoder import TeacherDecoder, check_decodes, load_decoder
from qskd.teacher.manifest import CacheSizes

DECODING = [name for name, family in FAMILIES.items() if family.decodes]  # all but LW-DETR and RF-DETR
EVERY = (*DECODING, "two stages", "patterns")
MASKS = [name for name in EVERY if name not in FAMILIES or FAMILIES[name].masks_padding]
SAID = ("logits", "boxes_cxcywh", "query_states", "no_object")


@cache
def detector_of(name: str) -> Detector:
    """A family's, with random weights, or one of the two kinds that a student of ours never is."""
    family = {"two stages": "deformable_detr", "patterns": "dab-detr"}.get(name, name)
    seed = 3
    levels = {"feature_levels": 2} if FAMILIES[family].many_maps else {}
    boxes = {"box_refinement": True} if name == "two stages" else {}
    config = StudentConfig.model_validate({**tiny.STUDENT, "family": family, **levels, **boxes})
    detector = tiny.silent_student(config, tiny.LABELS, seed)
    if name in ("two stages", "patterns"):
        other = detector.model.config
        changes = {"two_stage": True, "two_stage_num_proposals": 6} if name == "two stages" else {"num_patterns": 3}
        other.update(changes)
        torch.manual_seed(seed)
        detector = Detector(type(detector.model)(other))
    tiny.shake(detector, seed)
    return detector.eval().requires_grad_(False)


def seen(detector: Detector, padded: bool) -> DetectorOutput:
    generator = torch.Generator().manual_seed(1)
    pixels, mask = torch.randn(2, 3, 64, 96, generator=generator), torch.ones(2, 64, 96, dtype=torch.bool)
    if padded:
        mask[1, 40:], mask[1, :, 70:] = False, False
        pixels = pixels * mask[:, None]
    with torch.no_grad():
        return detector(pixels, mask)


def furthest(one: DetectorOutput, other: DetectorOutput) -> dict[str, float]:
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in SAID}
    return {name: float((a - b).abs().max()) for name, (a, b) in pairs.items() if a is not None}


@pytest.mark.parametrize(("name", "padded"), [*((name, False) for name in EVERY), *((name, True) for name in MASKS)])
def test_a_decoder_on_the_memory_says_what_the_detector_says(name: str, padded: bool) -> None:
    detector = detector_of(name)
    whole = seen(detector, padded)
    with torch.no_grad():
        found = decode(detector, whole.memory, whole.memory_valid, masked=padded).output
    far = furthest(found, whole)
    assert far.keys() >= {"logits", "boxes_cxcywh", "query_states"}
    assert max(far.values()) < 1e-5, far
    assert (found.sides is None) == (whole.sides is None)
    if found.sides is not None and whole.sides is not None:
        for mine, theirs in zip(found.sides.logits, whole.sides.logits, strict=True):
            assert (mine - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_queries_that_are_given_are_asked_as_the_model_s_own_are(name: str) -> None:
    """Its own in the opposite order say the same, in the opposite order; half of them are half as many answers."""
    detector = detector_of(name)
    whole = seen(detector, False)
    with torch.no_grad():
        own = decode(detector, whole.memory, whole.memory_valid, masked=False)

        def chosen(part: Any) -> Queries:
            pairs = {key: value for key, value in vars(own.queries).items() if value is not None}
            return Queries(**{key: value[:, part] for key, value in pairs.items()})

        count = whole.logits.shape[2]
        back = decode(detector, whole.memory, whole.memory_valid, chosen(torch.arange(count - 1, -1, -1)), False).output
        few = decode(detector, whole.memory, whole.memory_valid, chosen(slice(0, 2)), False).output
    assert torch.allclose(back.logits.flip(2), whole.logits, atol=1e-5)
    assert torch.allclose(back.boxes_cxcywh.flip(2), whole.boxes_cxcywh, atol=1e-5)
    assert few.logits.shape[2] == 2
    assert not torch.allclose(few.logits, whole.logits[:, :, :2], atol=1e-4)  # they see fewer others


@pytest.mark.parametrize("name", EVERY)
def test_layers_with_the_same_memory_say_the_same_and_with_another_one_do_not_see_each_other_s(name: str) -> None:
    detector = detector_of(name)
    whole = seen(detector, False)
    own = decode(detector, whole.memory, whole.memory_valid, masked=False)
    far = furthest(through_layers(detector, own, whole.memory), own.output)
    assert max(far.values()) < 1e-5, far
    other = tuple((map_ + torch.randn_like(map_)).requires_grad_() for map_ in whole.memory)
    crossed = through_layers(detector, own, other)
    free = decode(detector, other, whole.memory_valid, own.queries, masked=False).output
    # The first layer has been given the same by both; what the second is given is the difference.
    assert torch.allclose(crossed.logits[0], free.logits[0], atol=1e-5)
    assert torch.allclose(crossed.boxes_cxcywh[0], free.boxes_cxcywh[0], atol=1e-5)
    assert not torch.allclose(crossed.logits[1], free.logits[1], atol=1e-4)
    (crossed.logits.sum() + crossed.boxes_cxcywh.sum()).backward()
    assert all(map_.grad is not None and map_.grad.isfinite().all() and map_.grad.any() for map_ in other)


def test_padding_of_a_family_that_looks_at_it_is_taken_out_of_its_boxes() -> None:
    detector = detector_of("rt_detr")
    whole, mask = seen(detector, True), torch.ones(2, 64, 96, dtype=torch.bool)
    mask[1, 40:], mask[1, :, 70:] = False, False
    with torch.no_grad():
        own = decode(detector, whole.memory, whole.memory_valid, pixel_mask=mask)
        part = torch.tensor([[1.0] * 4, [70 / 96, 40 / 64] * 2])[:, None]
        assert own.queries.places is not None
        places = own.queries.places.sigmoid() / part  # relative to the image
        again = replace(own.queries, places=torch.logit(places.clamp(1e-5, 1 - 1e-5)))
        given = decode(detector, whole.memory, whole.memory_valid, again, pixel_mask=mask).output
    assert max(furthest(own.output, whole).values()) < 1e-5
    inside = (places < 1 - 1e-4).all(-1) & (places > 1e-4).all(-1)
    assert inside.any(1).all()
    assert (given.boxes_cxcywh - whole.boxes_cxcywh).abs().max() < 1e-3 or not inside.all()


def recorded(output: DetectorOutput, precision: str) -> TeacherRecord:
    """What a cache of this precision gives back."""
    record = TeacherRecord(output.logits[-1:], output.boxes_cxcywh[-1:], output.memory, output.memory_valid)
    rows = encode(record, range(len(output.memory[0])), precision)
    sizes = CacheSizes(1, *output.logits.shape[2:], tuple(map_.shape[1] for map_ in output.memory))
    arrays = collate(rows, sizes, columns_for(TeacherNeeds(memory=True)))
    return decode_batch({name: torch.from_numpy(value) for name, value in arrays.items()})


@pytest.mark.parametrize("name", DECODING)
def test_what_a_cache_holds_is_enough_for_the_teacher_s_answers(name: str) -> None:
    """Of float32 to rounding; of int8 as far as a probability is wide that nobody reads (random weights, the same queries)."""
    detector = detector_of(name)
    whole = seen(detector, FAMILIES[name].masks_padding)
    decoder = TeacherDecoder(
        detector, range(3), ResizeConfig(mode="shortest_edge" if FAMILIES[name].masks_padding else "square")
    )
    exact = decoder.ask(recorded(whole, "float32"))
    assert max(furthest(exact.output, whole).values()) < 1e-5
    coarse = decoder.ask(recorded(whole, "int8"), exact.decoded.queries).output
    far = float((coarse.logits.sigmoid() - whole.logits.sigmoid()).abs().max()), furthest(coarse, whole)["boxes_cxcywh"]
    print(name, far)
    assert max(far) < 0.02


def test_logits_are_in_the_dataset_s_order_and_no_gradient_reaches_the_teacher() -> None:
    teacher = tiny.random_teacher("conditional")
    images, sizes = (torch.from_numpy(tiny.arrays([1, 1])[name]) for name in ("images", "sizes"))
    record = teacher(images, sizes, TeacherNeeds(memory=True, all_layers=True))
    answer = teacher.decoder.ask(record)
    assert torch.allclose(answer.output.logits, record.logits, atol=1e-5)
    crossed = teacher.decoder.cross(answer, [map_.clone().requires_grad_() for map_ in record.memory])
    assert crossed.logits.shape == record.logits.shape
    assert crossed.logits.requires_grad
    assert not answer.output.logits.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_without_backbone_and_encoder_it_says_the_same(name: str) -> None:
    detector = detector_of(name)
    whole = seen(detector, False)
    model = copy.deepcopy(detector.model)
    FAMILIES[detector.family].drop_front(model)
    left = Detector(model)
    assert sum(1 for _ in left.backbone.parameters()) == sum(1 for _ in left.model.model.encoder.parameters()) == 0
    with torch.no_grad():
        found = decode(left, whole.memory, whole.memory_valid, masked=False).output
    assert max(furthest(found, whole).values()) < 1e-5


def test_a_recipe_s_decoder_is_loaded_without_the_rest_and_only_of_the_cache_s_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qskd.teacher.decoder as module

    detector, loaded, real = detector_of("dab-detr"), list[Any](), module.load_detector
    save_detector(detector, tmp_path / "teacher", ResizeConfig(size=64), durable=False)

    def heard(path: Any) -> Detector:
        found = real(path)
        family = FAMILIES[found.family]
        loaded.extend(weakref.ref(part) for part in (family.backbone(found.model), found.model.model.encoder))
        return found

    monkeypatch.setattr(module, "load_detector", heard)
    config = tiny.recipe(None, f"teacher.path={tmp_path / 'teacher'}")
    manifest: Any = SimpleNamespace(identity=module.checkpoint_digests(tmp_path / "teacher"))
    decoder = load_decoder(config, tiny.LABELS, manifest)
    assert [part() for part in loaded] == [None, None]
    whole = seen(detector, False)
    record = TeacherRecord(whole.logits, whole.boxes_cxcywh, whole.memory, whole.memory_valid)
    assert max(furthest(decoder.ask(record).output, whole).values()) < 1e-5
    manifest.identity = {"teacher.weights_sha256": "0" * 64}
    with pytest.raises(QskdError, match="other weights"):
        load_decoder(config, tiny.LABELS, manifest)


def test_a_teacher_whose_memory_is_not_all_that_its_decoder_reads_is_refused_by_name() -> None:
    shape = ResizeConfig(mode="shortest_edge")
    for name in DECODING:
        check_decodes(name, ResizeConfig())
    for name in ("lw_detr", "rf_detr"):
        with pytest.raises(QskdError, match=f"family {name}, whose decoder can't be asked"):
            check_decodes(name, ResizeConfig())
    for name in ("rt_detr", "rt_detr_v2", "d_fine"):
        with pytest.raises(QskdError, match=f"family {name}, whose decoder reads the padding"):
            check_decodes(name, shape)
    check_decodes("deformable_detr", shape)


def test_a_recipe_whose_teacher_can_not_be_asked_is_refused_before_anything_starts(tmp_path: Path) -> None:
    save_detector(
        detector_of("d_fine"), tmp_path / "teacher", ResizeConfig(mode="shortest_edge", size=64), durable=False
    )

    def recipe(method: str, *more: str) -> Config:
        said = [f"teacher.path={tmp_path / 'teacher'}", *more]
        return tiny.recipe(None, *said, distillation={"method": "qskd", "also": {"more": {"method": method}}})

    check_decoder(recipe("mimic"))
    check_decoder(recipe("crosskd", "teacher.resize.mode=square"))
    for method in ("crosskd", "kd-detr"):
        with pytest.raises(QskdError, match=r"teacher.resize.mode = shortest_edge: a teacher of family d_fine"):
            check_decoder(recipe(method))


def test_slots_of_nobody_say_nothing() -> None:
    detector = detector_of("conditional_detr")
    whole = seen(detector, False)
    record = TeacherRecord(whole.logits, whole.boxes_cxcywh, whole.memory, whole.memory_valid)
    slots = map_classes((*tiny.LABELS[:2], "newt"), detector.labels, {"newt": None})
    logits: Tensor = TeacherDecoder(detector, slots, ResizeConfig()).ask(record).output.logits
    assert torch.equal(logits[..., 2], torch.full_like(logits[..., 2], -10_000.0))
    assert torch.allclose(logits[..., :2], whole.logits[..., :2], atol=1e-5)
