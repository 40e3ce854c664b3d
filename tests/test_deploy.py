"""cluster.yaml passes Ray's own checks, everything names the tested versions, and a job's upload stays small."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cluster.environment import _for_workers, in_a_job
from pipelines.cluster.room import MOST_READERS
from pipelines.feed.stream import keep_bytes_for
from qskd import __version__
from qskd.config.recipe import load

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
PINNED = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
KUBERAY = sorted((ROOT / "deploy" / "kuberay").glob("*.yaml"))
JOBS = [path for path in KUBERAY if path.name.startswith("job-")]

# The fields of KubeRay 1.6's RayCluster and RayJob, as its API reference lists them: their CRD schema is in no package that
# could be installed here.
CLUSTER_FIELDS = {"authOptions", "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "rayVersion"}
CLUSTER_FIELDS |= {"enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec", "workerGroupSpecs"}
AUTOSCALER_FIELDS = {"resources", "image", "imagePullPolicy", "securityContext", "idleTimeoutSeconds", "upscalingMode"}
AUTOSCALER_FIELDS |= {"version", "env", "envFrom", "volumeMounts"}
HEAD_FIELDS = {"template", "headService", "enableIngress", "resources", "labels", "rayStartParams", "serviceType"}
WORKER_FIELDS = {"suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "resources"}
WORKER_FIELDS |= {"labels", "rayStartParams", "template", "scaleStrategy", "numOfHosts"}
JOB_FIELDS = {"activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "suspend"}
JOB_FIELDS |= {"clusterSelector", "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML"}
JOB_FIELDS |= {"jobId", "submissionMode", "entrypointResources", "entrypointNumCpus", "entrypointNumGpus"}
JOB_FIELDS |= {"ttlSecondsAfterFinished", "shutdownAfterJobFinishes"}


def ray_cluster() -> dict[str, Any]:
    """The manifest of the RayCluster; a NetworkPolicy is beside it."""
    manifest, _policy = yaml.safe_load_all((ROOT / "deploy" / "kuberay" / "raycluster.yaml").read_text())
    return dict(manifest)


def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(CLUSTER)
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu"]["max_workers"] == 8
    with pytest.raises(Exception, match="Additional properties"):  # the check can fail
        validate_config({**prepared, "idle_timeout": 5})


def test_the_head_takes_no_work_and_gpus_start_from_zero() -> None:
    types = CLUSTER["available_node_types"]
    assert types[CLUSTER["head_node_type"]]["resources"]["CPU"] == 0
    assert "GPU" not in types[CLUSTER["head_node_type"]]["resources"]
    for name, node in types.items():
        if name != CLUSTER["head_node_type"]:
            assert node["min_workers"] == 0
            assert ("gpu" in name) == ("GPU" in node["resources"])
        assert ("spot" in name or name == "cpu") == ("InstanceMarketOptions" in node["node_config"])
        assert node["node_config"]["IamInstanceProfile"]  # how each node reaches the bucket


def test_a_job_that_is_stopped_gets_the_time_that_a_sweep_needs_to_end() -> None:
    (_, start) = CLUSTER["head_start_ray_commands"]
    assert re.search(r"RAY_JOB_STOP_WAIT_TIME_S=60 ray start --head ", start)
    (head,) = ray_cluster()["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "60"} in head["env"]


def test_everything_names_the_tested_ray_and_this_release() -> None:
    ray = PINNED["ray"]
    assert importlib.metadata.version("ray") == ray
    texts = {path: path.read_text() for path in (ROOT / "cluster.yaml", ROOT / "deploy" / "Dockerfile", *KUBERAY)}
    for path, text in texts.items():
        for tag in re.findall(r"rayproject/ray:(\S+)", text):
            assert re.fullmatch(rf"{re.escape(ray)}-py311(-gpu)?", tag), f"{path}: {tag}"
        for version, of_ray in re.findall(r"qskd:([\d.]+)-ray([\d.]+)\b", text):
            assert (version, of_ray) == (__version__, ray), path
    assert set(re.findall(r"rayproject/ray:(\S+)", texts[ROOT / "cluster.yaml"])) == {
        f"{ray}-py311",
        f"{ray}-py311-gpu",
    }
    manifest = ray_cluster()
    assert manifest["spec"]["rayVersion"] == ray


def check_pod(template: dict[str, Any]) -> dict[str, Any]:
    """A pod template's one container, its volumes looked at."""
    (container,) = template["spec"]["containers"]
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    # Ray reads what a pod has from its limits; an autoscaler that thinks otherwise starts the wrong ones.
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert all(isinstance(value, str) for value in container["resources"]["limits"].values())
    assert all(isinstance(entry["value"], str) for entry in container["env"])
    return dict(container)


def test_the_kuberay_cluster_has_kuberays_fields_and_the_same_shape() -> None:
    manifest = ray_cluster()
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCluster")
    spec = manifest["spec"]
    assert set(spec) <= CLUSTER_FIELDS
    assert set(spec["autoscalerOptions"]) <= AUTOSCALER_FIELDS
    assert set(spec["headGroupSpec"]) <= HEAD_FIELDS
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in check_pod(spec["headGroupSpec"]["template"])["resources"]["limits"]
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= WORKER_FIELDS
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert group["minReplicas"] == 0 <= group["replicas"] <= group["maxReplicas"]
        limits = check_pod(group["template"])["resources"]["limits"]
        like = CLUSTER["available_node_types"][group["groupName"]]
        assert int(limits["cpu"]) == like["resources"]["CPU"]
        assert int(limits.get("nvidia.com/gpu", 0)) == like["resources"].get("GPU", 0)
        assert group["maxReplicas"] == like["max_workers"]


def test_rays_object_store_fits_into_each_pods_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not, Ray lays it on the pod's disk, and says that this harms performance."""
    import ray._common.utils as common
    import ray._private.services as services
    import ray._private.utils as utils

    spec = ray_cluster()["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (shared,) = (volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "shm")
        memory, size = (
            int(text.removesuffix("Gi")) * 2**30
            for text in (pod["containers"][0]["resources"]["limits"]["memory"], shared)
        )
        monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda size=size: size)
        monkeypatch.setattr(common, "get_system_memory", lambda *_, memory=memory, **__: memory)
        store = utils.resolve_object_store_memory(memory)
        assert services.determine_plasma_store_config(store, "/tmp")[0] == "/dev/shm"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_kuberay_jobs_run_a_verb_with_the_one_runtime_env(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    assert set(spec) <= JOB_FIELDS
    assert spec["clusterSelector"] == {"ray.io/cluster": "qskd"}
    said = yaml.safe_load(spec["runtimeEnvYAML"])
    said["env_vars"].pop("MLFLOW_TRACKING_URI")
    assert said == yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
    words = spec["entrypoint"].split()
    assert words[:2] == ["python", "-m"]
    assert (ROOT / f"{words[2].replace('.', '/')}.py").exists()
    load(None, [words[i + 1] for i, word in enumerate(words) if word == "--set"])  # the recipe knows these fields


def test_the_mlflow_server_is_where_the_jobs_look_for_it() -> None:
    claim, deployment, service, _policy = yaml.safe_load_all((ROOT / "deploy" / "kuberay" / "mlflow.yaml").read_text())
    pod = deployment["spec"]["template"]
    (port,) = service["spec"]["ports"]
    (container,) = pod["spec"]["containers"]
    address = f"{service['metadata']['name']}:{port['port']}"
    for path in JOBS:
        said = yaml.safe_load(yaml.safe_load(path.read_text())["spec"]["runtimeEnvYAML"])
        assert said["env_vars"]["MLFLOW_TRACKING_URI"] == f"http://{address}"
    (allowed,) = (word for word in container["command"] if word.startswith("--allowed-hosts="))
    assert address in allowed.partition("=")[2].split(",")
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert not pod["spec"]["enableServiceLinks"]  # MLFLOW_PORT would be tcp://...


def test_the_readers_of_the_distillation_job_fit_its_gpu_pods() -> None:
    """Of COCO's images, at the default window: as many readers as there can be beside a GPU, each of which keeps so many bytes of
    views in memory at most, and what they share (docs/cluster.md)."""
    words = yaml.safe_load((ROOT / "deploy/kuberay/job-distill.yaml").read_text())["spec"]["entrypoint"].split()
    config = load(None, [words[i + 1] for i, word in enumerate(words) if word == "--set"])
    groups = ray_cluster()["spec"]["workerGroupSpecs"]
    (pod,) = (group["template"]["spec"] for group in groups if group["groupName"] == "gpu")

    def gib(text: str) -> float:
        return float(text.removesuffix("Gi")) * 2**30

    room = gib(pod["containers"][0]["resources"]["limits"]["memory"]) - gib(pod["volumes"][0]["emptyDir"]["sizeLimit"])
    kept = keep_bytes_for(config.data.shuffle_window_images, 166_800)
    assert kept == pytest.approx(1.39e9, rel=0.01)
    assert config.compute.loader_workers == 0
    assert (MOST_READERS + 1) * kept < room


def test_there_is_a_kuberay_job_for_cache_distillation_and_sweep() -> None:
    assert [path.stem for path in JOBS] == ["job-cache", "job-distill", "job-tune"]


def test_rays_own_upload_of_this_folder_is_small_and_whole(tmp_path: Path) -> None:
    """What `ray job submit --working-dir .` would send from a clone where one has worked for a while."""
    from ray._private.runtime_env.packaging import create_package

    clone = tmp_path / "clone"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    ).stdout.decode()
    names = [name for name in files.split("\0") if name and (ROOT / name).is_file()]
    if not names:
        pytest.skip("not a git clone")
    for name in names:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes((ROOT / name).read_bytes())
    for litter in (
        "runs/a/train/x",
        "data/train/shard.parquet",
        "mlflow.db",
        "mlruns/0/x",
        ".venv/lib/torch.so",
        ".git/p",
    ):
        (clone / litter).parent.mkdir(parents=True, exist_ok=True)
        (clone / litter).write_bytes(os.urandom(2**21))
    package = tmp_path / "package.zip"
    create_package(str(clone), package, include_gitignore=True, logger=logging.getLogger("quiet"))
    sent = set(zipfile.ZipFile(package).namelist())
    for needed in (
        "pipelines/distill.py",
        "qskd/config/sections.py",
        "pipelines/assets/quickstart.yaml",
        "runtime_env.yaml",
    ):
        assert needed in sent
    assert any(name.startswith("pipelines/assets/shapes_teacher/") and name.endswith(".safetensors") for name in sent)
    assert not [
        name
        for name in sent
        if name.startswith(
            ("tests/", "docs/", "benchmarks/evidence/records/", "runs/", "data/", ".git/", ".venv/", "ml")
        )
    ]
    assert package.stat().st_size < 8e6, f"{package.stat().st_size / 1e6:.1f} MB"


def test_what_is_promised_of_a_whole_run_is_told_to_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster they have their node's variables, not the shell's."""
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    said = {"HF_HUB_OFFLINE": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert said.items() <= _for_workers().items()


def test_what_a_jobs_runtime_env_sets_is_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses the same variable from both, even of the same value."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("QSKD_LOG", "json")
    assert _for_workers()["QSKD_LOG"] == "json"
    assert not in_a_job()
    job = '{"runtime_env": {"env_vars": {"QSKD_LOG": "json", "OTHER": "x"}}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
    assert in_a_job()
    assert "QSKD_LOG" not in _for_workers()
    assert _for_workers()["OMP_NUM_THREADS"] == "1"
