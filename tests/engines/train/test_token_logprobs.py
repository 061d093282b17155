import pytest
import torch

from asyncflow.engines.train import token_logprobs as module
from asyncflow.engines.train.token_logprobs import token_logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_elements", [1, 23, 10_000])
def test_equals_the_textbook_forward_and_backward(
    temperature: float, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(12, 11, generator=generator)).requires_grad_()
    reference = logits.detach().double().requires_grad_()
    targets = torch.randint(0, 11, (12,), generator=generator)
    g_logprobs, g_entropy = torch.randn(2, 12, generator=generator)

    logprobs, entropy = token_logprobs(logits, targets, temperature)
    log_p = torch.log_softmax(reference / temperature, -1)
    chosen, plain_entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(logprobs.double(), chosen, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), plain_entropy, rtol=1e-5, atol=1e-6)

    torch.autograd.backward((logprobs * g_logprobs + entropy * g_entropy).sum())
    torch.autograd.backward((chosen * g_logprobs + plain_entropy * g_entropy).sum())
    assert logits.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)


def test_tokens_that_are_ruled_out_do_no_harm() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0]), 1.0)
    assert entropy.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    torch.autograd.backward((logprobs + entropy).sum())
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, 0.0, -0.5]]))
