"""Selection bias: are the groups that were trained other ones than those that were dispatched?

What is dropped is not trained on, and if what is dropped is longer or harder, the policy learns
from shorter and easier prompts than it was given. Whether trained and dropped groups differ
beyond chance is asked of the Mann-Whitney U statistic (Mann & Whitney, 1947), by its normal
approximation with the correction for ties, two-sided: it assumes nothing of the distributions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import erfc, sqrt
from statistics import fmean

import numpy as np

from asyncflow.data.audited import AuditedGroup
from asyncflow.workflow.stages import NO_SIGNAL

MIN_GROUPS = 8
"""Trained and dropped groups that the normal approximation needs of each."""
BEYOND_CHANCE = 0.01
"""Below this p a difference is said to be beyond chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A property of groups: its mean over the trained and over all dispatched ones in which it is known.

    `z` and `p` compare trained with dropped groups; None where there are fewer than `MIN_GROUPS` of either.
    """

    name: str
    trained: float | None
    dispatched: float | None
    num_trained: int
    num_dispatched: int
    z: float | None
    p: float | None

    @property
    def differs(self) -> bool:
        """Whether trained and dropped groups differ beyond chance."""
        return self.p is not None and self.p < BEYOND_CHANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedGroups:
    """The groups dropped for a reason, in means; None where nothing is known. `on_purpose`: the settings ask for it."""

    reason: str
    count: int
    on_purpose: bool
    prompt_tokens: float | None
    completion_tokens: float | None
    reward: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """How trained groups compare with dispatched ones, and what was dropped."""

    measures: tuple[Measure, ...]
    dropped: tuple[DroppedGroups, ...]


def compare_selection(groups: Iterable[AuditedGroup]) -> Selection:
    """Compare the trained groups with all that were dispatched.

    Where a group was dropped before it had rewards, its difficulty is that of the same prompt's other groups.
    """
    found = [group for group in groups if group.prompt_tokens is not None]
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for group in found:
        if group.reward is not None:
            by_prompt[group.prompt].append(group.reward)
    lengths = [None if group.prompt_tokens is None else float(group.prompt_tokens) for group in found]
    completions = [group.completion_tokens for group in found]
    rewards = [group.reward if group.reward is not None else mean(by_prompt.get(group.prompt, ())) for group in found]
    is_trained = [group.is_trained for group in found]
    is_dropped = [bool(group.reason) for group in found]
    named = {"prompt tokens": lengths, "completion tokens": completions, "mean reward": rewards}
    reasons = dict.fromkeys(group.reason for group in found if group.reason)
    return Selection(
        measures=tuple(_measure(name, values, is_trained, is_dropped) for name, values in named.items()),
        dropped=tuple(
            _dropped(reason, [group.reason == reason for group in found], lengths, completions, rewards)
            for reason in reasons
        ),
    )


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mann-Whitney z, above 0 where the first tend to be larger, and its two-sided p.

    >>> [round(value, 4) for value in mann_whitney([1, 2, 3, 4], [5, 6, 7, 8])]
    [-2.3094, 0.0209]
    """
    n, m = len(first), len(second)
    values = np.array([*first, *second], float)
    _, inverse, ties = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[inverse]
    statistic = ranks[:n].sum() - n * (n + 1) / 2
    total = n + m
    variance = n * m / 12 * (total + 1 - float((ties.astype(float) ** 3 - ties).sum()) / (total * (total - 1)))
    z = 0.0 if variance <= 0 else float((statistic - n * m / 2) / sqrt(variance))
    return z, erfc(abs(z) / sqrt(2))


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _measure(
    name: str, values: Sequence[float | None], is_trained: Sequence[bool], is_dropped: Sequence[bool]
) -> Measure:
    trained, dropped = _chosen(values, is_trained), _chosen(values, is_dropped)
    known = [value for value in values if value is not None]
    z = p = None
    if min(len(trained), len(dropped)) >= MIN_GROUPS:
        z, p = mann_whitney(trained, dropped)
    return Measure(
        name=name,
        trained=mean(trained),
        dispatched=mean(known),
        num_trained=len(trained),
        num_dispatched=len(known),
        z=z,
        p=p,
    )


def _dropped(
    reason: str,
    is_it: Sequence[bool],
    lengths: Sequence[float | None],
    completions: Sequence[float | None],
    rewards: Sequence[float | None],
) -> DroppedGroups:
    return DroppedGroups(
        reason=reason,
        count=sum(is_it),
        on_purpose=reason == NO_SIGNAL,
        prompt_tokens=mean(_chosen(lengths, is_it)),
        completion_tokens=mean(_chosen(completions, is_it)),
        reward=mean(_chosen(rewards, is_it)),
    )


def _chosen(values: Sequence[float | None], is_wanted: Sequence[bool]) -> list[float]:
    return [value for value, wanted in zip(values, is_wanted, strict=True) if wanted and value is not None]
