"""GRPO in one file, to be read from top to bottom. Run it: `python examples/teach_grpo.py`.

A tiny transformer learns to add: it imitates a few demonstrations, until it is right
sometimes, then it practises. Everything happens in turn and nothing is fast: rollouts, then
one optimizer step, again and again. That is what `max_staleness = 0` does in asyncflow, and
a test compares the two, step by step.
"""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

ALPHABET = "0123456789+="
END, PAD = len(ALPHABET), len(ALPHABET) + 1
MAX_TOKENS = 3  # of an answer: up to two digits, then END
CLIP_LOW, CLIP_HIGH = 0.2, 0.28

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


class Sample(NamedTuple):
    """What one rollout leaves for training."""

    token_ids: list[int]  # prompt, then completion
    num_prompt: int  # tokens of the prompt
    logprobs: list[float]  # of each completion token, when it was sampled
    advantage: float  # how much better than its siblings


# ---- the task ------------------------------------------------------------------------------


def make_problem(rng: random.Random) -> tuple[list[int], int]:
    """A prompt such as `7+8=`, and the number that answers it."""
    a, b = rng.randrange(10), rng.randrange(10)
    return [ALPHABET.index(character) for character in f"{a}+{b}="], a + b


def spell(answer: int) -> list[int]:
    """The completion that answers rightly."""
    return [ALPHABET.index(character) for character in str(answer)] + [END]


# ---- the policy ----------------------------------------------------------------------------


def make_model(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(ALPHABET) + 2,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def make_optimizer(model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)


def completion_logprobs(model: PreTrainedModel, token_ids: list[int], num_prompt: int) -> Tensor:
    """Log-probability of each token of the completion, given all before it."""
    logits = model(input_ids=torch.tensor([token_ids])).logits[0]
    logprobs = torch.log_softmax(logits[:-1], dim=-1)  # the logits at t are about token t + 1
    chosen = logprobs.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    return chosen[num_prompt - 1 :]


@torch.no_grad()
def sample_group(model: PreTrainedModel, prompt: list[int], group_size: int) -> list[tuple[list[int], list[float]]]:
    """`group_size` completions of one prompt with their log-probabilities."""
    rows = torch.tensor([prompt] * group_size)
    logprobs = torch.zeros(group_size, 0)
    for _ in range(MAX_TOKENS):
        next_logprobs = torch.log_softmax(model(input_ids=rows).logits[:, -1], dim=-1)
        tokens = torch.multinomial(next_logprobs.exp(), 1)
        rows = torch.cat([rows, tokens], dim=1)
        logprobs = torch.cat([logprobs, next_logprobs.gather(1, tokens)], dim=1)
    completions = []
    for row, row_logprobs in zip(rows[:, len(prompt) :].tolist(), logprobs.tolist(), strict=True):
        length = row.index(END) + 1 if END in row else MAX_TOKENS
        completions.append((row[:length], row_logprobs[:length]))
    return completions


# ---- the algorithm -------------------------------------------------------------------------


def advantages(rewards: list[float]) -> list[float]:
    """GRPO: the reward, relative to the siblings'."""
    rewards_G = torch.tensor(rewards, dtype=torch.float64)
    return ((rewards_G - rewards_G.mean()) / (rewards_G.std() + 1e-6)).tolist()


def loss_and_gradients(model: PreTrainedModel, samples: list[Sample], aggregation: Aggregation) -> float:
    """The clipped policy loss over all samples at once; its gradient is left in `parameter.grad`."""
    model.zero_grad()
    total = torch.tensor(0.0)
    for sample in samples:
        logprobs = completion_logprobs(model, sample.token_ids, sample.num_prompt)
        ratio = torch.exp(logprobs - torch.tensor(sample.logprobs))
        bounded = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        token_losses = -torch.minimum(ratio * sample.advantage, bounded * sample.advantage)
        total = total + (token_losses.mean() if aggregation == "sequence_mean" else token_losses.sum())
    denominator = {
        "token_mean": sum(len(sample.logprobs) for sample in samples),
        "sequence_mean": len(samples),
        "constant": len(samples) * MAX_TOKENS,
    }[aggregation]
    loss = total / denominator
    torch.autograd.backward(loss)
    return loss.item()


def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> float:
    """Use the gradients; returns their norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return norm.item()


# ---- the run -------------------------------------------------------------------------------


def imitate(model: PreTrainedModel, rng: random.Random, steps: int) -> None:
    """Supervised warm-up: raise the log-probability of right answers."""
    optimizer = make_optimizer(model, 2e-3)
    for _ in range(steps):
        model.zero_grad()
        for prompt, answer in (make_problem(rng) for _ in range(32)):
            loss = -completion_logprobs(model, prompt + spell(answer), len(prompt)).mean() / 32
            torch.autograd.backward(loss)
        step(model, optimizer)


def practise(model: PreTrainedModel, rng: random.Random, steps: int) -> None:
    """Reinforcement learning: sample groups, compare siblings, take one step."""
    optimizer = make_optimizer(model, 1e-3)
    for number in range(steps):
        samples, rewards = [], []
        for prompt, answer in (make_problem(rng) for _ in range(16)):
            group = sample_group(model, prompt, group_size=8)
            group_rewards = [float(completion == spell(answer)) for completion, _ in group]
            for (completion, logprobs), advantage in zip(group, advantages(group_rewards), strict=True):
                samples.append(Sample(prompt + completion, len(prompt), logprobs, advantage))
            rewards += group_rewards
        loss = loss_and_gradients(model, samples, "token_mean")
        norm = step(model, optimizer)
        print(f"step {number:3d}  reward {sum(rewards) / len(rewards):.3f}  loss {loss:+.4f}  gradient {norm:.3f}")  # noqa: T201


if __name__ == "__main__":
    torch.set_num_threads(1)
    random_numbers = random.Random(7)  # noqa: S311 - not for secrets
    policy = make_model(seed=7)
    imitate(policy, random_numbers, steps=120)
    practise(policy, random_numbers, steps=60)
