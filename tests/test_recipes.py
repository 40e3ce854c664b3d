"""The recipes for COCO: each tried by a dry run, offline, with small networks of the same kinds as the published ones it names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import silent_student
from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config, ResNetBackbone, ResNetConfig

from pipelines.run.resolve import resolve
from pipelines.training import driver, estimate
from qskd.config import Config, ResizeConfig, StudentConfig
from qskd.config.recipe import load
from qskd.datasets.manifest import load_manifest
from qskd.detectors import Detector, save_detector
from qskd.from_recipe import make_student
from qskd.training.step import Training

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
BACKBONE: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
SMALL: dict[str, Any] = {
    "width": 32,
    "heads": 4,
    "ffn_width": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "queries": 6,
}
SQUARE = {"mode": "square", "size": 64}
# What each recipe's authors train with: (learning rate, weight decay) of all parameter groups, epochs, images of a batch.
ORIGINAL: Mapping[str, tuple[set[tuple[float, float]], int, int]] = {
    "coco_conditional_r18": ({(1e-4, 1e-4), (1e-5, 1e-4)}, 50, 16),
    "coco_deformable_r18": ({(2e-4, 1e-4), (2e-5, 1e-4)}, 50, 32),
    "coco_rtdetr_r18": ({(1e-4, 1e-4), (1e-4, 0.0), (1e-5, 1e-4), (1e-5, 0.0)}, 72, 16),
    "coco_dfine_s": ({(1e-4, 1e-4), (1e-4, 0.0), (5e-5, 1e-4), (5e-5, 0.0)}, 72, 64),
}


def hgnet(labels: tuple[str, ...]) -> Detector:
    """A D-FINE on a small HGNetV2, as its published checkpoints are."""
    channels = [8, 16, 16, 16]
    backbone = HGNetV2Config(
        **{"stem_channels": [3, 8, 8], "stage_in_channels": [8, *channels[:3]], "stage_mid_channels": [8] * 4},
        **{"stage_out_channels": channels, "stage_num_blocks": [1] * 4, "stage_numb_of_layers": [1] * 4},
        **{"hidden_sizes": channels, "depths": [1] * 4, "embedding_size": 8, "use_learnable_affine_block": True},
        out_features=["stage2", "stage3", "stage4"],
    )
    sizes = {"d_model": 32, "encoder_hidden_dim": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 6}
    config = DFineConfig(
        **{
            **sizes,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_layers": 1,
            "decoder_layers": 2,
        },
        **{"backbone_config": backbone, "encoder_in_channels": channels[1:], "decoder_in_channels": [32] * 3},
        **{"id2label": dict(enumerate(labels)), "label2id": {name: slot for slot, name in enumerate(labels)}},
    )
    return Detector(DFineForObjectDetection(config))


@pytest.fixture(scope="module")
def alike(tiny_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """resnet, and a teacher for each recipe by its name; objects365, which knows one of the classes only."""
    root = tmp_path_factory.mktemp("alike")
    torch.manual_seed(0)
    ResNetBackbone(ResNetConfig(**BACKBONE)).save_pretrained(root / "resnet")
    labels = load_manifest(str(tiny_folders / "train")).labels
    families = {
        "coco_conditional_r18": "conditional_detr",
        "coco_deformable_r18": "deformable_detr",
        "coco_rtdetr_r18": "rt_detr",
    }
    for name, family in families.items():
        levels = 1 if family == "conditional_detr" else 3
        tree = {**SMALL, "family": family, "backbone": BACKBONE, "feature_levels": levels, "resize": SQUARE}
        save_detector(
            silent_student(StudentConfig.model_validate(tree), labels, 1).eval(), root / name, ResizeConfig(**SQUARE)
        )
    save_detector(hgnet(tuple(labels)).eval(), root / "coco_dfine_s", ResizeConfig(**SQUARE))
    save_detector(hgnet((labels[0], "Sneakers", "Chair")).eval(), root / "objects365", ResizeConfig(**SQUARE))
    return root


def overrides(name: str, alike: Path, here: Path, tmp_path: Path) -> list[str]:
    """The recipe's fields that make it small and local; all else is the recipe's."""
    student = {**SMALL, "backbone.hidden_sizes": BACKBONE["hidden_sizes"], "backbone.depths": BACKBONE["depths"]}
    student |= {"backbone.embedding_size": 8, "backbone.init": str(alike / "resnet"), "resize.size": 64}
    if name == "coco_dfine_s":
        student = {"init": str(alike / "objects365")}
    return [
        *(f"data.{split}={here / split}" for split in ("train", "val")),
        *(f"teacher.path={alike / name}", f"output={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/none.db"),
        *(f"student.{field}={json.dumps(value)}" for field, value in student.items()),
    ]


@pytest.mark.parametrize("name", ORIGINAL)
def test_a_recipe_for_coco_is_tried_by_a_dry_run_offline(
    name: str,
    alike: Path,
    tiny_folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "BUDGET_S", 0.1)  # a few steps are enough here
    recipe = str(CONFIGS / f"{name}.yaml")
    small = [*overrides(name, alike, tiny_folders, tmp_path), "training.batch_size=2"]
    driver.start("distill", recipe, small, dry_run=True)
    said = capsys.readouterr().out
    assert f"= {ORIGINAL[name][1]} epochs of" in said
    assert "where no cache is yet" in said
    assert "tried here on cpu" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ORIGINAL)
def test_a_recipe_for_coco_has_its_authors_rates_decay_and_frozen_stages(
    name: str, alike: Path, tiny_folders: Path, tmp_path: Path
) -> None:
    config: Config = resolve(load(CONFIGS / f"{name}.yaml", overrides(name, alike, tiny_folders, tmp_path)), "distill")
    groups, epochs, batch_size = ORIGINAL[name]
    assert (config.training.epochs, config.training.batch_size) == (epochs, batch_size)
    student = make_student(config, load_manifest(config.data.train).labels)
    training = Training(config, student, None, 100, torch.device("cpu"))
    rate = config.training.learning_rate
    made = {(round(rate * group["scale"], 12), group["weight_decay"]) for group in training.optimizer.param_groups}
    assert made == groups
    resnet = student.backbone.get_submodule("model")
    stem = {each.requires_grad for each in resnet.get_submodule("embedder").parameters()}
    assert stem == {name in ("coco_rtdetr_r18", "coco_dfine_s")}


@pytest.mark.parametrize("name", ORIGINAL)
def test_a_recipe_for_coco_says_where_its_numbers_are_from_and_that_nobody_has_run_it(name: str) -> None:
    head = (CONFIGS / f"{name}.yaml").read_text().partition("\nname:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for said in ("#   command:", "#   cache:", "#   schedule:", "otherwise than theirs", "nobody has run this recipe"):
        assert said in head


def recipes_of_the_manual() -> list[tuple[str, str]]:
    """(page, YAML) of each block that is a whole recipe."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [
        (page.name, block) for page in pages for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S)
    ]
    return [(page, block) for page, block in blocks if re.search(r"^name: ", block, re.M) and "..." not in block]


@pytest.mark.parametrize(("page", "text"), recipes_of_the_manual(), ids=lambda value: value[:24].replace("\n", " "))
def test_a_recipe_of_the_manual_is_one(page: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    load(tmp_path / "recipe.yaml", [])
