"""The columns of a sample, by name: written once here, so that a misspelt one is an error.

Per-token columns have the sample's length; per-sample columns have one value for each sample.

| name           | of a    | dtype   | written by                                             |
|----------------|---------|---------|--------------------------------------------------------|
| `token_ids`    | token   | int32   | the rollout, or a demonstration                        |
| `loss_mask`    | token   | bool    | the same: true where the policy sampled the token      |
| `logprobs`     | token   | float32 | the rollout engine, when it sampled; 0 elsewhere       |
| `versions`     | token   | int32   | the same: optimizer steps behind it; -1 elsewhere      |
| `reward`       | sample  | float32 | the agent, or a reward stage                           |
| `advantage`    | sample  | float32 | the advantage stage, over complete groups              |
| `ref_logprobs` | token   | float32 | the reference stage, where there is a KL penalty       |
"""

from __future__ import annotations

TOKEN_IDS = "token_ids"  # noqa: S105 - a column, not a password
LOSS_MASK = "loss_mask"
LOGPROBS = "logprobs"
VERSIONS = "versions"
REWARD = "reward"
ADVANTAGE = "advantage"
REF_LOGPROBS = "ref_logprobs"
