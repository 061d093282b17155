import subprocess
import sys

import pytest

from asyncflow.algo.advantages import dr_grpo, grpo
from asyncflow.algo.algorithms import make_algorithm, make_warmup_loss
from asyncflow.core.columns import REF_LOGPROBS
from asyncflow.core.config import AlgorithmConfig
from tests.algo.batches import make_batch


@pytest.mark.parametrize("correction", ["ppo", "decoupled", "truncated", "none"])
def test_every_setting_makes_an_algorithm(correction: str) -> None:
    algorithm = make_algorithm(AlgorithmConfig.model_validate({"correction": correction}), max_tokens=5)
    assert algorithm.advantages is grpo
    assert algorithm.loss.denominator(make_batch([[False, True, True]])) == 2
    assert REF_LOGPROBS not in algorithm.columns


def test_a_reference_is_read_only_where_it_is_penalised() -> None:
    assert REF_LOGPROBS in make_algorithm(AlgorithmConfig(kl_coef=0.1), max_tokens=5).columns


def test_dr_grpo_divides_by_the_longest_completion() -> None:
    algorithm = make_algorithm(AlgorithmConfig(advantage="dr_grpo", aggregation="constant"), max_tokens=5)
    assert algorithm.advantages is dr_grpo
    assert algorithm.loss.denominator(make_batch([[False, True], [False, True]])) == 10


def test_the_warm_up_averages_over_tokens() -> None:
    assert make_warmup_loss().denominator(make_batch([[False, True], [False, True, True]])) == 3


def test_the_workflow_can_hold_an_algorithm_without_torch() -> None:
    program = "import sys, asyncflow.algo.algorithms, asyncflow.algo.samples; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
