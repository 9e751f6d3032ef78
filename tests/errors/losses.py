"""A loss, or its coefficients, that break their contract."""

from __future__ import annotations

from tests.errors.cases import section

case = section("A loss that breaks its contract")

case("random", '''
def loss(batch):
    kept = torch.nn.functional.dropout(batch.episode_return, 0.1)
    return -(kept[:, None] * batch.logp * batch.mask).sum(-1).mean()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("stateful", '''
seen = []
def loss(batch):
    seen.append(1)
    return -((batch.episode_return - 0.1 * len(seen))[:, None] * batch.logp * batch.mask).sum(-1).mean()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("writes to its inputs", '''
def loss(batch):
    batch.reward.sub_(batch.reward.mean())
    return -(batch.reward * batch.logp * batch.mask).sum(-1).mean()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("writes to its inputs, met in moments", '''
def loss(batch):
    batch.reward.sub_(batch.reward.mean())
    return -(batch.reward * batch.logp * batch.mask).sum(-1).mean()
pgcheck.moments(loss, "dialogue/two-turn")
''')  # fmt: skip
case("writes to its inputs where autograd does not notice", '''
def loss(batch):
    adv = batch.reward.sub_(batch.reward.mean()).clone()
    return -(adv * batch.logp * batch.mask).sum(-1).mean()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("assigns to its inputs", '''
def loss(batch):
    batch.reward -= batch.reward.mean()
    return -(batch.reward * batch.logp * batch.mask).sum(-1).mean()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("writes to the log-probabilities", '''
def loss(batch):
    batch.logp.mul_(batch.mask)
    return -(batch.episode_return[:, None] * batch.logp).sum(-1).mean()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("not finite on a unanimous group", '''
def loss(batch):
    r = batch.episode_return
    adv = (r - r.mean()) / r.std()
    return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("not finite on a unanimous group, met in moments", '''
def loss(batch):
    r = batch.episode_return
    adv = (r - r.mean()) / r.std()
    return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()
pgcheck.moments(loss, "mdp/two-state")
''')  # fmt: skip
case("coefficients that are not finite on one batch", '''
def coefficients(batch):
    c = batch.episode_return[..., None] * batch.mask / batch.rows
    rare = (batch.action[..., 0] == 1).all(-1)  # every row begins with action 1
    return torch.where(rare[..., None, None], c / 0, c)
pgcheck.moments(pgcheck.from_coefficients(coefficients), "dialogue/unequal-groups")
''')  # fmt: skip
case("logit coefficients that are not finite on one batch", '''
def coefficients(batch):
    z = torch.zeros_like(batch.logits)
    return torch.where(batch.reward[..., None] == 0.5, torch.nan, z)
pgcheck.moments(pgcheck.from_coefficients(coefficients, leaf="logits"), "dialogue/two-turn")
''')  # fmt: skip
case("a batch of many rows that is not finite", '''
def coefficients(batch):
    return torch.full_like(batch.logp, torch.inf)
pgcheck.moments(pgcheck.from_coefficients(coefficients), pgcheck.Problem(mdp(horizon=1), [[0., 1.], [0., 0.]], group_size=20))
''')  # fmt: skip
case("finite, but its square is not", '''
def coefficients(batch):
    return 1e200 * batch.mask / batch.rows
pgcheck.moments(pgcheck.from_coefficients(coefficients, couples="trajectory"), "bandit/two-arm")
''')  # fmt: skip
case("a vector, not a scalar", '''
def loss(batch):
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1)
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("not a tensor", '''
def loss(batch):
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean().item()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("nothing", '''
def loss(batch):
    loss = -(batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("no gradient at all", '''
def loss(batch):
    return -(batch.episode_return[:, None] * batch.logp.detach() * batch.mask).sum(-1).mean()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("no gradient in log π", '''
scale = torch.ones((), requires_grad=True)
def loss(batch):
    return -(scale * batch.episode_return[:, None] * batch.logp.detach()).sum(-1).mean()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("raises an exception of its own", '''
def loss(batch):
    return -(batch.advantages * batch.logp * batch.mask).sum(-1).mean()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("raises on some batches only", '''
def loss(batch):
    if (batch.episode_return == batch.episode_return[0]).all():
        raise ValueError("no signal in this group.")
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean()
pgcheck.compare(["leave_one_out", loss], "bandit/two-arm")
''')  # fmt: skip
case("reads logits without saying so", '''
def loss(batch):
    return -(batch.episode_return[:, None] * batch.logits.log_softmax(-1).sum(-1)).sum(-1).mean()
pgcheck.moments(pgcheck.from_loss(loss), "dialogue/two-turn")
''')  # fmt: skip
case("biased", '''
def loss(batch):
    r = batch.episode_return
    return -((r - r.mean())[:, None] * batch.logp * batch.mask).sum(-1).mean()
pgcheck.check_estimator(loss, ["bandit/two-arm", "dialogue/two-turn"])
''')  # fmt: skip
case("trains on observations", '''
def loss(batch):
    return -(batch.episode_return[:, None] * batch.logp).sum(-1).mean()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("arguments of its own", '''
def loss(logp, advantages, mask):
    return -(logp * advantages * mask).sum(-1).mean()
pgcheck.check_estimator(loss, "dialogue/two-turn")
''')  # fmt: skip
case("a class", '''
class Loss:
    def __call__(self, batch):
        return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean()
pgcheck.check_estimator(Loss, "dialogue/two-turn")
''')  # fmt: skip
case("a function that makes losses", '''
def make(eps=0.1):
    return lambda batch: -(batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean()
pgcheck.check_estimator(make, "dialogue/two-turn")
''')  # fmt: skip

case = section("Coefficients that break their contract")

case("not a tensor", '''
pgcheck.moments(pgcheck.from_coefficients(lambda batch: 1.0, name="one"), "dialogue/two-turn")
''')  # fmt: skip
case("the wrong shape", '''
pgcheck.moments(pgcheck.from_coefficients(lambda batch: batch.episode_return, name="of_rows"), "dialogue/two-turn")
''')  # fmt: skip
case("complex numbers", '''
pgcheck.moments(pgcheck.from_coefficients(lambda batch: 1j * batch.mask, name="phases"), "dialogue/two-turn")
''')  # fmt: skip
case("raise an exception of their own", '''
pgcheck.moments(pgcheck.from_coefficients(lambda batch: batch.rewards, name="rewards"), "dialogue/two-turn")
''')  # fmt: skip
case("look at more than they declare", '''
def centred(batch):
    r = batch.episode_return
    return (r - r.mean(-1, keepdim=True))[..., None] * batch.mask / batch.rows
pgcheck.moments(pgcheck.from_coefficients(centred, couples="trajectory"), "dialogue/two-turn")
''')  # fmt: skip
case("read more of other rows than they declare", '''
def centred(batch):
    r = batch.reward[..., 0] + batch.length
    return (r - r.mean(-1, keepdim=True))[..., None] * batch.mask / batch.rows
problem = pgcheck.Problem(mdp(terminal=[1]), [[0., 1.], [0., 0.]], group_size=6)
pgcheck.moments(pgcheck.from_coefficients(centred, reads=("return",)), problem)
''')  # fmt: skip
case("read what cannot be read", '''
one = pgcheck.from_coefficients(lambda batch: batch.mask, reads=("reward",), name="one")
pgcheck.moments(one, "bandit/two-arm")
''')  # fmt: skip
case("couple what cannot be coupled", '''
pgcheck.from_coefficients(lambda batch: batch.mask, couples="row")
''')  # fmt: skip
case("a leaf that is none", '''
pgcheck.from_loss(lambda batch: batch.logp.sum(), leaf="log_probs")
''')  # fmt: skip
