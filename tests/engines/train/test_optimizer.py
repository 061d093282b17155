import pytest
import torch
from torch import nn

from asyncflow.core.errors import InvariantError, RunFolderError
from asyncflow.engines.train.optimizer import Optimizer, Phase, learning_rate


def make_phase(**changes: float) -> Phase:
    settings = {"learning_rate": 0.5, "weight_decay": 0.0, "max_grad_norm": 1.0} | changes
    return Phase(betas=(0.9, 0.99), **settings)  # type: ignore[arg-type]


def test_the_rate_rises_then_falls_to_a_tenth() -> None:
    rising = make_phase(rise_steps=4)
    assert [learning_rate(rising, step) for step in (0, 3, 9)] == [0.125, 0.5, 0.5]
    falling = make_phase(fall_steps=11)
    assert [learning_rate(falling, step) for step in (0, 5, 10, 99)] == pytest.approx([0.5, 0.275, 0.05, 0.05])


def test_a_step_is_adamw_on_the_divided_and_clipped_gradient() -> None:
    ours, theirs = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = Optimizer({"w": ours}, make_phase(weight_decay=0.1))
    reference = torch.optim.AdamW([theirs], lr=0.5, betas=(0.9, 0.99), weight_decay=0.1)
    for scale in (1.0, 100.0, 0.01):
        ours.grad = 8 * scale * torch.arange(6.0).reshape(3, 2)
        theirs.grad = scale * torch.arange(6.0).reshape(3, 2)
        norm, _ = optimizer.step(8.0)
        assert norm == pytest.approx(theirs.grad.norm().item())
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        reference.step()
        torch.testing.assert_close(ours, theirs)
        assert ours.grad is None


def test_vectors_do_not_decay() -> None:
    norm_weight = nn.Parameter(torch.ones(4))
    optimizer = Optimizer({"norm": norm_weight}, make_phase(weight_decay=0.5))
    norm_weight.grad = torch.zeros(4)
    optimizer.step(1.0)
    assert norm_weight.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("denominator", [0.0, -1.0, float("nan")])
def test_a_denominator_must_be_positive(denominator: float) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer({"w": parameter}, make_phase())
    parameter.grad = torch.ones(2, 2)
    with pytest.raises(InvariantError, match="optimizer step 0"):
        optimizer.step(denominator)


def test_the_state_of_another_model_is_refused() -> None:
    optimizer = Optimizer({"w": nn.Parameter(torch.ones(2, 2))}, make_phase())
    with pytest.raises(RunFolderError, match="unknown parameter"):
        optimizer.restore(1, {"exp_avg.v": torch.ones(2, 2)})
