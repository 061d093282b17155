"""Simulation and help run where torch and transformers can't be imported at all.

`test_layers.py` reads the imports of our own modules; this runs them, third parties included.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BLOCKED = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "pyarrow", "vllm", "ray")

BLOCK = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""

SIMULATE = """
from asyncflow.core.config import RunConfig
from asyncflow.engines.scripted import Script
from asyncflow.plan.simulate import simulate

result = simulate(RunConfig(steps=5, groups_per_step=4, group_size=2), Script())
assert result.steps == 5 and result.counts.trained == 20, result
print(result.staleness_max)
"""


def run_blocked(program: str, *arguments: str) -> str:
    """What a program prints in a Python without the blocked packages."""
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "100"}
    command = [sys.executable, "-W", "error", "-c", BLOCK + program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("package", ["torch", "transformers.utils"])
def test_the_block_blocks(package: str) -> None:
    program = f"try:\n    import {package}\nexcept ImportError as error:\n    print(error)\n"
    assert run_blocked(program) == f"{package.partition('.')[0]} is blocked\n"


def test_a_run_is_simulated() -> None:
    assert run_blocked(SIMULATE) == "1\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "Begin with: asyncflow run quickstart"),
        (["run", "--help"], "Train a model by a recipe"),
        (["recipes"], "quickstart"),
        (["settings"], "train.learning_rate"),
        (["settings", "quickstart"], "train.learning_rate"),
    ],
    ids=str,
)
def test_commands_that_need_no_model_answer(arguments: list[str], expected: str) -> None:
    program = "from asyncflow.cli.main import main; sys.exit(main(sys.argv[1:]))"
    assert expected in run_blocked(program, *arguments)
