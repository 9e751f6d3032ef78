"""Training steps, right ones and wrong ones, and a language model of five operations to run them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Bag(nn.Module):
    """Logits from the mean of what was read so far; reads positions and skips padding if it is told of them."""

    def __init__(self, vocab_size: int, *, width: int = 4, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab_size, width), nn.Embedding(12, width)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, vocab_size)
        self.dropout = nn.Dropout(dropout)
        self.double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.7)
        self.eval()

    def states(self, ids: Tensor, real: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        real = torch.ones_like(ids) if real is None else real
        position = torch.arange(ids.shape[1]).expand(ids.shape) if position is None else position
        seen = (self.token(ids) * self.position(position).exp()) * real.unsqueeze(-1)
        mean = seen.cumsum(1) / real.cumsum(1).clamp(min=1).unsqueeze(-1)
        return torch.tanh(self.hidden(self.dropout(mean)) + self.position(position))

    def forward(self, ids: Tensor, real: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        return self.head(self.states(ids, real, position))


def chosen(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def log_probs(model: nn.Module, r: Any) -> Tensor:
    """log π of every token but the first, `[B, L − 1]`."""
    return chosen(model(r.input_ids)[:, :-1], r.input_ids[:, 1:])


def leave_one_out(r: Any) -> Tensor:
    out = torch.zeros_like(r.rewards)
    for u in r.uid.unique():
        own = r.rewards[r.uid == u]
        out[r.uid == u] = own - (own.sum() - own) / (len(own) - 1)
    return out


def mask_of(r: Any) -> Tensor:
    return r.response_mask[:, 1:]


def rows_loss(model: nn.Module, r: Any, adv: Tensor, mask: Tensor | None = None, logp: Tensor | None = None) -> Tensor:
    """−Σ adv log π / B."""
    logp = log_probs(model, r) if logp is None else logp
    return -(adv[:, None] * logp * (mask_of(r) if mask is None else mask)).sum() / len(adv)


# -- right


def rloo(model: nn.Module, r: Any) -> None:
    rows_loss(model, r, leave_one_out(r)).backward()


def reinforce(model: nn.Module, r: Any) -> None:
    rows_loss(model, r, r.rewards).backward()


def accumulated(model: nn.Module, r: Any) -> None:
    model.zero_grad()
    adv = leave_one_out(r)
    for i in range(r.rows):
        (rows_loss(model, r[i : i + 1], adv[i : i + 1]) / r.rows).backward()


def by_cross_entropy(model: nn.Module, r: Any) -> None:
    labels = torch.where(r.response_mask > 0, r.input_ids, -100)[:, 1:]
    losses = cross_entropy(
        model(r.input_ids)[:, :-1].flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    )
    (losses.unflatten(0, labels.shape).sum(1) * leave_one_out(r)).mean().backward()


def ratio_to_old(model: nn.Module, r: Any) -> None:
    """PPO's surrogate where the old policy is this one."""
    ratio = ((log_probs(model, r) - r.old_log_probs[:, 1:]) * mask_of(r)).exp()
    adv = leave_one_out(r)[:, None]
    surrogate = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
    (-(surrogate * mask_of(r)).sum() / r.rows).backward()


def ratio_to_itself(model: nn.Module, r: Any) -> None:
    logp = log_probs(model, r)
    rows_loss(model, r, leave_one_out(r), logp=(logp - logp.detach()).exp()).backward()


def loss_scaled_and_unscaled(model: nn.Module, r: Any) -> None:
    model.zero_grad()
    (rows_loss(model, r, leave_one_out(r)) * 1024).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= 1024


def by_autograd_grad(model: nn.Module, r: Any) -> None:
    own = list(model.parameters())
    for p, g in zip(own, torch.autograd.grad(rows_loss(model, r, leave_one_out(r)), own), strict=True):
        p.grad = g


def rows_shuffled(model: nn.Module, r: Any) -> None:
    """Micro-batches of rows in random order, with one normaliser: the order does not matter."""
    model.zero_grad()
    adv = leave_one_out(r)
    for i in torch.randperm(r.rows).tolist():
        (rows_loss(model, r[i : i + 1], adv[i : i + 1]) / r.rows).backward()


def as_in_verl(model: nn.Module, r: Any) -> None:
    """Prompts on the left, responses `[B, R]` in the last columns, positions and attention given."""
    P = r.prompt_width
    logits = model(r.input_ids, r.attention_mask, r.position_ids)[:, P - 1 : -1]
    logp, mask = chosen(logits, r.input_ids[:, P:]), r.response_mask[:, P:]
    (-(leave_one_out(r)[:, None] * logp * mask).sum() / r.rows).backward()


def trajectory_weighted(model: nn.Module, r: Any) -> None:
    """The row's importance weight, detached."""
    logp = log_probs(model, r)
    w = ((logp - r.old_log_probs[:, 1:]) * mask_of(r)).sum(-1).exp().detach()
    rows_loss(model, r, w * r.rewards, logp=logp).backward()


def dr_grpo(model: nn.Module, r: Any) -> None:
    (rows_loss(model, r, r.rewards - r.rewards.mean()) / 4).backward()


def grpo(model: nn.Module, r: Any) -> None:
    adv = (r.rewards - r.rewards.mean()) / (r.rewards.std(unbiased=False) + 1e-6)
    ratio = ((log_probs(model, r) - r.old_log_probs[:, 1:]) * mask_of(r)).exp()
    surrogate = torch.minimum(ratio * adv[:, None], ratio.clamp(0.8, 1.2) * adv[:, None]) * mask_of(r)
    (-(surrogate.sum(1) / mask_of(r).sum(1)).mean()).backward()


def frozen_embedding(model: Any, r: Any) -> None:
    """What takes no gradient is no part of the verdict."""
    rloo(model, r)
    assert model.token.weight.grad is None


# -- wrong


def not_shifted(model: nn.Module, r: Any) -> None:
    rows_loss(model, r, leave_one_out(r), r.response_mask, chosen(model(r.input_ids), r.input_ids)).backward()


def gathers_the_token_before(model: nn.Module, r: Any) -> None:
    rows_loss(model, r, leave_one_out(r), logp=chosen(model(r.input_ids)[:, :-1], r.input_ids[:, :-1])).backward()


def mask_not_shifted(model: nn.Module, r: Any) -> None:
    rows_loss(model, r, leave_one_out(r), r.response_mask[:, :-1]).backward()


def prompt_in_the_mask(model: nn.Module, r: Any) -> None:
    """With leave-one-out advantages this would be right on average: they average to 0 whatever the prompt."""
    prompt = torch.arange(r.input_ids.shape[1]) < r.prompt_length[:, None]
    rows_loss(model, r, r.rewards, (r.response_mask + prompt)[:, 1:]).backward()


def eos_dropped(model: nn.Module, r: Any) -> None:
    """The padding token is the eos: what masks the one masks the other."""
    rows_loss(model, r, leave_one_out(r), ((r.input_ids != 0) * r.response_mask)[:, 1:]).backward()


def padding_trained_on(model: nn.Module, r: Any) -> None:
    after = torch.arange(r.input_ids.shape[1]) >= r.prompt_length[:, None]
    rows_loss(model, r, leave_one_out(r), after[:, 1:]).backward()


def tool_trained_on(model: nn.Module, r: Any) -> None:
    after = torch.arange(r.input_ids.shape[1]) >= r.prompt_length[:, None]
    rows_loss(model, r, leave_one_out(r), (after * r.attention_mask)[:, 1:]).backward()


def averaged_over_padding(model: nn.Module, r: Any) -> None:
    """Each row over its own padded length."""
    losses = (log_probs(model, r) * mask_of(r)).sum(1) / r.attention_mask.sum(1)
    (-(leave_one_out(r) * losses).mean()).backward()


def averaged_over_the_row(model: nn.Module, r: Any) -> None:
    losses = (log_probs(model, r) * mask_of(r)).sum(1) / mask_of(r).sum(1)
    (-(leave_one_out(r) * losses).mean()).backward()


def advantages_per_micro_batch(model: nn.Module, r: Any) -> None:
    for low in range(0, r.rows, 2):
        micro = r[low : low + 2]
        adv = (micro.rewards - micro.rewards.mean()) / (micro.rewards.std(unbiased=False) + 1e-6)
        (rows_loss(model, micro, adv) / (r.rows // 2)).backward()


def mean_per_micro_batch(model: nn.Module, r: Any) -> None:
    for low in range(0, r.rows, 2):
        micro = r[low : low + 2]
        (rows_loss(model, micro, micro.rewards - micro.rewards.mean()) / (r.rows // 2)).backward()


def divided_by_accumulation_twice(model: nn.Module, r: Any) -> None:
    adv = leave_one_out(r)
    for i in range(r.rows):
        (rows_loss(model, r[i : i + 1], adv[i : i + 1]) / r.rows**2).backward()


def old_with_gradient(model: nn.Module, r: Any) -> None:
    logp, old = log_probs(model, r), log_probs(model, r)
    rows_loss(model, r, leave_one_out(r), logp=(logp - old).exp()).backward()


def another_temperature(model: nn.Module, r: Any) -> None:
    logits = model(r.input_ids)[:, :-1] / 0.7
    rows_loss(model, r, leave_one_out(r), logp=chosen(logits, r.input_ids[:, 1:])).backward()


def logits_gathered(model: nn.Module, r: Any) -> None:
    z = model(r.input_ids)[:, :-1].gather(-1, r.input_ids[:, 1:, None]).squeeze(-1)
    rows_loss(model, r, leave_one_out(r), logp=z).backward()


def loss_scale_left_in(model: nn.Module, r: Any) -> None:
    (rows_loss(model, r, leave_one_out(r)) * 1024).backward()


def sign_flipped(model: nn.Module, r: Any) -> None:
    (-rows_loss(model, r, leave_one_out(r))).backward()


def own_row_in_the_mean(model: nn.Module, r: Any) -> None:
    rows_loss(model, r, r.rewards - r.rewards.mean()).backward()


def clipped(model: nn.Module, r: Any) -> None:
    rloo(model, r)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def trunk_detached(model: Any, r: Any) -> None:
    logits = model.head(model.states(r.input_ids).detach())[:, :-1]
    rows_loss(model, r, leave_one_out(r), logp=chosen(logits, r.input_ids[:, 1:])).backward()


def ratio_missing(model: nn.Module, r: Any) -> None:
    reinforce(model, r)
