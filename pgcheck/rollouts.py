"""`Rollouts`: a batch as a training loop sees it, tokens padded to one width, with masks, rewards and old log-probabilities.

    column        0   1   2   3   4   5   6        B rows, L columns; a prompt of 2 tokens, a response of 3,
    input_ids     p   p   a   b   $   $   $        $ the eos, here the padding token as well
    attention     1   1   1   1   1   0   0
    response      0   0   1   1   1   0   0        the eos that the policy wrote counts, padding does not
    logits        of column l − 1 are for the token in column l

Every tensor `[B, L]` speaks of the token in its own column: `old_log_probs[i, l]` is log π_old of `input_ids[i, l]`. With
`padding="right"` a row begins in column 0; with `"left"` every response begins in column `prompt_width`, as in verl and TRL,
whose `[B, R]` tensors are then `x[:, rollouts.prompt_width:]`.

Guarantee: each call gives tensors of its own, so that a step may write to them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pgcheck.errors import UsageError
from pgcheck.policies.transformer import LMPolicy
from pgcheck.problem import Problem

Padding = Literal["right", "left"]


@dataclass(frozen=True)
class Rollouts:
    """B rollouts, or (as a table) all N of a problem. Rows of a group stand together.

    | here | verl | TRL |
    |---|---|---|
    | `input_ids`, `attention_mask`, `position_ids` | the same | `prompt_completion_ids`, `attention_mask` |
    | `response_mask` | `response_mask` `[B, R]` | `completion_mask` (`tool_mask` in it) |
    | `rewards` | Σ_t `token_level_scores` | `rewards` |
    | `token_level_rewards` | `token_level_rewards` | |
    | `old_log_probs` | `old_log_probs` | `old_per_token_logps` |
    | `ref_log_probs` | `ref_log_prob` | `ref_per_token_logps` |
    | `uid` | `uid` | rows `i · num_generations …` |
    """

    input_ids: Tensor  # [B, L] int64, the prompt and everything after it
    attention_mask: Tensor  # [B, L] int64, 1 on real tokens, 0 on padding
    position_ids: Tensor  # [B, L] int64, 0, 1, 2, … along the real tokens
    response_mask: Tensor  # [B, L] int64, 1 exactly where the policy chose the token; 0 on what a tool said
    rewards: Tensor  # [B] float64, the score of each row
    token_level_rewards: Tensor  # [B, L] float64, the same where it is paid, on the last token
    old_log_probs: Tensor  # [B, L] float64, log π_old, 0 where response_mask is 0
    ref_log_probs: Tensor  # [B, L] float64, log π_ref, likewise
    uid: Tensor  # [B] int64, rows of one prompt draw share it
    prompt_length: Tensor  # [B] int64, real tokens of the prompt
    prompt_width: int  # columns of the longest prompt

    @property
    def rows(self) -> int:
        """B."""
        return int(self.input_ids.shape[0])

    def __getitem__(self, rows: slice | Tensor) -> Rollouts:
        """Some of the rows: a micro-batch."""
        named: dict[str, Any] = {name: x[rows] if isinstance(x, Tensor) else x for name, x in vars(self).items()}
        return Rollouts(**named)


def token_table(problem: Problem, *, padding: Padding = "right", pad_token_id: int = 0) -> Rollouts:
    """All N rollouts of a problem with a language model, as rows `[N, L]`; `uid` is the number of the prompt.

    Raises:
        UsageError: the policy is no language model; padding on no side.
    """
    policy, paths = problem.policy, problem.trajectories.paths
    if not isinstance(policy, LMPolicy):
        raise UsageError(f"problem: '{problem.name}' has no language model, so its rollouts are no tokens.")
    if padding not in ("right", "left"):
        raise UsageError(f"padding: {padding!r} is neither 'right' nor 'left'.")
    read = policy.texts  # what the model reads in each context
    N, acts = len(paths), paths.mask > 0
    first, last = acts.int().argmax(-1), paths.end - 1  # a completion ends with a token of the policy's
    texts, prompts = [], []
    for n in range(N):
        before = read[int(paths.context[n, last[n]])]
        texts.append((*before, int(paths.action[n, last[n]])))
        prompts.append(len(read[int(paths.context[n, first[n]])]))
    width = max(prompts)
    begins = [width - p if padding == "left" else 0 for p in prompts]
    L = max(b + len(text) for b, text in zip(begins, texts, strict=True))
    ids = torch.full((N, L), pad_token_id)
    attention, response, position = (torch.zeros(N, L, dtype=torch.int64) for _ in range(3))
    paid, old, ref = (torch.zeros(N, L, dtype=torch.float64) for _ in range(3))
    table = problem.trajectories
    for n, (b, text, p) in enumerate(zip(begins, texts, prompts, strict=True)):
        real, after = slice(b, b + len(text)), slice(b + p, b + len(text))
        ids[n, real], attention[n, real], position[n, real] = torch.tensor(text), 1, torch.arange(len(text))
        columns = slice(0, len(text) - p)
        response[n, after] = acts[n, columns].to(torch.int64)
        paid[n, after] = paths.reward[n, columns]
        old[n, after] = table.behavior_logp[n, columns]
        ref[n, after] = table.ref_logp[n, columns]
    return Rollouts(
        input_ids=ids, attention_mask=attention, position_ids=position, response_mask=response, rewards=paid.sum(-1),
        token_level_rewards=paid, old_log_probs=old, ref_log_probs=ref, uid=paths.start.clone(),
        prompt_length=torch.tensor(prompts), prompt_width=width,
    )  # fmt: skip


def rollouts(table: Rollouts, index: Tensor, labels: Tensor) -> Rollouts:
    """Rows `index` `[B]` of a table, in the groups `labels` `[B]`."""
    return replace(table[index], uid=labels.clone())
