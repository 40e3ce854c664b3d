"""Folders: plain transformers reads what is saved, bad ones are refused, pixels are prepared as the processor does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import change, make
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import SIZE
from transformers import (
    AutoModelForObjectDetection,
    ConditionalDetrImageProcessorPil,
    OwlViTConfig,
)

from qskd.checkpoints.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from qskd.config import BackboneConfig, ResizeConfig, StudentConfig
from qskd.detectors import Detector, build_student, load_detector, read_preprocessing, save_detector, to_pixels
from qskd.errors import QskdError

torch.set_num_threads(1)

LABELS = ("cat", "dog", "owl")
SQUARE = ResizeConfig(mode="square", size=64)
SHORTEST = ResizeConfig(mode="shortest_edge", size=48, longest=80)


def tiny(family: str = "conditional_detr", **changes: Any) -> Detector:
    backbone = BackboneConfig(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1))
    sizes: dict[str, Any] = {
        **{"family": family, "backbone": backbone, "width": 32, "encoder_layers": 1, "decoder_layers": 2},
        **{"heads": 4, "ffn_width": 32, "queries": 6},
    }
    return build_student(StudentConfig(**{**sizes, **changes}), LABELS, 0)


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    mask = torch.ones(2, 64, 64, dtype=torch.bool)
    mask[1, :, 40:] = False
    return {"pixels": torch.randn(2, 3, 64, 64) * mask[:, None], "mask": mask}


def train_a_little(detector: Detector, steps: int = 4) -> Detector:
    """So that weights, heads and running statistics are no longer what they started as."""
    optimizer = torch.optim.AdamW((p for p in detector.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(steps):
        output = detector(*batch().values(), with_attention=False)
        (output.logits.square().mean() + (output.boxes_cxcywh - 0.3).abs().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return detector.eval()


VARIANTS: dict[str, dict[str, Any]] = {
    "conditional": {},
    "deformable": {"family": "deformable_detr", "box_refinement": False},
    "refined": {"family": "deformable_detr", "feature_levels": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_is_loaded(tmp_path: Path, variant: str) -> None:
    detector = train_a_little(tiny(**VARIANTS[variant]))
    moved = [value for key, value in detector.state_dict().items() if key.endswith("running_var")]
    assert any(not torch.allclose(value, torch.ones_like(value), atol=0.05) for value in moved)
    save_detector(detector, tmp_path / "ours", SQUARE, extra={"recipe": "test"})
    assert json.loads((tmp_path / "ours" / "qskd.json").read_text()) == {"recipe": "test"}
    detector.model.config.auxiliary_loss = True
    detector.model.save_pretrained(tmp_path / "theirs")  # num_batches_tracked and all
    detector.model.config.auxiliary_loss = False
    assert not any("num_batches" in key for key in load_file(tmp_path / "ours" / "model.safetensors"))
    for folder in ("ours", "theirs"):
        loaded = load_detector(tmp_path / folder)
        assert not loaded.training
        assert loaded.labels == LABELS
        assert loaded.model.config.auxiliary_loss is False
        with torch.no_grad():
            ours, theirs = detector(*batch().values()), loaded(*batch().values())
        torch.testing.assert_close(theirs.logits, ours.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.boxes_cxcywh, ours.boxes_cxcywh, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2", "d_fine", "deimv2"])
def test_a_checkpoint_with_fixed_anchors_takes_images_of_any_size(family: str, tmp_path: Path) -> None:
    """transformers would keep the anchors of `anchor_image_size`, in evaluation alone."""
    folder = make(family, tmp_path / "made")
    plain = load_detector(folder)
    change(folder, {"anchor_image_size": [SIZE, SIZE]})
    fixed = load_detector(folder)
    for size in (SIZE, SIZE + 32):
        pixels, mask = torch.randn(1, 3, size, size), torch.ones(1, size, size, dtype=torch.bool)
        with torch.no_grad():
            mine, theirs = fixed(pixels, mask), plain(pixels, mask)
        assert torch.equal(mine.logits, theirs.logits)
        assert torch.equal(mine.boxes_cxcywh, theirs.boxes_cxcywh)


def test_class_heads_that_differ_by_layer_stay_apart(tmp_path: Path) -> None:
    """transformers ties the class heads of a new Deformable DETR; the published refined checkpoints have one a layer."""
    detector = tiny("deformable_detr").eval()
    heads = detector.model.class_embed
    heads[1].weight = torch.nn.Parameter(heads[0].weight.detach() + torch.randn(3, 32))
    heads[1].bias = torch.nn.Parameter(heads[0].bias.detach() + 1)
    save_detector(detector, tmp_path / "untied", SQUARE)
    with torch.no_grad():
        ours, theirs = detector(*batch().values()), load_detector(tmp_path / "untied")(*batch().values())
    torch.testing.assert_close(theirs.logits, ours.logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours.logits[0], ours.logits[1], atol=0.1)


def test_a_checkpoint_in_half_precision_runs_in_float32(tmp_path: Path) -> None:
    tiny().model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {value.dtype for value in load_detector(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize("shards", ["gone", "left behind"])
def test_of_two_saves_in_one_folder_the_weights_are_those_that_transformers_takes(shards: str, tmp_path: Path) -> None:
    """save_pretrained removes the files of an earlier save, and leaves the index that names them."""
    folder, model = saved(tmp_path / "two"), tiny().model
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    old = {file: file.read_bytes() for file in folder.glob("model-*.safetensors")}
    with torch.no_grad():
        model.class_labels_classifier.bias.fill_(7.0)
    model.save_pretrained(folder)
    assert len(old) > 1
    assert {file.name for file in folder.glob("model*")} == {"model.safetensors", "model.safetensors.index.json"}
    for file, content in old.items() if shards == "left behind" else ():
        file.write_bytes(content)
    theirs = AutoModelForObjectDetection.from_pretrained(folder).state_dict()["class_labels_classifier.bias"]
    assert torch.equal(load_detector(folder).model.class_labels_classifier.bias, theirs)
    assert bool((theirs == 7).all())


def test_saving_replaces_a_detector_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = tiny().eval()
    for _ in range(2):
        save_detector(detector, tmp_path / "a" / "best", SQUARE)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["best"]
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").touch()
    with pytest.raises(QskdError, match="other things in it"):
        save_detector(detector, tmp_path / "holiday", SQUARE)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    before = (tmp_path / "a" / "best" / "model.safetensors").read_bytes()
    monkeypatch.setattr(type(detector.model), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_detector(detector, tmp_path / "a" / "best", SQUARE)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["best"]
    assert (tmp_path / "a" / "best" / "model.safetensors").read_bytes() == before


def saved(folder: Path) -> Path:
    save_detector(tiny(), folder, SQUARE)
    return folder


def test_a_folder_with_pickles_only_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(QskdError, match=r"only pytorch_model.bin") as caught:
        load_detector(folder)
    assert "writes safetensors" in caught.value.remedy


def test_missing_and_unexpected_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path / "broken")
    state = load_file(folder / "model.safetensors")
    state["model.stray.weight"] = state.pop("class_labels_classifier.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QskdError, match=r"class_labels_classifier.weight.*model.stray.weight"):
        load_detector(folder)


def test_weights_of_other_sizes_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "other")
    state = load_file(folder / "model.safetensors")
    state["class_labels_classifier.weight"] = torch.zeros(7, 32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QskdError, match="cannot be loaded"):
        load_detector(folder)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "truncated")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(QskdError, match="cannot be loaded"):
        load_detector(folder)


def test_an_unsupported_family_names_the_supported_ones(tmp_path: Path) -> None:
    folder = saved(tmp_path / "owlvit")
    OwlViTConfig().save_pretrained(folder)
    with pytest.raises(QskdError, match=r"'owlvit'\n.*detr, conditional_detr, dab-detr"):
        load_detector(folder)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nothing", "runs/some/folder", "runs/student"])
def test_a_folder_that_is_not_there_is_said_without_asking_the_hub(path: str) -> None:
    with pytest.raises(QskdError, match="no such folder"):
        load_detector(path)


def test_a_name_that_is_neither_a_folder_nor_the_hubs_is_said_to_be_so() -> None:
    with pytest.raises(QskdError, match=r"exported: no folder here, and as a Hub name nothing .*HF_HUB_OFFLINE"):
        load_detector("exported")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QskdError, match=r"no config.json"):
        load_detector(tmp_path)


@pytest.mark.parametrize("resize", [SQUARE, SHORTEST])
def test_preprocessing_is_read_back_as_it_was_saved(tmp_path: Path, resize: ResizeConfig) -> None:
    save_detector(tiny(), tmp_path / "student", resize)
    found = read_preprocessing(tmp_path / "student")
    assert (found.resize, found.mean, found.std) == (resize, IMAGENET_MEAN, IMAGENET_STD)


def write_processor(folder: Path, said: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "conditional_detr"}))
    (folder / "preprocessor_config.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"size": 800, "max_size": 1333}, ("shortest_edge", 800, 1333)),
        ({"size": {"shortest_edge": 600}, "max_size": 900}, ("shortest_edge", 600, 900)),
        ({"size": {"height": 640, "width": 640}, "do_normalize": False}, ("square", 640, 1333)),
        ({"size": {"shortest_edge": 640, "longest_edge": 99999}}, ("shortest_edge", 640, 8192)),  # as good as no limit
    ],
)
def test_older_and_other_processors_are_understood(tmp_path: Path, said: dict[str, Any], expected: Any) -> None:
    write_processor(tmp_path, said)
    found = read_preprocessing(tmp_path)
    assert (found.resize.mode, found.resize.size, found.resize.longest) == expected
    assert found.std == (IMAGENET_STD if said.get("do_normalize", True) else (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "said",
    [
        *(
            {"size": {"height": 640, "width": 480}},
            {"size": {"height": 9000, "width": 9000}},
            {"size": {"longest_edge": 9000}},
        ),
        *({"rescale_factor": 1.0}, {"do_rescale": False}, {"do_resize": False}),
    ],
)
def test_a_processor_that_asks_for_something_else_is_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    write_processor(tmp_path, said)
    with pytest.raises(QskdError, match="image processor"):
        read_preprocessing(tmp_path)


@pytest.mark.parametrize("size", [{"height": 64, "width": 64}, {"shortest_edge": 48, "longest_edge": 80}])
def test_pixels_equal_the_image_processor_s(size: dict[str, int]) -> None:
    generator = np.random.default_rng(0)
    shapes = [(50, 70), (90, 60)]
    raw = [Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    processor = ConditionalDetrImageProcessorPil(size=size)
    theirs = processor(images=raw, return_tensors="pt")
    sizes = (
        torch.stack([mask.any(1).sum() for mask in theirs["pixel_mask"]]),
        torch.stack([mask.any(0).sum() for mask in theirs["pixel_mask"]]),
    )
    heights_widths = torch.stack(sizes, dim=1)
    images = torch.full(
        (2, *theirs["pixel_mask"].shape[1:], 3), 77, dtype=torch.uint8
    )  # what is padding must not matter
    for index, (height, width) in enumerate(heights_widths.tolist()):
        resized = raw[index].resize((width, height), Image.Resampling.BILINEAR)
        images[index, :height, :width] = torch.from_numpy(np.array(resized))
    pixel_values, pixel_mask = to_pixels(images, heights_widths, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(pixel_values, theirs["pixel_values"], atol=1e-5, rtol=1e-5)
    assert torch.equal(pixel_mask, theirs["pixel_mask"].bool())
    assert pixel_values.masked_select(~pixel_mask[:, None]).abs().sum() == 0
