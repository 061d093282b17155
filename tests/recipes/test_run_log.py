"""What is asked of a run's log before a resume starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncflow.core.config import AlgorithmConfig, QueueConfig, RunConfig, TrainConfig
from asyncflow.core.errors import ConfigError
from asyncflow.data import records
from asyncflow.recipes.checks import changed_settings
from asyncflow.recipes.run_log import steps_to_take_again
from tests.data.simulated_log import CONFIG, Entry, simulated, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose log holds six steps."""
    write(tmp_path / "ledger", simulated()[0])
    return tmp_path


def changed(**settings: object) -> RunConfig:
    return CONFIG.model_copy(update=settings)


def test_the_steps_after_the_checkpoint_are_taken_again(folder: Path, tmp_path: Path) -> None:
    assert steps_to_take_again(folder, 4, CONFIG) == [5, 6]
    assert steps_to_take_again(folder, 6, CONFIG) == []
    assert steps_to_take_again(folder, 9, CONFIG) == []  # a log behind its checkpoint is set aside
    assert steps_to_take_again(tmp_path / "elsewhere", 0, CONFIG) == []


def test_fewer_steps_than_the_log_holds_are_refused_with_their_number(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"steps=5 is below the 6 that the log holds: give at least steps=6"):
        steps_to_take_again(folder, 4, changed(steps=5))
    assert steps_to_take_again(folder, 4, changed(steps=5, queue=QueueConfig(log="off"))) == []


def test_columns_that_logged_steps_lack_are_named_before_anything_starts(folder: Path) -> None:
    with_kl = changed(algorithm=AlgorithmConfig(kl_coef=0.1))
    with pytest.raises(ConfigError, match=r"steps 5 to 6 are to be taken again .*have no ref_logprobs.*kl_coef=0.1"):
        steps_to_take_again(folder, 4, with_kl)
    assert steps_to_take_again(folder, 6, with_kl) == []


def test_a_column_that_only_some_rows_got_is_missing(tmp_path: Path) -> None:
    entries: list[Entry] = []
    for record, payload in simulated()[0]:
        if isinstance(record, records.Written):
            rows = records.read_rows(record.rows)
            record = records.Written(rows=records.row_bytes(rows[:-1]), places=b"", columns=record.columns)
        entries.append((record, payload))
    write(tmp_path / "ledger", entries)
    with pytest.raises(ConfigError, match="have no advantage"):
        steps_to_take_again(tmp_path, 4, CONFIG)


def test_changed_settings_of_training_are_named_with_both_values() -> None:
    after = changed(train=TrainConfig(learning_rate=1e-3), steps=9)
    assert changed_settings(CONFIG, after) == ["train.learning_rate=0.001 (was 0.0001)"]
