"""Grade-school maths (GSM8K), with a real model or a small one built on the spot.

`data` is a folder with `train.jsonl` and `test.jsonl`, or the name of a data set of the hub. Its
columns are `question` and `answer`, the final number after `####`; others are named by
`columns.text` and `columns.answer`. The
reward is 1 when the completion ends in the right number (`asyncflow.recipes.answers`).

`model=tiny` (the default) trains a byte-level tokenizer on the data, builds a Qwen2 of 4
million parameters and warms it up on the reference answers: it shows that the whole path
works, and solves hardly any problem. A real model is the folder or hub name of one, and
brings settings of its own (`defaults_for`)::

    asyncflow run gsm8k data=FOLDER model=Qwen/Qwen2.5-0.5B-Instruct

Source: Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv 2110.14168.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from asyncflow.core.config import (
    AlgorithmConfig,
    ColumnsConfig,
    EvaluateConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
    WarmupConfig,
)
from asyncflow.core.errors import ConfigError
from asyncflow.core.types import Demonstration, Prompt
from asyncflow.core.world import derive_seed
from asyncflow.data.prompts import read_prompts
from asyncflow.recipes.answers import final_number, is_right, without_annotations
from asyncflow.recipes.recipe import Task, is_size
from asyncflow.rollout.rewards import single_turn

SIZES = ("tiny",)
COLUMNS = ColumnsConfig(text="question", answer="answer")
TINY_TEMPLATE = "Question: {text}\nAnswer:\n"
TEMPLATE = "{text}\n\nReason step by step. End with a line that holds #### and the final number."
SOLUTION = "solution"
"""The field of a prompt that keeps the reference answer as a text to imitate."""

FROM_SCRATCH_LEARNING_RATE = 1e-3
"""A warm-up at this rate makes a new model and ruins a trained one."""


def defaults() -> RunConfig:
    """The settings for `model=tiny`."""
    return RunConfig(
        recipe="gsm8k",
        model="tiny",
        data="openai/gsm8k",
        columns=COLUMNS,
        steps=20,
        max_staleness=1,
        groups_per_step=8,
        group_size=8,
        sampling=SamplingConfig(temperature=1.0, max_tokens=160),
        rollout=RolloutConfig(max_running=64),
        train=TrainConfig(learning_rate=1e-4, micro_batch_tokens=4_096),
        algorithm=AlgorithmConfig(clip_low=0.2, clip_high=0.28),
        warmup=WarmupConfig(steps=200, batch_size=16, learning_rate=FROM_SCRATCH_LEARNING_RATE),
        evaluate=EvaluateConfig(every=10, num_prompts=64, final_num_prompts=1_319),
    )


def defaults_for(model: str) -> RunConfig:
    """The settings for a model: a trained one needs no warm-up, longer answers and small steps."""
    if model in SIZES:
        return defaults()
    return RunConfig(
        recipe="gsm8k",
        model=model,
        data="openai/gsm8k",
        columns=COLUMNS,
        steps=200,
        max_staleness=1,
        groups_per_step=32,
        group_size=8,
        sampling=SamplingConfig(temperature=1.0, max_tokens=512),
        rollout=RolloutConfig(max_running=256, dtype="bfloat16"),
        train=TrainConfig(learning_rate=1e-6, micro_batch_tokens=16_384, dtype="bfloat16"),
        algorithm=AlgorithmConfig(clip_low=0.2, clip_high=0.28),
        evaluate=EvaluateConfig(every=10, num_prompts=256, final_num_prompts=1_319),
    )


def task(config: RunConfig) -> Task:
    """Problems, reward and model for this configuration."""
    is_built = is_size(config.model, SIZES)
    if not is_built:
        _check_warmup(config)
    template = TINY_TEMPLATE if is_built else TEMPLATE
    train = _problems(config, "train", template)
    return Task(
        train=train,
        held_out=_problems(config, "test", template),
        agent=single_turn(reward),
        model=lambda folder: _build_model(config, train, folder) if is_built else config.model,
        demonstrations=[Demonstration(prompt=prompt, completion=prompt.fields[SOLUTION]) for prompt in train],
    )


def reward(prompt: Prompt, completion: str) -> float:
    """1 when the completion ends in the reference's number, else 0."""
    return float(is_right(completion, prompt.answer))


def _check_warmup(config: RunConfig) -> None:
    if config.warmup.steps and config.warmup.learning_rate >= FROM_SCRATCH_LEARNING_RATE:
        raise ConfigError(
            f"model={config.model} is trained already, and a warm-up of {config.warmup.steps} steps at "
            f"learning rate {config.warmup.learning_rate:g} would ruin it: leave out warmup.steps, or give a smaller "
            "warmup.learning_rate"
        )


def _problems(config: RunConfig, split: str, template: str) -> list[Prompt]:
    """The prompts of a split, each with its reference number and its solution to imitate."""
    source, columns = config.data, config.columns
    if not source:
        raise ConfigError("gsm8k needs data: data=FOLDER with train.jsonl and test.jsonl, or data=openai/gsm8k")
    subset = "main" if source == "openai/gsm8k" else ""
    prompts = read_prompts(
        source,
        text=columns.text,
        answer=columns.answer,
        id=columns.id,
        split=split,
        subset=subset,
        template=template,
    )
    for prompt in prompts:
        if final_number(prompt.answer) is None:
            raise ConfigError(f"{source}, {split}, {prompt.id}: the answer ends in no number: {prompt.answer[-80:]!r}")
    return [_with_solution(prompt) for prompt in prompts]


def _with_solution(prompt: Prompt) -> Prompt:
    solution = without_annotations(prompt.answer)
    number = solution.rpartition("####")[2].strip()
    return replace(prompt, answer=number, fields={**prompt.fields, SOLUTION: solution})


def _build_model(config: RunConfig, train: list[Prompt], folder: Path) -> str:
    """A Qwen2 of 4 million parameters, with a tokenizer trained on the problems."""
    from asyncflow.engines.models import build_text_model  # here, so that the problems need no torch

    build_text_model(
        folder,
        corpus=(prompt.text + prompt.fields[SOLUTION] for prompt in train),
        vocab_size=4_096,
        layers=4,
        width=256,
        heads=4,
        kv_heads=2,
        intermediate=704,
        max_len=1_024,
        seed=derive_seed(config.seed, "model") % 2**31,
    )
    return str(folder)
