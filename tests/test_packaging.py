"""What the package says of itself: every import is declared, and the oldest Python is the same wherever it is named."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OURS = ("qskd", "pipelines", "search_spaces")
# Asked for behind a check that they are installed (`find_spec`, ImportError), and said so where they are missing.
IF_INSTALLED = {
    "faster_coco_eval",
    "timm",
    "torchvision",
    "hotcoco",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "psutil",
    "av",
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    said: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return said


def imported() -> Iterator[tuple[str, str]]:
    """(package at the top, file) of every import statement of ours, wherever in a file it stands."""
    for path in (file for folder in OURS for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            yield from ((name.partition(".")[0], str(path.relative_to(ROOT))) for name in names)


def test_every_package_that_is_imported_is_declared(project: dict[str, Any]) -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    distributions = packages_distributions()
    undeclared = {
        name: file
        for name, file in imported()
        if name not in {*sys.stdlib_module_names, *OURS, *IF_INSTALLED}
        and not declared & {canonicalize_name(distribution) for distribution in distributions.get(name, [])}
    }
    assert not undeclared


def test_the_oldest_python_is_the_same_wherever_it_is_named(project: dict[str, Any]) -> None:
    oldest = re.fullmatch(r">=3\.(\d+)", project["requires-python"])
    assert oldest
    minor = oldest[1]
    assert f"(3, {minor})" in (ROOT / "Makefile").read_text()
    assert f"Python 3.{minor} or later" in (ROOT / "README.md").read_text()
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == f"py3{minor}"
    assert tools["mypy"]["python_version"] == f"3.{minor}"
    assert "python_version" not in (ROOT / "constraints.txt").read_text()  # no marker of Pythons that are too old
