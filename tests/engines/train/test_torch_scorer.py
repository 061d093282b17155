"""The scorer gives the training engine's log-probs, on the threads it is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from asyncflow.core.config import TrainConfig
from asyncflow.core.errors import ConfigError
from asyncflow.core.metrics import NullObserver
from asyncflow.core.ports import Scorer
from asyncflow.engines.train.optimizer import Phase
from asyncflow.engines.train.torch_scorer import TorchScorer
from tests.engines.train.tiny import CONFIG, build_tiny_model, make_batch, open_engine

WARM = Phase(learning_rate=0, betas=(0.9, 0.99), weight_decay=0, max_grad_norm=1, temperature=0.7)


class Spans(NullObserver):
    """Keeps who was busy with what."""

    def __init__(self) -> None:
        self.names: list[tuple[str, str]] = []

    def span(self, role: str, name: str, start_s: float, end_s: float) -> None:
        assert start_s <= end_s
        self.names.append((role, name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_it_scores_as_the_training_engine_does(tmp_path: Path, dtype: str) -> None:
    source, batch = build_tiny_model(tmp_path), make_batch([4, 3])
    config = TrainConfig.model_validate({**CONFIG.model_dump(), "dtype": dtype})
    observer = Spans()
    scorer = await TorchScorer.open(source, config, temperature=0.7, observer=observer)
    async with open_engine(source, phase=WARM, config=config) as engine:
        both: list[Scorer] = [scorer, engine]
        scores, expected = [await one.logprobs(batch) for one in both]
    np.testing.assert_array_equal(scores, expected)
    assert observer.names == [("reference", "logprobs")]
    for _ in range(2):
        await scorer.aclose()


async def test_it_computes_on_the_threads_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered, taken = iter([2, 0, 1]), list[int]()
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    scorer = await TorchScorer.open(
        build_tiny_model(tmp_path), CONFIG, temperature=1.0, num_threads=lambda: next(offered)
    )
    for _ in range(3):
        await scorer.logprobs(make_batch([2]))
    await scorer.aclose()
    assert taken == [2, 1]


async def test_a_missing_model_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        await TorchScorer.open("/nowhere/at/all", CONFIG, temperature=1.0)
