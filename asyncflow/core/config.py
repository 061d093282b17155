"""Every setting of a run, written once: its default, unit and range.

A recipe returns a `RunConfig` with its own defaults; a TOML file and `a.b=v` words override
it (`asyncflow.core.settings`). Unknown names are rejected. The resolved configuration is
written into the run folder and runs again.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Decay = Annotated[float, Field(ge=0, lt=1)]
"""How much of a moment AdamW keeps in a step."""


class Section(BaseModel):
    """A table of settings: closed, so a misspelt name is an error, and read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ColumnsConfig(Section):
    """Which column of the data holds what, in recipes that read `data`."""

    text: str = Field("prompt", description="column with the text of a prompt")
    answer: str = Field("answer", description="column with the reference answer")
    id: str = Field("", description="column with a name for each prompt; empty numbers them")


class SamplingConfig(Section):
    """How rollouts are sampled: from the whole distribution.

    Cutting it (top-p, top-k) would make the ratio of trainer to sampler wrong: with top_p 0.9 its
    mean is 0.91 on the very same weights.
    """

    temperature: float = Field(1.0, gt=0, description="softmax temperature of training rollouts")
    max_tokens: int = Field(64, ge=1, description="tokens of a completion at most")


class RolloutConfig(Section):
    """The engine that writes completions."""

    engine: Literal["torch"] = Field("torch", description="name of a rollout engine")
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="weights and KV cache")
    max_running: int = Field(256, ge=1, description="completions decoded at once")
    threads: int = Field(0, ge=0, description="CPU threads; 0 divides the cores among the roles")
    time_limit_s: float = Field(600.0, gt=0, description="seconds after which a rollout is given up")
    max_failures: int = Field(32, ge=0, description="failed groups allowed among the last 1,024")


class TrainConfig(Section):
    """The engine that takes the optimizer steps."""

    engine: Literal["torch"] = Field("torch", description="name of a training engine")
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the forward and backward pass")
    threads: int = Field(0, ge=0, description="CPU threads; 0 divides the cores among the roles")
    learning_rate: float = Field(1e-4, ge=0, description="AdamW step size")
    rise_steps: int = Field(0, ge=0, description="first steps, over which the learning rate rises linearly")
    betas: tuple[Decay, Decay] = Field((0.9, 0.99), description="AdamW moment decays")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    micro_batch_tokens: int = Field(4096, ge=1, description="tokens of one forward and backward pass at most")


class AlgorithmConfig(Section):
    """What is learnt from a group. Sources are given in `asyncflow.algo`."""

    advantage: Literal["grpo", "dr_grpo"] = Field("grpo", description="group-relative; dr_grpo does not divide by std")
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = Field(
        "token_mean", description="average over tokens, over sequences, or over sequences x max_tokens"
    )
    correction: Literal["ppo", "decoupled", "truncated", "none"] = Field(
        "ppo", description="how stale tokens are corrected for"
    )
    clip_low: float = Field(0.2, ge=0, lt=1, description="the ratio is clipped below 1 - clip_low")
    clip_high: float = Field(0.28, ge=0, description="the ratio is clipped above 1 + clip_high")
    max_weight: float = Field(2.0, gt=0, description="cap of importance weights (decoupled and truncated)")
    kl_coef: float = Field(0.0, ge=0, description="weight of the KL penalty to the starting policy")
    drop_no_signal: bool = Field(False, description="drop groups whose rewards are all equal and sample others instead")


class WarmupConfig(Section):
    """Supervised steps on the recipe's demonstrations, before reinforcement learning."""

    steps: int = Field(0, ge=0, description="optimizer steps; 0 skips the warm-up")
    batch_size: int = Field(64, ge=1, description="demonstrations in a step")
    learning_rate: float = Field(2e-3, ge=0, description="AdamW step size, falling linearly to a tenth")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW moment decays")


class EvaluateConfig(Section):
    """Held-out accuracy while the run goes on and at its end."""

    every: int = Field(5, ge=0, description="steps between evaluations; 0 evaluates only at the end")
    num_prompts: int = Field(256, ge=1, description="held-out prompts of an evaluation on the way")
    final_num_prompts: int = Field(1024, ge=1, description="held-out prompts before and after the run")
    temperature: float = Field(1.0, ge=0, description="0 is greedy")


class CheckpointConfig(Section):
    """What survives the run, and a crash."""

    every: int = Field(10, ge=0, description="steps between checkpoints; 0 writes only the last")
    keep: int = Field(2, ge=1, description="checkpoints kept")


class QueueConfig(Section):
    """The transfer queue between rollout and training, and its log on the disk."""

    log: Literal["sync", "group_commit", "off"] = Field(
        "sync",
        description="sync: acted upon once on disk; group_commit: on disk soon after; off: resume from checkpoints",
    )
    group_commit_ms: float = Field(10.0, gt=0, description="milliseconds of work that group_commit may lose")
    keep: Literal["checkpoints", "all"] = Field(
        "checkpoints", description="rows that the log keeps: those that a kept checkpoint may need, or all"
    )
    memory_mb: int = Field(1024, ge=1, description="rows in memory at most; taken as it is used")


class RunConfig(Section):
    """A whole run."""

    recipe: str = Field("", description="name of a recipe, or a Python file with one")
    name: str = Field("", description="name of the run folder; empty invents one")
    seed: int = Field(7, ge=0, description="every random number of the run derives from it")
    model: str = Field("tiny", description="a folder, a hub name, or a size the recipe builds, such as tiny")
    data: str = Field("", description="a file, a folder or a hub name, where the recipe needs data")
    steps: int = Field(40, ge=0, description="optimizer steps of reinforcement learning")
    max_staleness: int = Field(1, ge=0, description="versions a token may be old when trained on; 0 is synchronous")
    look_ahead: int = Field(1, ge=1, description="groups within which young ones may overtake a slow one; 1 is strict")
    groups_per_step: int = Field(32, ge=1, description="prompts in an optimizer step")
    group_size: int = Field(8, ge=1, description="rollouts of each prompt")
    deterministic: bool = Field(False, description="bit-equal runs and resumes; costs speed")

    columns: ColumnsConfig = ColumnsConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    warmup: WarmupConfig = WarmupConfig()
    queue: QueueConfig = QueueConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _group_relative_needs_siblings(self) -> RunConfig:
        if self.group_size < 2 and self.steps > 0:
            raise ValueError("group_size must be at least 2: advantages are relative to the siblings of a group")
        return self
