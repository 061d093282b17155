"""What `from asyncflow import ...` offers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import asyncflow


def test_every_public_name_is_there_and_nothing_else_is() -> None:
    homes = [name for names in asyncflow.HOMES.values() for name in names]
    assert sorted(homes) == sorted(asyncflow.__all__)
    for name in asyncflow.__all__:
        assert getattr(asyncflow, name) is not None
    with pytest.raises(AttributeError, match="asyncflow has no 'Tsak'; it has Agent"):
        asyncflow.__getattr__("Tsak")


def test_editors_and_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(asyncflow.__file__).read_text())
    seen = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("asyncflow")
        for alias in node.names
    }
    assert seen == {(home, name) for home, names in asyncflow.HOMES.items() for name in names}


def test_importing_the_package_imports_nothing_else() -> None:
    check = (
        "import sys, asyncflow; print([m for m in sys.modules if m.startswith(('asyncflow.', 'torch', 'pydantic'))])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
