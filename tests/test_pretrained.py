"""Published checkpoints as users have them: timm's ResNet under its names, old configurations, COCO's 91 slots.

None can be downloaded where these tests run. The names of their weights come from tests/fixtures (what transformers writes
with timm; tests/fixtures/make_timm.py), and the numbers of small ResNets from timm itself.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_detectors_checkpoint import batch

from qskd.checkpoints.preprocessing import IMAGENET_MEAN, Preprocessing
from qskd.checkpoints.timm_resnet import TimmResNet, dilate, rename, resnet_config
from qskd.config import BackboneConfig, StudentConfig
from qskd.config.recipe import build
from qskd.datasets.classes import map_classes
from qskd.detectors import (
    build_student,
    describe_student,
    load_detector,
    read_config,
    read_preprocessing,
    save_detector,
)
from qskd.detectors.backbone import sized_by_init
from qskd.errors import QskdError

torch.set_num_threads(1)

FIXTURES = Path(__file__).parent / "fixtures"
STEM = {"convolution": "conv1", "normalization": "bn1"}
PARTS = {"convolution": "conv", "normalization": "bn"}
OLD = {"use_timm_backbone": True, "backbone": "resnet14", "backbone_config": None, "dilation": False}  # no depths known
NEW = {"model_type": "timm_backbone", "backbone": "resnet14", "out_indices": [1, 2, 3, 4], "num_channels": 3}
KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "detr": ("facebook--detr-resnet-50", hf.DetrForObjectDetection, {}),
    "conditional": ("microsoft--conditional-detr-resnet-50", hf.ConditionalDetrForObjectDetection, {}),
    "deformable": ("SenseTime--deformable-detr", hf.DeformableDetrForObjectDetection, {}),
    "refined": ("", hf.DeformableDetrForObjectDetection, {"with_box_refine": True}),
    "two stages": ("", hf.DeformableDetrForObjectDetection, {"with_box_refine": True, "two_stage": True}),
    "dab": ("IDEA-Research--dab-detr-resnet-50", hf.DabDetrForObjectDetection, {}),
}
# 91 slots, of which some are no category: here slots 0, 12 and 26
COCO = {slot: "N/A" if slot in (0, 12, 26) else f"thing {slot}" for slot in range(91)}


def published_keys(name: str) -> set[str]:
    lines = (line.split(": ") for line in (FIXTURES / f"{name}.keys").read_text().splitlines())
    return {f"{module}.{leaf}" for module, leaves in lines for leaf in leaves.split()}


def as_timm(name: str) -> str:
    """The name in timm's ResNet of a weight of transformers'."""
    name = re.sub(r"embedder\.embedder\.(\w+)", lambda m: STEM[m[1]], name)
    if found := re.search(
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.(?:layer\.(\d)|shortcut)\.(convolution|normalization)", name
    ):
        stage, layer, part, kind = found.groups()
        last = f"downsample.{int(kind == 'normalization')}" if part is None else f"{PARTS[kind]}{int(part) + 1}"
        name = f"{name[: found.start()]}layer{int(stage) + 1}.{layer}.{last}{name[found.end() :]}"
    return name


def detector(kind: str, depths: tuple[int, ...] = (1, 1, 1, 1), layers: int = 1) -> Any:
    """A published architecture in its number of layers, but narrow; every number of it random."""
    _, model_class, more = KINDS[kind]
    stages = ["stage2", "stage3", "stage4"] if model_class is hf.DeformableDetrForObjectDetection else ["stage4"]
    resnet = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 16, 16, 16],
        depths=list(depths),
        layer_type="bottleneck",
        out_features=stages,
    )
    width = {"hidden_size" if kind == "dab" else "d_model": 32}
    config = model_class.config_class(
        **{
            "backbone_config": resnet,
            "encoder_layers": layers,
            "decoder_layers": layers,
            "num_queries": 12,
            "id2label": COCO,
        },
        **{"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
        **{**width, **more, **({"two_stage_num_proposals": 12} if kind == "two stages" else {})},
    )
    torch.manual_seed(4)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if name.endswith("running_var") else value.add_(0.05 * torch.randn_like(value))
    return model


def publish(model: Any, folder: Path, kind: str, **config: Any) -> dict[str, torch.Tensor]:
    """Save a model on transformers' ResNet as if it had been trained on timm's: its weights' names and its configuration."""
    model.save_pretrained(folder)
    state = {as_timm(name): value for name, value in load_file(folder / "model.safetensors").items()}
    if kind == "dab":
        state = {name.replace("conv_encoder.model.", "conv_encoder.model._backbone."): v for name, v in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    for gone in ("backbone_config", "dilation"):
        said.pop(gone, None)
    (folder / "config.json").write_text(json.dumps(said | (config or OLD)))
    hf.DetrImageProcessorPil().save_pretrained(folder)
    return state


def outputs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    given = batch()
    with torch.no_grad():
        said = model(given["pixels"], pixel_mask=given["mask"])
    return said.logits, said.pred_boxes


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_architecture_loads_without_timm_and_says_exactly_the_same(tmp_path: Path, kind: str) -> None:
    model = detector(kind, (3, 4, 6, 3), layers=6)
    state = publish(model, tmp_path, kind, **{**OLD, "backbone": "resnet50"})
    if KINDS[kind][0]:
        assert set(state) == published_keys(KINDS[kind][0])
    for mine, expected in zip(outputs(load_detector(tmp_path).model), outputs(model), strict=True):
        assert torch.equal(mine, expected)
    assert not {"timm", "torchvision"} & set(sys.modules)


@pytest.mark.parametrize(
    "config",
    [
        OLD,
        {"use_timm_backbone": True, "backbone": "resnet14"},
        {**OLD, "backbone_kwargs": None},
        {**OLD, "backbone_kwargs": {"out_indices": [1, 2, 3, 4], "in_chans": 3}, "use_pretrained_backbone": True},
        {"backbone_config": NEW},
        {"backbone_config": {**NEW, "backbone": "resnet14.a1_in1k", "out_indices": [-1]}},
    ],
)
def test_every_way_to_name_the_backbone_is_understood_without_the_hub(tmp_path: Path, config: dict[str, Any]) -> None:
    model = detector("conditional")
    publish(model, tmp_path, "conditional", **config)
    assert torch.equal(outputs(load_detector(tmp_path).model)[0], outputs(model)[0])


def test_copies_of_tied_heads_and_batch_counters_are_no_strangers(tmp_path: Path) -> None:
    """What older files have besides: every tied head of Deformable DETR, and the counters DETR's own files kept."""
    for kind in ("deformable", "dab", "detr"):
        model = detector(kind, layers=2)
        folder = tmp_path / kind
        state = publish(model, folder, kind)
        full = {name: value.clone() for name, value in state.items()}
        for name, value in state.items():
            if kind == "deformable" and name.startswith(("class_embed.0.", "bbox_embed.0.")):
                full[name.replace("embed.0.", "embed.1.")] = value.clone()
            if kind == "dab" and name.startswith("bbox_predictor."):
                full[f"model.decoder.bbox_embed.{name.removeprefix('bbox_predictor.')}"] = value.clone()
            if name.endswith("downsample.1.weight"):
                full[name.replace("weight", "num_batches_tracked")] = torch.tensor(5)
        assert len(full) > len(state)
        save_file(full, folder / "model.safetensors", metadata={"format": "pt"})
        assert torch.equal(outputs(load_detector(folder).model)[0], outputs(model)[0])


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_maps_equal_those_of_timm_dilated_or_not(kind: str, output_stride: int) -> None:
    known = load_file(FIXTURES / "timm_resnet.safetensors")
    place = "model.backbone.conv_encoder.model."
    weights = {
        place + name.removeprefix(f"{kind}."): value.float() if value.is_floating_point() else value
        for name, value in known.items()
        if name.startswith(f"{kind}.") and ".maps." not in name
    }
    state = rename(weights, "here")
    config = resnet_config(state, TimmResNet("resnet26", (2, 3, 4), output_stride), "here")
    assert config.layer_type == kind
    resnet = hf.ResNetBackbone(config).eval()
    missing, unexpected = resnet.load_state_dict({n.removeprefix(place): v for n, v in state.items()}, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    dilate(resnet, output_stride, "here")
    with torch.no_grad():
        maps = resnet(known["image"]).feature_maps
    for index, map_ in zip((2, 3, 4), maps, strict=True):
        torch.testing.assert_close(map_, known[f"{kind}.maps.{output_stride}.{index}"], atol=1e-4, rtol=1e-5)


def test_a_dilated_checkpoint_teaches_but_starts_no_student(tmp_path: Path) -> None:
    publish(detector("detr"), tmp_path / "dc5", "detr", **{**OLD, "dilation": True})
    teacher = load_detector(tmp_path / "dc5")
    assert teacher(*batch().values()).memory[0].shape[-2:] == (4, 4)  # of 64 pixels at stride 16
    with pytest.raises(QskdError, match=r"dilated \(DC5\)"):
        build_student(StudentConfig(init=str(tmp_path / "dc5")), ["thing 1"], 0)
    with pytest.raises(QskdError, match="dilated ResNet"):
        save_detector(teacher, tmp_path / "saved", StudentConfig().resize)


def test_a_student_that_starts_from_it_is_saved_as_plain_transformers(tmp_path: Path) -> None:
    publish(detector("conditional", layers=2), tmp_path / "published", "conditional")
    student = build_student(StudentConfig(init=str(tmp_path / "published")), ["thing 3", "new"], 0).eval()
    save_detector(student, tmp_path / "student", StudentConfig().resize)
    plain, info = hf.AutoModelForObjectDetection.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(outputs(plain.eval())[0], outputs(student.model)[0])


def test_the_91_slots_of_coco_reach_the_dataset_by_name(tmp_path: Path) -> None:
    publish(detector("detr"), tmp_path, "detr")
    teacher = load_detector(tmp_path)
    assert teacher.labels == tuple(COCO.values())
    assert map_classes(["thing 90", "Thing-1"], teacher.labels, {}) == (90, 1)
    assert teacher(*batch().values()).logits.shape[-1] == 91


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        ({"drop": "model.encoder.layers.0.fc1.bias"}, r"missing: 1 \(model.encoder.layers.0.*fc1.bias\)"),
        ({"drop": "model.backbone.conv_encoder.model.layer3.0.bn2.bias"}, r"missing: 1 \(model.backbone"),
        ({"add": "model.decoder.extra.weight"}, r"unexpected: 1 \(model.decoder.extra.weight\)"),
        ({"add": "model.backbone.conv_encoder.model.layer1.0.se.fc1.weight"}, "an ordinary ResNet has not"),
        ({"name": "resnet101"}, r"backbone of \[1, 1, 1, 1\] layers.*\n.*resnet101.*\[3, 4, 23, 3\]"),
        ({"name": "resnetblur50"}, "timm's resnetblur50, and timm is not installed"),
        (
            {"architecture": "DetrForSegmentation", "drop": "bbox_predictor.layers.0.bias"},
            "names a DetrForSegmentation",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, spoil: dict[str, str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = {**OLD, "backbone": spoil.get("name", "resnet14")}
    state = publish(detector("detr"), tmp_path, "detr", **config)
    state.pop(spoil.get("drop", ""), None)
    if "add" in spoil:
        state[spoil["add"]] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if "architecture" in spoil:
        said = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(said | {"architectures": [spoil["architecture"]]}))
    with pytest.raises(QskdError, match=complaint):
        load_detector(tmp_path)


def processor(folder: Path, said: dict[str, Any] | None, model_type: str = "detr") -> Preprocessing:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if said is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return read_preprocessing(folder)


def test_the_published_processor_of_detr_is_understood(tmp_path: Path) -> None:
    """The form of 2021: a feature extractor, a number for a size."""
    found = processor(
        tmp_path,
        {
            **{"do_normalize": True, "do_resize": True, "feature_extractor_type": "DetrFeatureExtractor"},
            **{"format": "coco_detection", "image_mean": list(IMAGENET_MEAN), "image_std": [0.229, 0.224, 0.225]},
            **{"max_size": 1333, "size": 800},
        },
    )
    assert (found.resize.mode, found.resize.size, found.resize.longest) == ("shortest_edge", 800, 1333)
    assert found.mean == IMAGENET_MEAN


@pytest.mark.parametrize(("model_type", "size"), [("detr", 800), ("rt_detr", 640), ("d_fine", 640)])
def test_without_a_processor_its_family_s_is_assumed_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model_type: str, size: int
) -> None:
    found = processor(tmp_path, None, model_type)
    assert found.resize.size == size
    assert (found.mean == IMAGENET_MEAN) == (model_type == "detr")  # RT-DETR and D-FINE see pixels in 0..1
    assert "NO IMAGE PROCESSOR" in caplog.text
    assert str(size) in caplog.text


def test_what_a_processor_leaves_out_is_its_family_s(tmp_path: Path) -> None:
    assert processor(tmp_path, {"size": {"height": 512, "width": 512}}, "rt_detr").mean == (0.0, 0.0, 0.0)
    assert processor(tmp_path, {"size": {"height": 512, "width": 512}}, "detr").mean == IMAGENET_MEAN
    for size in ({"max_height": 700, "max_width": 700}, {"longest_edge": 700}):  # the latter is Table Transformer's
        within = processor(tmp_path, {"size": size}).resize
        assert (within.mode, within.size, within.longest) == ("shortest_edge", 700, 700)


def test_the_recipe_s_resize_is_a_way_out_of_a_size_that_is_not_done_here(tmp_path: Path) -> None:
    mine = StudentConfig().resize
    with pytest.raises(QskdError, match=r"teacher\.resize"):
        processor(tmp_path, {"size": {"height": 640, "width": 480}, "image_mean": [0.1, 0.2, 0.3]})
    found = read_preprocessing(tmp_path, mine)
    assert (found.resize, found.mean) == (mine, (0.1, 0.2, 0.3))


def test_a_hub_repository_with_pickles_only_is_refused_with_the_way_to_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Hub's cache has it: a configuration, no safetensors."""
    publish(detector("detr"), tmp_path, "detr")
    monkeypatch.setattr("qskd.detectors.checkpoint.check_path", lambda path: str(path))  # a name, for all it knows
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(QskdError, match=r"no model.safetensors in it[\s\S]*use_safetensors=False"):
        load_detector(tmp_path)


def test_reading_a_configuration_needs_no_weights(tmp_path: Path) -> None:
    publish(detector("detr"), tmp_path, "detr")
    (tmp_path / "model.safetensors").unlink()
    assert read_config(tmp_path).num_labels == 91


def test_a_student_on_timms_network_is_refused_with_the_reason_and_what_to_take(tmp_path: Path) -> None:
    """Wherever it is asked for, whether timm is there or not: the saved student would need it."""
    reason = r"(?s)would need timm, and torchvision, wherever it is loaded.*transformers' own: resnet, .*hgnet_v2"
    for kind in ("timm_backbone", "timm_wrapper"):
        with pytest.raises(QskdError, match=reason):
            build({"student": {"backbone": {"type": kind}}})
    publish(detector("detr"), tmp_path, "detr", **OLD | {"backbone": "mobilenetv3_small_100"})
    start = build({"student": {"init": str(tmp_path)}}).student
    for ask in (lambda: build_student(start, ("one",), 0), lambda: describe_student(start, 1)):
        with pytest.raises(QskdError, match=rf"(?s)timm's mobilenetv3_small_100.*{reason[4:]}"):
            ask()
    for said in (
        {"architecture": "mobilenetv3_small_100"},
        {"model_type": "timm_wrapper", "architecture": "resnet50d"},
    ):
        (tmp_path / "config.json").write_text(json.dumps(said))
        with pytest.raises(QskdError, match=reason):
            sized_by_init(BackboneConfig(init=str(tmp_path)))
