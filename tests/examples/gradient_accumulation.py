"""A GRPO-style training loop in plain PyTorch, with gradient accumulation: two ways to write it, of which one is right.

`token_mean_of_each_micro_batch` is what comes out when a loss that averages over tokens is put into an accumulation loop: each
micro-batch is divided by its own number of tokens. `token_mean_of_the_batch` counts the tokens of the whole batch first. They
agree where all rows are of one length, which is why tests on toy data do not find it.

    pgcheck.check_training_step(token_mean_of_the_batch, pgcheck.TinyGPT(3), task, same_as="cispo(notes)")
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pgcheck

MICRO_BATCH = 2  # rows


def log_probs(model: nn.Module, rollouts: pgcheck.Rollouts) -> Tensor:
    """log π of every token but the first, `[B, L − 1]`."""
    logits = model(rollouts.input_ids)[:, :-1]  # those of column l are for the token in column l + 1
    return torch.log_softmax(logits, -1).gather(-1, rollouts.input_ids[:, 1:, None]).squeeze(-1)


def advantages(rollouts: pgcheck.Rollouts) -> Tensor:
    """(reward − mean)/std over the rows of each prompt, which stand together, `[B]`."""
    out = torch.zeros_like(rollouts.rewards)
    for uid in rollouts.uid.unique():
        rows = rollouts.uid == uid
        r = rollouts.rewards[rows]
        out[rows] = (r - r.mean()) / (r.std(unbiased=False) + 1e-6)
    return out


def token_mean_of_the_batch(model: nn.Module, rollouts: pgcheck.Rollouts) -> None:
    """Right: one normaliser, counted before the loop."""
    model.zero_grad()
    adv, tokens = advantages(rollouts), rollouts.response_mask.sum()
    for low in range(0, rollouts.rows, MICRO_BATCH):
        part = slice(low, low + MICRO_BATCH)
        micro = rollouts[part]
        loss = -(adv[part, None] * log_probs(model, micro) * micro.response_mask[:, 1:]).sum() / tokens
        loss.backward()


def token_mean_of_each_micro_batch(model: nn.Module, rollouts: pgcheck.Rollouts) -> None:
    """Wrong: every micro-batch has a normaliser of its own, so a token in one of short rows weighs more."""
    model.zero_grad()
    adv, steps = advantages(rollouts), rollouts.rows // MICRO_BATCH
    for low in range(0, rollouts.rows, MICRO_BATCH):
        part = slice(low, low + MICRO_BATCH)
        micro = rollouts[part]
        mask = micro.response_mask[:, 1:]
        loss = -(adv[part, None] * log_probs(model, micro) * mask).sum() / mask.sum()
        (loss / steps).backward()
