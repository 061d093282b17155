"""Health: a collapse is said once, with the setting to change; a healthy run is left in peace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from asyncflow.core.config import RunConfig
from asyncflow.core.setting_list import list_settings
from asyncflow.workflow.health import RECENT, Health

Record = Mapping[str, float | int | str]


def record(
    reward: float = 0.5, entropy: float = 0.8, ratio: float = 1.0, effective_sample_size: float = 0.95
) -> dict[str, float | int | str]:
    return {
        "reward": reward,
        "entropy": entropy,
        "ratio": ratio,
        "effective_sample_size": effective_sample_size,
        "note": "text is passed over",
    }


def warnings(records: Iterable[Record], max_staleness: int = 1) -> list[str]:
    health = Health(max_staleness)
    return [message for one in records for message in health.check(one)]


def test_a_run_that_learns_noisily_is_left_in_peace() -> None:
    rng = np.random.default_rng(0)
    rising = [
        record(
            reward=float(np.clip(0.2 + 0.007 * step + rng.normal(scale=0.03), 0, 1)),
            entropy=0.8 * 0.98**step,
            ratio=float(rng.normal(1, 0.03)),
            effective_sample_size=float(rng.uniform(0.8, 1)),
        )
        for step in range(100)
    ]
    assert warnings(rising) == []


def test_a_first_step_with_no_reward_at_all_is_left_in_peace() -> None:
    assert warnings([record(reward=0.0, entropy=2.0)] * 20) == []


def test_each_thing_that_collapses_is_said_once_with_a_setting_that_exists() -> None:
    well = [record(reward=0.6)] * RECENT
    ill = [record(reward=0.1, entropy=0.001, ratio=3.0, effective_sample_size=0.1)] * 20
    said = warnings([*well, *ill])
    assert len(said) == 4
    assert [[word in text for text in said].count(True) for word in ("entropy is", "ratio is", "sample size of")] == [
        1,
        1,
        1,
    ]
    assert "the reward fell from 0.60 to" in "\n".join(said)
    names = {setting.name for setting in list_settings(RunConfig())}
    for text in said:
        assert any(name in text for name in names if "." in name), text


def test_a_ratio_may_be_wrong_on_either_side() -> None:
    assert "ratio is 0.50" in warnings([record(ratio=0.5)])[0]
    assert "ratio is 1.60" in warnings([record(ratio=1.6)])[0]
    assert "ratio is nan" in warnings([record(ratio=float("nan"))])[0]


def test_what_recovered_is_said_again_when_it_comes_back() -> None:
    assert len(warnings([record(ratio=3.0), record(), record(ratio=3.0)])) == 2


def test_a_lower_bound_is_advised_only_where_there_is_one() -> None:
    falling = [record(reward=0.9)] * RECENT + [record(reward=0.0)] * RECENT
    assert "a lower max_staleness" not in warnings(falling, max_staleness=1)[0]
    assert "a lower max_staleness" in warnings(falling, max_staleness=2)[0]


def test_one_bad_step_is_no_collapse() -> None:
    assert warnings([record(reward=0.6)] * 10 + [record(reward=0.1)] + [record(reward=0.6)] * 10) == []


def test_a_record_without_these_numbers_is_passed_over() -> None:
    assert warnings([{"loss": 1.0}] * 10) == []


def test_a_held_out_accuracy_clearly_below_its_best_is_said() -> None:
    health = Health(max_staleness=2)
    assert health.check_accuracy(0.9, 0.02) == []
    assert health.check_accuracy(0.62, 0.02) == []
    [said] = health.check_accuracy(0.5, 0.02)
    assert said.startswith("held-out accuracy fell from 90.0% to 50.0%")
    assert "max_staleness" in said
    assert Health(max_staleness=0).check_accuracy(0.0, 0.0) == []
