"""Stands where `asyncflow.recipes.runner` does, and notes what it was asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from asyncflow.core.config import RunConfig
from asyncflow.core.world import World
from asyncflow.observe.progress import Progress
from asyncflow.observe.progress_state import RunPlan
from asyncflow.observe.run_folder import RunFolder
from asyncflow.recipes.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    folder: Path
    steps: int
    accuracy_before: float | None
    accuracy_after: float | None
    elapsed_s: float
    dropped: dict[str, int] = field(default_factory=lambda: {"no_signal": 40, "reward": 1})
    failures: tuple[str, ...] = ("a rollout failed and its group was dropped (reward): reward f raised",)


@dataclass
class FakeRunner:
    """`error` is raised at step 3 of a run."""

    error: BaseException | None = None
    calls: list[tuple[str, object]] = field(default_factory=list)

    def run(self, recipe: Recipe, config: RunConfig, runs_dir: Path, progress: Progress) -> Summary:
        self.calls.append(("run", config))
        with RunFolder.create(config, root=runs_dir, world=World(seed=config.seed)) as folder:
            return self._work(folder, progress)

    def resume(self, folder: Path, words: list[str], progress: Progress) -> Summary:
        self.calls.append(("resume", words))
        with RunFolder.reopen(folder, world=World()) as again:
            return self._work(again, progress)

    def evaluate(
        self, folder: Path, *, num_prompts: int, temperature: float, samples: int, tell: Callable[[str], None]
    ) -> dict[str, float]:
        self.calls.append(("evaluate", (num_prompts, temperature, samples)))
        return {
            "step": 80.0,
            "num_prompts": 1024,
            "samples": 4,
            "accuracy": 0.7383,
            "pass_at_k": 0.881,
            "stderr": 0.0137,
            "reward": 0.75,
            "length": 6.123,
            "num_failed": 0,
        }

    def dry_run(self, recipe: Recipe, config: RunConfig) -> list[tuple[str, str]]:
        self.calls.append(("dry_run", config))
        return [("model", "tiny, 0.8 M parameters"), ("steps", "40 of 32 x 8 rollouts")]

    def export(self, folder: Path, target: Path) -> None:
        self.calls.append(("export", target))

    def _work(self, folder: RunFolder, progress: Progress) -> Summary:
        progress.open(RunPlan(name=folder.name, steps=3))
        progress.record("step", {"step": 3, "steps": 3})
        if self.error:
            raise self.error
        return Summary(folder=folder.path, steps=3, accuracy_before=0.283, accuracy_after=0.791, elapsed_s=161.0)
