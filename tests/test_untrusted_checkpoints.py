"""A checkpoint's files can't make us call out, run code or read elsewhere."""

from __future__ import annotations

import http.server
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change, copied, make
from safetensors.torch import load_file, save_file
from tiny import LABELS, STUDENT, silent_student

from qskd.config import StudentConfig
from qskd.detectors import FAMILIES, load_detector, read_config
from qskd.errors import QskdError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make(family, tmp_path_factory.mktemp("made") / family) for family in FAMILIES}


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Path:
    return copied(saved["conditional_detr"], tmp_path / "checkpoint")


EVIL = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"

# Field by field what transformers 5 acts upon: another repository, a kernel, code, a quantiser, another file.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": {"AutoConfig": "configuration_evil.C", "AutoModelForObjectDetection": "modeling_evil.M"}},
    "auto_map elsewhere": {"auto_map": {"AutoModel": "other/repo--modeling_evil.M"}, "trust_remote_code": True},
    "custom pipelines": {"custom_pipelines": {"object-detection": {"impl": "modeling_evil.P"}}},
    "kernels": {"use_kernels": True, "kernel_config": {"Linear": "other/repo:K"}, "disable_custom_kernels": False},
    "fusion": {"fusion_config": {"patch_embeddings": True}},
    "pretrained backbone": {"use_pretrained_backbone": True, "pretrained_backbone_name_or_path": "other/repo"},
    "name": {"_name_or_path": "other/repo", "name_or_path": "other/repo", "_commit_hash": "0" * 40},
    "other weights": {"transformers_weights": "../elsewhere.safetensors", "extra_files": ["more.safetensors"]},
    "other configuration": {"configuration_files": ["config.9.9.9.json"]},
    "dtype": {"dtype": "os", "torch_dtype": "ops"},
    "other flash attention": {"_attn_implementation": "flash_attention_2"},
    "internal attention": {"_attn_implementation_internal": "other/repo", "_experts_implementation": "other/repo"},
    "text": {"text_config": {"model_type": "other", "_attn_implementation": "other/repo"}, "vision_config": {}},
    "generation": {"generation_config": {"custom_generate": "other/repo"}, "max_length": 7},
    "distribution": {"distributed_config": {"tp_size": 2}, "base_model_tp_plan": {"*": "colwise"}},
    "layers": {
        "per_layer_config": {"0": {"dropout": 1.0}},
        "sub_configs": {"a": "b"},
        "attribute_map": {"d_model": "x"},
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "backbone elsewhere": ({"backbone": "other/repo", "use_timm_backbone": False, "backbone_config": None}, "backbone"),
    "with arguments": (
        {"backbone": "o/r", "use_timm_backbone": False, "backbone_kwargs": {"a": 1}, "backbone_config": None},
        "backbone",
    ),
    "a kernel": ({"_attn_implementation": "kernels-community/flash-attn"}, "_attn_implementation"),
    "a kernel too": ({"attn_implementation": "other/repo:attention"}, "attn_implementation"),
    "kernels by part": ({"_attn_implementation": {"": "other/repo"}}, "_attn_implementation"),
    "quantised": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "quantization_config",
    ),
    "compressed": ({"compression_config": {"format": "other"}}, "compression_config"),
    "timm from the hub": (
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:other/repo"}},
        "backbone_config.backbone",
    ),
    "timm from a folder": (
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "local-dir:/etc"}},
        "backbone_config.backbone",
    ),
    "unknown backbone": ({"backbone_config": {"model_type": "other/repo"}}, "backbone_config"),
}


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Something that listens where the Hub would: its address, and what it was asked."""
    asked: list[str] = []

    class Recorder(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path} {self.headers.get('authorization')}")
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    thread.join()
    server.server_close()


LOADS = """
import json, os, sys, urllib.request, warnings
from pathlib import Path
from qskd.config import BackboneConfig, StudentConfig
from qskd.detectors import build_student, checkpoint_digests, load_detector, read_preprocessing
from qskd.errors import QskdError
warnings.simplefilter("ignore")
said = {}
for place in sys.argv[2:]:
    try:
        if json.loads((Path(place) / "config.json").read_text())["model_type"] == "resnet":
            sizes = dict(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1))
            build_student(StudentConfig(backbone=BackboneConfig(init=place, **sizes), width=32, heads=4), ["cat"], 0)
        else:
            load_detector(place), read_preprocessing(place), checkpoint_digests(place)
        said[place] = "loaded"
    except QskdError as error:
        said[place] = str(error)
try:
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/now-a-name")
except OSError:
    pass
try:
    load_detector("someone/asked-for")  # a name that the user gives: the recorder hears of it, so it does hear
except QskdError:
    pass
Path(sys.argv[1]).write_text(json.dumps(said))
"""


def test_no_field_of_a_folder_asks_the_hub_or_runs_code(
    saved: dict[str, Path], tmp_path: Path, hub: tuple[str, list[str]]
) -> None:
    expected: dict[str, str] = {}

    def prepared(name: str, source: Path, words: str, fields: dict[str, Any]) -> Path:
        place = copied(source, tmp_path / name.replace(" ", "-"))
        expected[str(place)] = words
        change(place, fields)
        (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other/repo"}))
        (place / "generation_config.json").write_text(json.dumps({"custom_generate": "other/repo"}))
        for file in ("modeling_evil.py", "configuration_evil.py", "generate.py"):
            (place / file).write_text(EVIL)
        evil = {"image_processor_type": "Evil", "feature_extractor_type": "Evil", "processor_class": "Evil"}
        evil["auto_map"] = {"AutoImageProcessor": "modeling_evil.P"}
        if (place / "preprocessor_config.json").exists():
            change(place, evil, "preprocessor_config.json")
        return place

    everything: dict[str, Any] = {}
    for fields in LEFT_OUT.values():
        everything |= fields
    for family, source in saved.items():
        backbone = json.loads((source / "config.json").read_text())["backbone_config"]
        prepared(f"{family} all", source, "loaded", everything | {"backbone_config": backbone | everything})
        for name, (fields, field) in REFUSED.items():
            prepared(f"{family} {name}", source, f"{field}: ", fields)
            if "backbone" not in field:
                prepared(f"{family} inside {name}", source, f"{field}: ", {"backbone_config": backbone | fields})
    for name, fields in LEFT_OUT.items():
        prepared(f"only {name}", saved["detr"], "loaded", fields)
    resnet = tmp_path / "resnet"
    student = silent_student(StudentConfig.model_validate(STUDENT), LABELS, 0)
    student.backbone.get_submodule("model").save_pretrained(resnet)
    prepared("resnet all", resnet, "loaded", everything)
    address, asked = hub
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_HOME")}
    environment |= {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_secret",
        "HF_HOME": str(tmp_path / "home"),
    }
    answers = tmp_path / "answers.json"
    subprocess.run([sys.executable, "-c", LOADS, str(answers), *expected], env=environment, check=True, timeout=300)
    found = json.loads(answers.read_text())
    assert {place: words for place, words in expected.items() if words not in found[place]} == {}
    assert asked[0].startswith("GET /now-a-name")  # nothing before
    with_token = [line for line in asked if "hf_secret" in line]
    assert with_token
    assert [line for line in with_token if "/someone/asked-for/" not in line] == []
    assert list(tmp_path.rglob("ran")) == []


@pytest.mark.parametrize("family", ["detr", "rt_detr"])
def test_what_is_left_out_changes_no_output(saved: dict[str, Path], tmp_path: Path, family: str) -> None:
    place = copied(saved[family], tmp_path / "other")
    for fields in LEFT_OUT.values():
        change(place, fields)
    pixels, mask = torch.rand(1, 3, 64, 64), torch.ones(1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        ours, theirs = (load_detector(one)(pixels, mask) for one in (saved[family], place))
    assert torch.equal(ours.logits, theirs.logits)


def test_plain_attention_may_be_chosen(folder: Path) -> None:
    for name in ("eager", "sdpa"):
        change(folder, {"_attn_implementation": name})
        assert load_detector(folder).model.config._attn_implementation == name
    change(folder, {"_attn_implementation": "flash_attention_2"})
    assert load_detector(folder).model.config._attn_implementation == "sdpa"


def test_a_checkpoint_with_an_adapter_beside_it_is_read_without_the_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")
    load_detector(folder)


# --- an index of shards ---------------------------------------------------------------------------------------------
def sharded(folder: Path, name: str, moved: Path | None = None) -> None:
    """Weights in two files, the second called `name` in the index; it lies at `moved` if it is given."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first = dict(sorted(state.items())[:5])
    rest = {key: value for key, value in state.items() if key not in first}
    save_file(first, folder / "a.safetensors", metadata={"format": "pt"})
    save_file(rest, moved or folder / name, metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(first, "a.safetensors") | dict.fromkeys(rest, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_inside_the_folder_load(folder: Path, tmp_path: Path) -> None:
    expected = load_detector(folder).state_dict()
    (folder / "below").mkdir()
    sharded(folder, "below/b.safetensors")
    found = load_detector(folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{outside}", "below/../../outside.safetensors", "~/b.safetensors"]
)
def test_an_index_names_no_file_outside(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside.safetensors"
    sharded(folder, name.format(outside=outside), outside)
    with pytest.raises(
        QskdError, match=r"index\.json: weight_map: .*b\.safetensors|weight_map: .*outside\.safetensors"
    ):
        load_detector(folder)


def test_a_link_in_an_index_that_leads_out_is_refused_and_the_hub_s_cache_works(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    sharded(folder, "b.safetensors", outside)
    (folder / "b.safetensors").symlink_to(outside)
    with pytest.raises(QskdError, match=r"b.safetensors, a link to .*outside"):
        load_detector(folder)
    repository = tmp_path / "models--some--one"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert load_detector(snapshot).labels == LABELS


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"weight_map": []}',
        '{"weight_map": {"a": 7}}',
        '{"weight_map": {"a": "x.bin"}}',
        "[" * 100_000,
        "{}",
    ],
)
def test_a_malformed_index_is_refused_by_name(folder: Path, content: str) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")  # else it goes before the index
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(QskdError, match=r"model\.safetensors\.index\.json"):
        load_detector(folder)


def test_code_of_a_checkpoint_that_is_left_out_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder, LEFT_OUT["auto_map"])
    with caplog.at_level(logging.INFO):
        read_config(folder)
    assert "auto_map is left out: no code of a checkpoint is run" in caplog.text
