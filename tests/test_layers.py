"""The layer order: an import points left only.

    core <- data <- rollout | engines | algo <- workflow <- plan | cluster | observe | service <- recipes <- cli

Every import statement counts, also those in functions and under `TYPE_CHECKING`, and so do
`import_module` calls with a literal name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "asyncflow"

LAYERS = (
    {"core"},
    {"data"},
    {"rollout", "engines", "algo"},
    {"workflow"},
    {"plan", "cluster", "observe", "service"},
    {"recipes"},
    {"cli"},
)
RANK = {folder: rank for rank, folders in enumerate(LAYERS) for folder in folders}

HEAVY = {"torch", "transformers", "vllm", "ray"}
LIGHT = (
    "asyncflow.core",
    "asyncflow.data",
    "asyncflow.rollout",
    "asyncflow.workflow",
    "asyncflow.plan",
    "asyncflow.observe",
    "asyncflow.cli",
    "asyncflow.algo.advantages",
    "asyncflow.algo.samples",
    "asyncflow.algo.aggregation",
    "asyncflow.engines.scripted",
)
"""Modules (and everything in or beginning like them) that import nothing heavy."""


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
            # `from asyncflow import cli` names a module as well.
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func) and node.args:
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            yield node.lineno, str(name)


def folder_of(module: str) -> str:
    """`asyncflow.data.queue` lives in `data`; empty for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "asyncflow" else ""


def broken_layers(module: str, source: str) -> list[str]:
    """Imports of this module that point right or sideways."""
    own = folder_of(module)
    broken: list[str] = []
    for line, name in imported(ast.parse(source)):
        other = folder_of(name)
        if name.startswith("."):
            broken.append(f"{module}:{line} imports relatively: {name}")
        elif own and other in RANK and other != own and RANK[other] >= RANK[own]:
            broken.append(f"{module}:{line} imports {name}: {own} must not know {other}")
    return sorted(set(broken))


def heavy_imports(module: str, source: str) -> list[str]:
    """Imports of torch and its like in a module that must run without them."""
    names = {(line, name.split(".")[0]) for line, name in imported(ast.parse(source))}
    return [f"{module}:{line} imports {name}" for line, name in sorted(names) if name in HEAVY]


def is_light(path: Path) -> bool:
    """Whether the module must run without torch."""
    return path.name == "__init__.py" or module_name(path).startswith(LIGHT)


def module_name(path: Path) -> str:
    """`asyncflow/data/queue.py` is `asyncflow.data.queue`."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_left(path: Path) -> None:
    assert broken_layers(module_name(path), path.read_text()) == []


@pytest.mark.parametrize("path", [path for path in MODULES if is_light(path)], ids=module_name)
def test_runs_without_torch(path: Path) -> None:
    assert heavy_imports(module_name(path), path.read_text()) == []


def test_every_folder_has_a_layer() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(RANK)


@pytest.mark.parametrize(
    "source",
    [
        "import asyncflow.workflow.loop",
        "from asyncflow.workflow import loop",
        "from asyncflow import workflow",
        "from asyncflow.algo.losses import x",
        "def f():\n    from asyncflow.cli.main import main",
        "if TYPE_CHECKING:\n    from asyncflow.engines import models",
        "from importlib import import_module\nimport_module('asyncflow.recipes.gsm8k')",
        "__import__('asyncflow.cli.main')",
        "from . import chat",
    ],
)
def test_an_import_to_the_right_or_sideways_is_found(source: str) -> None:
    assert len(broken_layers("asyncflow.rollout.planted", source)) >= 1


@pytest.mark.parametrize("source", ["from asyncflow.core.types import Prompt", "import asyncflow.data.queue, asyncio"])
def test_an_import_to_the_left_is_allowed(source: str) -> None:
    assert broken_layers("asyncflow.rollout.planted", source) == []


def test_the_package_itself_offers_every_layer() -> None:
    assert broken_layers("asyncflow", "from asyncflow.recipes.recipe import Task") == []


@pytest.mark.parametrize(
    "source",
    ["import torch", "from torch.nn import Module", "def f():\n    import vllm", "import_module('ray.util')"],
)
def test_a_heavy_import_is_found(source: str) -> None:
    assert len(heavy_imports("asyncflow.core.planted", source)) == 1
