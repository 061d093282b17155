"""Sort eight digits: `asyncflow run examples/sort_digits.py`."""

from pathlib import Path

from asyncflow import Demonstration, Prompt, RunConfig, SamplingConfig, Task, TrainConfig, WarmupConfig, single_turn


def defaults() -> RunConfig:
    return RunConfig(
        steps=60,
        sampling=SamplingConfig(max_tokens=12),
        train=TrainConfig(learning_rate=2e-4),
        warmup=WarmupConfig(steps=80, batch_size=64, learning_rate=2e-3),
    )


def task(config: RunConfig) -> Task:
    texts = [f"{number * 48_271 % 10**8:08d}" for number in range(1, 30_001)]  # all different
    prompts = [Prompt(id=text, text=f"{text}>", answer="".join(sorted(text))) for text in texts]
    return Task(
        held_out=prompts[:1_000],
        train=prompts[1_000:20_000],
        demonstrations=[Demonstration(prompt=prompt, completion=prompt.answer) for prompt in prompts[20_000:]],
        agent=single_turn(reward),
        model=lambda folder: build_model(folder, config.seed),
    )


def reward(prompt: Prompt, answer: str) -> float:
    return float(answer == prompt.answer)


def build_model(folder: Path, seed: int) -> str:
    from asyncflow.engines.models import build_character_model

    build_character_model(
        folder, alphabet="0123456789>", layers=2, width=96, heads=4, intermediate=256, max_len=32, seed=seed
    )
    return str(folder)
