"""Losses over one batch, [B, T]."""

import torch


def reward_to_go(batch):
    weight = batch.discount_weight * batch.reward_to_go
    return -(weight * batch.logp * batch.mask).sum(-1).mean()


def rloo(batch):
    r = batch.episode_return
    others = (r.sum() - r) / (len(r) - 1)
    return -((r - others)[:, None] * batch.logp * batch.mask).sum(-1).mean()


def centred(batch):
    r = batch.episode_return
    adv = r - r.mean()
    return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()


def make_grpo(eps):
    def grpo(batch):
        r = batch.episode_return
        adv = (r - r.mean()) / (r.std(correction=0) + eps)
        row = (adv[:, None] * batch.logp * batch.mask).sum(-1)
        return -(row / batch.length).mean()

    return grpo


def ppo(batch, low=0.2, high=0.2):
    adv = batch.reward_to_go
    clipped = batch.ratio.clamp(1 - low, 1 + high)
    surrogate = torch.min(batch.ratio * adv, clipped * adv)
    return -(surrogate * batch.mask).sum() / batch.mask.sum()


def cispo(batch, high=0.2):
    ratio = batch.ratio.detach().clamp(max=1 + high)
    return -(ratio * batch.reward_to_go * batch.logp * batch.mask).sum(-1).mean()
