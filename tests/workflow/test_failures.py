"""The failure budget: failures are data until there are too many among the recent groups."""

from __future__ import annotations

import pytest

from asyncflow.core.errors import AgentError, FailureBudgetError, RewardError
from asyncflow.workflow.failures import WINDOW, FailureBudget


def test_the_budget_is_spent_by_one_failure_too_many() -> None:
    budget = FailureBudget(2, tell=lambda text: None)
    budget.spend(AgentError("one"))
    budget.succeed()
    budget.spend(RewardError("two"))
    with pytest.raises(FailureBudgetError) as caught:
        budget.spend(RewardError("reward judge returned nan"))
    assert str(caught.value) == (
        "3 of the last 4 groups failed, rollout.max_failures is 2; most often (2 times) for reason 'reward'. "
        "The last one: reward judge returned nan"
    )
    assert isinstance(caught.value.__cause__, RewardError)


def test_a_budget_of_0_allows_none() -> None:
    with pytest.raises(FailureBudgetError):
        FailureBudget(0, tell=lambda text: None).spend(AgentError("one"))


def test_old_failures_are_forgotten() -> None:
    budget = FailureBudget(1, tell=lambda text: None)
    for _ in range(5):
        budget.spend(AgentError("now and then"))
        for _ in range(WINDOW - 1):
            budget.succeed()
    budget.spend(AgentError("one"))
    with pytest.raises(FailureBudgetError):
        budget.spend(AgentError("two at once"))


def test_the_first_failure_of_each_reason_is_told() -> None:
    told: list[str] = []
    budget = FailureBudget(9, tell=told.append)
    for error in (AgentError("a"), AgentError("b"), RewardError("c"), RewardError("d")):
        budget.spend(error)
    assert told == [
        "a rollout failed and its group was dropped (agent): a",
        "a rollout failed and its group was dropped (reward): c",
    ]
