"""A finished run, made once for all tests of what a run leaves and how it goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from asyncflow.recipes.runner import RunSummary


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    """A run of 3 steps, which nobody may change."""
    pytest.importorskip("torch", reason="needs the extra: pip install 'asyncflow[torch]'")
    from tests.recipes.copying import run_recipe, write_recipe

    home = tmp_path_factory.mktemp("finished")
    return run_recipe(write_recipe(home), home / "runs", "name=one")


@pytest.fixture
def copied(finished: RunSummary, tmp_path: Path) -> Path:
    """A copy of the finished run, to go on with."""
    return Path(shutil.copytree(finished.folder, tmp_path / "runs" / "one"))
