"""Every pod of every manifest is held to Kubernetes' `restricted` standard, and every server to a network of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for path in (ROOT / "deploy").rglob("*") if path.suffix in (".yaml", ".yml"))
DOCUMENTS = [document for path in FILES for document in yaml.safe_load_all(path.read_text())]
SECRET = re.compile(r"(?i)password|secret|token|credential|(^|_)key")


def dicts(node: Any) -> Iterator[dict[str, Any]]:
    """All mappings in a document, the text of an embedded one included."""
    if isinstance(node, dict):
        yield node
        for name, value in node.items():
            yield from dicts(yaml.safe_load(value) if name == "runtimeEnvYAML" else value)
    elif isinstance(node, list):
        for value in node:
            yield from dicts(value)


def pods(document: Any) -> list[dict[str, Any]]:
    """The pod specs in a document, wherever they are."""
    return [each for each in dicts(document) if "containers" in each]


PODS = [(document, pod) for document in DOCUMENTS for pod in pods(document)]
CONTAINERS = [
    container
    for _, pod in PODS
    for kind in ("containers", "initContainers", "ephemeralContainers")
    for container in pod.get(kind, ())
]


def allowed(selector: dict[str, Any], kind: str = "Ingress") -> list[dict[str, Any]]:
    """The rules of all policies for pods of these labels; an error when none is for them."""
    policies = [
        document["spec"]
        for document in DOCUMENTS
        if document["kind"] == "NetworkPolicy"
        and kind in document["spec"]["policyTypes"]
        and document["spec"]["podSelector"]["matchLabels"].items() <= selector.items()
    ]
    assert policies, f"no NetworkPolicy is for pods with {selector}"
    return [rule for policy in policies for rule in policy.get(kind.lower(), ())]


def test_the_walk_finds_the_pods_there_are() -> None:
    assert sorted(document["kind"] for document, _ in PODS) == ["Deployment", *["RayCluster"] * 3, *["RayJob"] * 3]
    assert len(CONTAINERS) == len(PODS)
    hidden = {"spec": [{"deep": {"initContainers": [], "containers": [{"name": "x"}]}}]}
    assert len(pods(hidden)) == 1


@pytest.mark.parametrize("pod", [pod for _, pod in PODS])
def test_no_pod_runs_as_root_or_shares_the_nodes_namespaces(pod: dict[str, Any]) -> None:
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == 1000  # the image's: Kubernetes can't tell who a name is
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & {name for name, value in pod.items() if value}
    assert not [volume for volume in pod.get("volumes", ()) if "hostPath" in volume]


@pytest.mark.parametrize(
    "context",
    [container.get("securityContext", {}) for container in CONTAINERS]
    + [
        document["spec"]["autoscalerOptions"]["securityContext"]
        for document, _ in PODS
        if "rayVersion" in document["spec"]
    ],
)
def test_no_container_can_gain_rights(context: dict[str, Any]) -> None:
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert isinstance(context["readOnlyRootFilesystem"], bool)  # decided, not forgotten
    assert not context.get("privileged")
    assert context.get("runAsUser", 1000) != 0


def test_only_the_autoscalers_pod_may_ask_kubernetes() -> None:
    mounts = [document["kind"] for document, pod in PODS if pod["automountServiceAccountToken"]]
    assert mounts == ["RayCluster"]
    (cluster,) = (document for document in DOCUMENTS if document["kind"] == "RayCluster")
    assert cluster["spec"]["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"]
    assert cluster["spec"]["enableInTreeAutoscaling"]
    assert cluster["spec"]["authOptions"] == {"mode": "token"}


def test_each_job_says_how_its_submitting_pod_runs() -> None:
    """KubeRay's own template for it has no security context."""
    for document in DOCUMENTS:
        if document["kind"] == "RayJob":
            assert len(pods(document["spec"]["submitterPodTemplate"])) == 1


@pytest.mark.parametrize("container", CONTAINERS)
def test_images_are_pinned_and_no_secret_is_written_down(container: dict[str, Any]) -> None:
    tag = re.fullmatch(r"[^:@]+:([\w.-]+)", container["image"])
    assert tag
    assert tag[1] != "latest"
    for entry in container.get("env") or ():
        assert "valueFrom" in entry or not SECRET.search(entry["name"]), entry["name"]


def test_no_runtime_environment_holds_a_secret() -> None:
    named = [name for document in DOCUMENTS for each in dicts(document) for name in each.get("env_vars", ())]
    assert "MLFLOW_TRACKING_URI" in named
    assert not [name for name in named if SECRET.search(name)]
    assert not [document for document in DOCUMENTS if document["kind"] == "Secret"]


def test_only_named_pods_reach_ray_and_mlflow() -> None:
    (cluster,) = (document for document in DOCUMENTS if document["kind"] == "RayCluster")
    ray = {"ray.io/cluster": cluster["metadata"]["name"]}  # KubeRay's label of all its pods
    mlflow = next(d for d in DOCUMENTS if d["kind"] == "Deployment")["spec"]["template"]["metadata"]["labels"]
    for rules in (allowed(ray), allowed(mlflow)):
        for rule in rules:
            assert rule["from"]
            for peer in rule["from"]:
                assert peer["podSelector"]["matchLabels"]
                assert "ipBlock" not in peer
    assert {"from": [{"podSelector": {"matchLabels": ray}}]} in allowed(ray)  # each other, on all ports
    for document in DOCUMENTS:
        if document["kind"] == "RayJob":
            labels = document["spec"]["submitterPodTemplate"]["metadata"]["labels"]
            (rule,) = (rule for rule in allowed(ray) if {"podSelector": {"matchLabels": labels}} in rule["from"])
            assert rule["ports"] == [{"protocol": "TCP", "port": 8265}]
    (rule,) = allowed(mlflow)
    assert {"podSelector": {"matchLabels": ray}} in rule["from"]
    assert not allowed(mlflow, "Egress")
    assert cluster["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    for document in DOCUMENTS:
        if document["kind"] == "Service":
            assert document["spec"]["type"] == "ClusterIP"
            selector = document["spec"]["selector"]
            (of_service,) = {port["targetPort"] for port in document["spec"]["ports"]}
            assert of_service == "http"
            allowed(selector)


def test_the_image_ends_as_a_user_by_number() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1] == "1000"
