"""`examples/teach_grpo.py` against synchronous runs of asyncflow, step by step.

The samples of a run with `max_staleness = 0` are noted as the training engine gets them, in
whatever micro-batches. The script, which shares no code with the engine, then takes the same
steps from the same weights: losses, gradient norms and weights must agree after each.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra: pip install 'asyncflow[torch]'")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from asyncflow.algo.algorithms import make_algorithm
from asyncflow.core.columns import LOGPROBS, LOSS_MASK, REWARD, TOKEN_IDS, VERSIONS
from asyncflow.core.config import AlgorithmConfig, EvaluateConfig, RolloutConfig, RunConfig, SamplingConfig, TrainConfig
from asyncflow.core.metrics import NullObserver
from asyncflow.core.ports import Loss
from asyncflow.core.types import FloatArray, MicroBatch, PolicyVersion, Prompt, Ragged, StepReport, WeightsRef
from asyncflow.core.world import World
from asyncflow.data.ledger import LedgerSnapshot
from asyncflow.engines.models import build_character_model
from asyncflow.engines.renderer import TokenizerRenderer
from asyncflow.engines.rollout.client import start_rollout_engine
from asyncflow.engines.train.optimizer import Phase
from asyncflow.engines.train.torch_engine import TorchTrainEngine
from asyncflow.rollout.rewards import single_turn
from asyncflow.workflow.meter import Meter
from asyncflow.workflow.reinforce import Setup, reinforce

pytestmark = pytest.mark.slow

STEPS = 4
MODES = ("token_mean", "sequence_mean", "constant")


@pytest.fixture(scope="module")
def teach() -> Iterator[ModuleType]:
    path = Path(__file__).parent.parent / "examples" / "teach_grpo.py"
    spec = importlib.util.spec_from_file_location("teach_grpo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["teach_grpo"] = module  # where NamedTuple looks for its types
    spec.loader.exec_module(module)
    yield module
    del sys.modules["teach_grpo"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a model this small a second one only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Step:
    """What the engine was given for one step, and what came of it."""

    batches: list[MicroBatch] = field(default_factory=list)
    report: StepReport | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)


def copy_of(batch: MicroBatch) -> MicroBatch:
    """A batch that outlasts its acknowledgement, after which the queue writes over its memory."""
    columns = {name: Ragged(values=c.values.copy(), lengths=c.lengths.copy()) for name, c in batch.columns.items()}
    return MicroBatch(rows=batch.rows, columns=columns)


class NotingTrainer:
    """The real training engine, with a record of every step."""

    def __init__(self, engine: TorchTrainEngine) -> None:
        self.engine = engine
        self.steps = [Step()]

    @property
    def version(self) -> PolicyVersion:
        return self.engine.version

    async def accumulate(self, batch: MicroBatch, loss: Loss[Tensor]) -> None:
        self.steps[-1].batches.append(copy_of(batch))
        await self.engine.accumulate(batch, loss)

    async def apply(self, denominator: float) -> StepReport:
        report = await self.engine.apply(denominator)
        self.steps[-1].report = report
        self.steps[-1].weights = {name: p.detach().clone() for name, p in self.engine._parameters.items()}
        self.steps.append(Step())
        return report

    async def logprobs(self, batch: MicroBatch) -> FloatArray:
        return await self.engine.logprobs(batch)

    async def export_weights(self) -> WeightsRef:
        return await self.engine.export_weights()

    async def save(self, folder: Path) -> None:
        raise AssertionError("nothing is saved here")

    async def load(self, folder: Path) -> None:
        raise AssertionError("nothing is loaded here")

    async def aclose(self) -> None:
        await self.engine.aclose()


def make_config(mode: str, max_tokens: int) -> RunConfig:
    """The settings of the script: `make_optimizer` and `practise` say the same in their words."""
    return RunConfig(
        steps=STEPS,
        max_staleness=0,
        groups_per_step=6,
        group_size=8,
        sampling=SamplingConfig(max_tokens=max_tokens),
        rollout=RolloutConfig(device="cpu", threads=1),
        train=TrainConfig(device="cpu", threads=1, learning_rate=1e-3, betas=(0.9, 0.99), micro_batch_tokens=64),
        algorithm=AlgorithmConfig.model_validate({"aggregation": mode, "clip_low": 0.2, "clip_high": 0.28}),
        evaluate=EvaluateConfig(every=0, final_num_prompts=1),
    )


def digits_that_fit(prompt: Prompt, completion: str) -> float:
    """Differs among siblings of an untrained model, so that there is something to learn."""
    return sum(character in prompt.answer for character in completion) / 2 - len(completion) / 8


async def note_a_run(source: str, config: RunConfig, log: Path) -> list[Step]:
    """A synchronous run with the real engines; its steps."""

    async def save(step: int, ledger: LedgerSnapshot) -> int:
        """Nothing is kept."""
        return step

    world = World(seed=config.seed)
    phase = Phase.reinforcement(config.train, temperature=config.sampling.temperature)
    async with AsyncExitStack() as stack:
        engine = await TorchTrainEngine.open(source, config.train, phase=phase)
        stack.push_async_callback(engine.aclose)
        rollout = await stack.enter_async_context(
            start_rollout_engine(model=source, config=config.rollout, world=world, channel=engine.channel, log=log)
        )
        trainer = NotingTrainer(engine)
        prompts = [Prompt(id=f"{i}+{j}=", text=f"{i}+{j}=", answer=str(i + j)) for i in range(10) for j in range(10)]
        setup = Setup(
            world=world,
            trainer=trainer,
            rollout=rollout,
            renderer=TokenizerRenderer(source),
            agent=single_turn(digits_that_fit),
            algorithm=make_algorithm(config.algorithm, max_tokens=config.sampling.max_tokens),
            prompts=prompts[1:],
            held_out=prompts[:1],
            meter=Meter(NullObserver()),
            save=save,
        )
        await reinforce(config, setup)
    return trainer.steps[:-1]


def to_samples(teach: ModuleType, step: Step) -> list[Any]:
    """The samples of a step as the script's, their advantages computed by the script from the rewards."""
    rewards: dict[int, list[float]] = {}
    found: list[tuple[int, int, list[int], int, list[float]]] = []
    for batch in step.batches:
        names = (TOKEN_IDS, LOSS_MASK, LOGPROBS, REWARD)
        rows = (batch.rows.tickets.tolist(), batch.rows.indices.tolist())
        for ticket, index, *arrays in zip(*rows, *(batch.columns[name].rows() for name in names), strict=True):
            tokens, mask, logprobs, reward = arrays
            rewards.setdefault(ticket, [0.0] * 8)[index] = float(reward[0])
            found.append((ticket, index, tokens.tolist(), int((~mask).sum()), logprobs[mask].tolist()))
    advantages = {ticket: teach.advantages(values) for ticket, values in rewards.items()}
    return [
        teach.Sample(token_ids=tokens, num_prompt=num_prompt, logprobs=logprobs, advantage=advantages[ticket][index])
        for ticket, index, tokens, num_prompt, logprobs in sorted(found)
    ]


def distance(model: PreTrainedModel, weights: dict[str, Tensor]) -> float:
    """`norm(difference) / norm` over all weights."""
    pairs = [(parameter.detach().double(), weights[name].double()) for name, parameter in model.named_parameters()]
    difference = torch.stack([(one - other).norm() for one, other in pairs]).norm()
    return float(difference / torch.stack([other.norm() for _, other in pairs]).norm())


@pytest.mark.parametrize("mode", MODES)
async def test_the_script_and_a_synchronous_run_take_the_same_steps(
    tmp_path: Path, teach: ModuleType, mode: str
) -> None:
    source = tmp_path / "model"
    build_character_model(
        source, alphabet=teach.ALPHABET, layers=2, width=32, heads=4, intermediate=64, max_len=32, seed=5
    )
    config = make_config(mode, teach.MAX_TOKENS)
    steps = await note_a_run(str(source), config, tmp_path / "rollout.log")
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = teach.make_optimizer(model, config.train.learning_rate)
    assert len(steps) == STEPS
    for number, step in enumerate(steps):
        assert step.report is not None
        assert len(step.batches) > 1  # streamed
        for batch in step.batches:
            assert set(batch[VERSIONS][batch[LOSS_MASK]].tolist()) == {number}  # staleness 0
        samples = to_samples(teach, step)
        assert len(samples) == 48
        loss = teach.loss_and_gradients(model, samples, mode)
        norm = teach.step(model, optimizer)
        # A loss adds up advantages of both signs, which cancel, to 0 with sequence_mean; what it adds up is near 1.
        size = float(np.mean([abs(sample.advantage) for sample in samples]))
        assert size > 0.5
        assert step.report.loss == pytest.approx(loss, rel=1e-6, abs=1e-6 * size)
        assert step.report.grad_norm == pytest.approx(norm, rel=1e-6)
        assert distance(model, step.weights) < 1e-7
    assert distance(model, start) > 1e-3  # they went somewhere
