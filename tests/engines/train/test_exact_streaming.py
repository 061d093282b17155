"""Streaming within a step is exact: however a step is split, the gradient is that of the whole batch.

Three ways to the same gradient, compared as `norm(difference) / norm`: one full micro-batch,
random splits into many, and the teaching script, which has no code in common with the engine.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncflow.core.columns import ADVANTAGE, LOGPROBS, LOSS_MASK, TOKEN_IDS
from asyncflow.core.types import MicroBatch
from asyncflow.engines.train.torch_engine import TorchTrainEngine
from tests.engines.train.tiny import Mode, build_tiny_model, gradient, make_batch, make_loss, open_engine, select

GROUPS = (8, 3, 16, 2, 7, 12)
TOLERANCE = 1e-6


def load_teaching_script() -> ModuleType:
    path = Path(__file__).parents[3] / "examples" / "teach_grpo.py"
    spec = importlib.util.spec_from_file_location("teach_grpo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["teach_grpo"] = module
    spec.loader.exec_module(module)
    return module


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


async def streamed_gradient(engine: TorchTrainEngine, parts: list[MicroBatch], mode: Mode) -> torch.Tensor:
    loss = make_loss(mode)
    for part in parts:
        await engine.accumulate(part, loss)
    return gradient(engine) / sum(loss.denominator(part) for part in parts)


def random_split(batch: MicroBatch, rng: np.random.Generator) -> list[MicroBatch]:
    """Samples in random order in micro-batches of random sizes, the smallest of one sample."""
    order = rng.permutation(len(batch.rows))
    cuts = np.sort(rng.choice(np.arange(1, len(order)), size=rng.integers(2, 12), replace=False))
    return [select(batch, part.tolist()) for part in np.split(order, cuts)]


@pytest.mark.parametrize("mode", get_args(Mode))
async def test_every_split_gives_the_gradient_of_the_whole_batch(tmp_path: Path, mode: Mode) -> None:
    batch = make_batch(GROUPS)
    rng = np.random.default_rng(1)
    async with open_engine(build_tiny_model(tmp_path)) as engine:
        whole = await streamed_gradient(engine, [batch], mode)
        for _ in range(8):
            split = await streamed_gradient(engine, random_split(batch, rng), mode)
            assert relative_difference(split, whole) < TOLERANCE


@pytest.mark.parametrize("mode", get_args(Mode))
async def test_the_teaching_script_computes_the_same_gradient(
    tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach = load_teaching_script()
    monkeypatch.setattr(teach, "MAX_TOKENS", make_loss().aggregation.max_tokens)
    batch = make_batch(GROUPS)
    samples = [
        teach.Sample(
            token_ids=tokens.tolist(),
            num_prompt=int((~mask).sum()),
            logprobs=logprobs[mask].tolist(),
            advantage=float(advantage[0]),
        )
        for tokens, mask, logprobs, advantage in zip(
            *(batch.columns[name].rows() for name in (TOKEN_IDS, LOSS_MASK, LOGPROBS, ADVANTAGE)), strict=True
        )
    ]
    source = build_tiny_model(tmp_path)
    async with open_engine(source) as engine:
        streamed = await streamed_gradient(engine, random_split(batch, np.random.default_rng(2)), mode)
    model = AutoModelForCausalLM.from_pretrained(source)
    teach.loss_and_gradients(model, samples, mode)
    taught = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    assert relative_difference(streamed, taught) < TOLERANCE
