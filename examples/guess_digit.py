"""Guess a digit in three tries, told each time where it lies: `asyncflow run examples/guess_digit.py`."""

from functools import partial
from pathlib import Path

from asyncflow import Chat, Prompt, RunConfig, SamplingConfig, Task, TrainConfig


def defaults() -> RunConfig:
    return RunConfig(steps=60, sampling=SamplingConfig(max_tokens=1), train=TrainConfig(learning_rate=1e-3))


def task(config: RunConfig) -> Task:
    digits = [str(game * 48_271 % 65_537 % 10) for game in range(20_000)]  # not to be read off the game's number
    games = [Prompt(id=str(game), text=f"{game:05d}?", answer=digit) for game, digit in enumerate(digits)]
    model = partial(build_model, seed=config.seed)
    return Task(train=games[1_000:], held_out=games[:1_000], agent=play, model=model)


async def play(game: Prompt, chat: Chat) -> float:
    """Three turns at most; the environment answers each guess with `<` or `>`."""
    hint = game.text
    for _ in range(3):
        guess = await chat.respond(hint)
        if guess == game.answer:
            return 1.0
        hint = "<" if guess > game.answer else ">"
    return 0.0


def build_model(folder: Path, seed: int) -> str:
    from asyncflow.engines.models import build_character_model

    build_character_model(
        folder, alphabet="0123456789?<>", layers=2, width=64, heads=4, intermediate=172, max_len=32, seed=seed
    )
    return str(folder)
