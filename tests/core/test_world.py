"""What a child process inherits of the folder in which a run was started: nothing that it could import."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asyncflow.core.world import World


def exit_code(module: str, log: Path, environment: dict[str, str] | None = None) -> int:
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    try:
        with World().start_python(module, [], environment=environment or {}, pass_fds=[], stderr=output) as process:
            return process.wait(30)
    finally:
        os.close(output)


def test_a_module_in_the_working_folder_is_not_taken_for_pythons_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    for module in ("queue", "asyncflow.engines.rollout.messages"):
        assert exit_code(module, tmp_path / "log") == 0, (tmp_path / "log").read_text()


def test_the_users_own_search_path_still_holds(tmp_path: Path) -> None:
    (tmp_path / "their_reward.py").write_text("raise SystemExit(9)")
    assert exit_code("their_reward", tmp_path / "log", {"PYTHONPATH": str(tmp_path)}) == 9
