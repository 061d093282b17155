"""The client's side of the rollout engine, without its process."""

from __future__ import annotations

import pytest

from asyncflow.core.metrics import NullObserver
from asyncflow.engines.rollout.client import TorchRolloutEngine
from asyncflow.engines.rollout.messages import FromWorker, Ready, Refused


@pytest.mark.parametrize("answer", [Ready(device="cpu", vocabulary=5, context=9), Refused(problems=("no",))], ids=repr)
async def test_an_answer_that_crosses_the_closing_on_its_way_is_dropped(answer: FromWorker) -> None:
    engine = TorchRolloutEngine(NullObserver())
    await engine.aclose()
    engine._receive(answer)  # as the connection does when bytes arrive
