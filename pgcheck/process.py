"""Tabular MDPs whose rollouts are too many to be listed: values, ∇J and facts by dynamic programming, rollouts by drawing.

Everything is a recursion over (position t, state s, whether the policy has acted yet); the last matters for γ's clock alone.
The value is that of the enumerated table (`pgcheck.trajectories`): V_t(s) where the policy acts, and while it does not, the
mean over the states that what it has seen allows.

    ∇J[k, a] = Σ_t Σ_{s of k} d_t(s) π(a|k) (Q_t(s, a) − V_t(s)),    d_t(s) = E γ^t 1[s_t = s]

(Sutton et al. 2000, theorem 1, with a finite horizon), which shares no code with the gradient by autograd.

Guarantee: nothing grows with the number of rollouts; draw i is the same in blocks of any size (`pgcheck.sampling`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial

import torch
from torch import Tensor

from pgcheck.envs.tabular import TabularMDP
from pgcheck.sampling import Laws, Stream
from pgcheck.trajectories import Paths, Trajectories

_MOST_RETURNS = 20_000  # (state, returns so far) that are followed to find what a rollout can return


def _at(x: Tensor, index: Tensor) -> Tensor:
    """`x.flatten()[index]`, faster."""
    return x.flatten().index_select(0, index.flatten()).unflatten(0, index.shape)


@dataclass(frozen=True)
class Process:
    """An MDP and its policies, `logits` `[K, A]` of each; `contexts[s]` is the context of state s."""

    env: TabularMDP
    contexts: Sequence[int]
    logits: Tensor
    behavior_logits: Tensor
    ref_logits: Tensor

    @cached_property
    def acts(self) -> Tensor:
        """Whether the policy acts in a state, `[S]`."""
        idle = self.env.observation | self.env.terminal
        return torch.tensor([s not in idle for s in range(self.env.states)])

    @cached_property
    def over(self) -> Tensor:
        """Whether a state is terminal, `[S]`."""
        return torch.tensor([s in self.env.terminal for s in range(self.env.states)])

    @cached_property
    def context(self) -> Tensor:
        """`[S]`."""
        return torch.tensor(list(self.contexts))

    def law(self, logits: Tensor) -> Tensor:
        """P(a | s) `[S, A]`; where nobody acts all of it on the first."""
        pi = torch.softmax(logits, -1)[self.context]
        first = torch.eye(self.env.actions, dtype=pi.dtype)[0]
        return torch.where(self.acts.unsqueeze(-1), pi, first)

    @cached_property
    def _transition(self) -> Tensor:
        """P(s' | s, a) `[S, A, S]`, 0 from terminal states."""
        return torch.nan_to_num(self.env.transition) * ~self.over[:, None, None]

    @cached_property
    def _reward(self) -> Tensor:
        """E[r | s, a] `[S, A]`."""
        return (self._transition * torch.nan_to_num(self.env.full_reward)).sum(-1)

    def _gamma(self, after: Tensor) -> Tensor:
        """γ to the power that the clock goes on by, from each state, on entering each, `[S, S']`; `after` `[S]`: the policy has
        acted by the time the first is left."""
        γ = self.env.discount
        if self.env.discount_clock == "position":
            return torch.full((self.env.states,) * 2, γ, dtype=torch.float64)
        one = torch.ones((), dtype=torch.float64)
        return torch.where(after.unsqueeze(1) & self.acts, γ * one, one)

    def backward(self, cost: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """V `[T+1, 2, S]`, before and after the first action, and Q `[T, S, A]` where the policy acts; `cost` `[K, A]` is taken
        off the reward of an action."""
        T, S, A = self.env.horizon, self.env.states, self.env.actions
        pi, reward = self.law(self.logits), self._reward
        if cost is not None:
            reward = reward - cost[self.context] * self.acts.unsqueeze(-1)
        V = torch.zeros(T + 1, 2, S, dtype=torch.float64)
        Q = torch.zeros(T, S, A, dtype=torch.float64)
        for t in range(T - 1, -1, -1):
            for acted in (0, 1):
                after = self.acts | bool(acted)
                to_go = self._gamma(after) * torch.where(after.unsqueeze(1), V[t + 1, 1], V[t + 1, 0])
                q = reward + torch.einsum("sax,sx->sa", self._transition, to_go)
                V[t, acted] = (pi * q).sum(-1) * ~self.over
            Q[t] = q * self.acts.unsqueeze(-1)
        return V, Q

    @cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """V and Q of the reward alone."""
        return self.backward()

    def gradient_by_step(self, cost: Tensor | None = None) -> Tensor:
        """E[γ^t Ĝ_t ∇log π(a_t | k_t)] of each position, `[T, K, A]`, by forward visitation."""
        V, Q = self.backward(cost)
        pi, T = self.law(self.logits), self.env.horizon
        step = torch.einsum("sa,sax->sx", pi, self._transition)
        out = torch.zeros(T, *self.logits.shape, dtype=torch.float64)
        before, after = self.env.initial.clone(), torch.zeros_like(self.env.initial)
        for t in range(T):
            d = (before + after) * self.acts
            out[t].index_add_(0, self.context, d.unsqueeze(-1) * pi * (Q[t] - V[t, 1].unsqueeze(-1)))
            moved = {late: step * self._gamma(self.acts | late) for late in (False, True)}
            after = after @ moved[True] + (before * self.acts) @ moved[False]
            before = (before * ~self.acts) @ moved[False]
        return out

    # -- facts

    @cached_property
    def reached(self) -> Tensor:
        """States in which the policy may come to act, whatever it does, `[S]`."""
        here = self.env.initial > 0
        ever = here.clone()
        step = (self._transition > 0).any(1)
        for _ in range(self.env.horizon - 1):
            here = (step & (here & ~self.over).unsqueeze(1)).any(0)
            ever |= here
        return ever & self.acts

    @property
    def on_policy(self) -> bool:
        """The behavior policy is the target policy wherever they act."""
        k = self.context[self.reached].unique()
        a, b = torch.log_softmax(self.logits, -1)[k], torch.log_softmax(self.behavior_logits, -1)[k]
        return bool(torch.allclose(a, b, rtol=0, atol=1e-14))

    @property
    def full_support(self) -> bool:
        """What the target policy does, the behavior policy does."""
        k = self.context[self.reached].unique()
        return bool((torch.softmax(self.behavior_logits, -1)[k] > 0)[torch.softmax(self.logits, -1)[k] > 0].all())

    @cached_property
    def decisions(self) -> tuple[int, int]:
        """Fewest and most actions of a rollout."""
        can = (self._transition > 0).any(1)
        least = most = torch.zeros(self.env.states)
        for _ in range(self.env.horizon):
            least = self.acts + torch.where(can, least, torch.inf).amin(-1).nan_to_num(posinf=0)
            most = self.acts + torch.where(can, most, -torch.inf).amax(-1).nan_to_num(neginf=0)
        at = self.env.initial > 0
        return int(least[at].min()), int(most[at].max())

    @cached_property
    def reward_size(self) -> float:
        """The largest Σ_t |r_t| of a rollout."""
        size = torch.zeros(self.env.states, dtype=torch.float64)
        for _ in range(self.env.horizon):
            size = torch.where(self._transition > 0, self.env.full_reward.abs() + size, 0.0).amax((-1, -2))
        return float(size[self.env.initial > 0].max())

    @cached_property
    def returns(self) -> frozenset[float] | None:
        """Every return a rollout may have, to 1e-9; None if they are too many to tell."""
        env, found = self.env, set()
        moves = [[] if s in env.terminal else env.moves(s) for s in range(env.states)]
        here = {(s, 0, 0.0) for s in env.starts}  # state, γ's clock if counted by actions, return so far
        for t in range(env.horizon):
            new = set()
            for s, acted, R in here:
                n = acted + bool(self.acts[s])
                weight = env.discount ** (t if env.discount_clock == "position" else max(n - 1, 0))
                clock = n if env.discount_clock == "action" else 0
                for _, s2, _, r in moves[s]:
                    new.add((s2, clock, round(R + weight * r, 9)))
            found |= {R for s, _, R in new if s in env.terminal}
            here = {x for x in new if x[0] not in env.terminal}
            if len(here) + len(found) > _MOST_RETURNS:
                return None
        return frozenset(found | {R for *_, R in here})


@dataclass(frozen=True)
class ProcessSampler:
    """Batches from the process itself: a start for each group, then position after position, all rows at once.

    A table is the rows of the draws, each its own; probabilities of whole rollouts are not known (NaN).
    """

    process: Process
    labels: Tensor  # [B]
    stream: Stream
    provide: tuple[Callable[[Trajectories, Process], Trajectories], ...] = ()  # of side columns
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    device: str = "cpu"

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        """What is looked up of a (state, action), `[(S + 1) · A]`, where state number S is that of a rollout that is over."""
        p, env = self.process, self.process.env
        S, A, K = env.states, env.actions, len(p.logits)
        acts = torch.cat([p.acts, torch.tensor([False])]).repeat_interleave(A)
        state, action = torch.arange(S + 1).repeat_interleave(A), torch.arange(A).repeat(S + 1)
        context = torch.cat([p.context, torch.zeros(1, dtype=torch.int64)]).repeat_interleave(A)
        cell = (context * A + action).clamp(max=K * A - 1)
        logp, behavior_logp, ref_logp = (
            torch.where(acts, torch.log_softmax(z, -1).flatten()[cell], 0.0)
            for z in (p.logits, p.behavior_logits, p.ref_logits)
        )
        V = torch.nn.functional.pad(p.values[0], (0, 1))  # [T+1, 2, S+1]
        law = torch.nn.functional.pad(p.law(p.behavior_logits), (0, 0, 0, 1))
        law[S, 0] = 1.0
        move = torch.nn.functional.pad(p._transition, (0, 1, 0, 0, 0, 1))  # [S+1, A, S+1]
        move[S, :, S] = 1.0
        here = {
            "V": V, "initial": p.env.initial, "starts": torch.tensor(env.starts), "logits": p.logits,
            "state": torch.where(acts, state, -1), "action": torch.where(acts, action, -1),
            "context": torch.where(acts, context, -1), "acts": acts, "mask": acts.to(torch.float64),
            "logp": logp, "behavior_logp": behavior_logp, "ref_logp": ref_logp, "cell": torch.where(acts, cell, 0),
            "reward": torch.nn.functional.pad(torch.nan_to_num(env.full_reward), (0, 1, 0, 0, 0, 1)).flatten(),
            "law": law, "move": move.flatten(0, 1),
            "next": torch.cat([torch.where(p.over, S, torch.arange(S)), torch.tensor([S])]),
            "spoken": p._transition, "idle": ~(p.acts | p.over),
        }  # fmt: skip
        if torch.equal(V[:, 0], V[:, 1]):  # no matter whether the policy has acted
            here["value"] = V[: env.horizon, 0].repeat_interleave(A, -1).flatten()
        return {name: x.to(self.device) for name, x in here.items()}

    @cached_property
    def _laws(self) -> tuple[Laws, Laws, Laws]:
        """Of the start among the starts, of the action in each state, of the next state after each (state, action)."""
        x = self._tables
        return Laws.of(x["initial"][x["starts"]].unsqueeze(0)), Laws.of(x["law"]), Laws.of(x["move"])

    @cached_property
    def _certain(self) -> tuple[Tensor, Tensor] | None:
        """The state after each (state, action) and what it pays, where nothing of it is left to chance."""
        x, to = self._tables, self._laws[2].certain
        return (
            None if to is None else (x["next"][to], x["reward"].view(len(to), -1).gather(1, to.unsqueeze(1)).squeeze(1))
        )

    def draw(self, first: int, count: int) -> tuple[Trajectories, Tensor]:
        """As `Sampler.draw`: a table of count · B rows, each drawn once. Of a draw's numbers those of the starts come first,
        then the actions of each position, then what follows on them, if that is not certain."""
        x, env, labels = self._tables, self.process.env, self.labels.to(self.device)
        B, T, groups, certain = len(labels), env.horizon, int(labels[-1]) + 1, self._certain
        n = self.stream.numbers(first, count, groups + (2 if certain is None else 1) * B * T).to(self.device)
        of_start, of_action, of_state = self._laws
        start = of_start.draw(labels.new_zeros(1, 1), n[:, :groups])[:, labels]
        n = n[:, groups:].unflatten(1, (-1, B))
        s, pairs, entered = x["starts"][start], [], []
        for t in range(T):
            pair = s * env.actions + of_action.draw(s, n[:, t])
            pairs.append(pair)
            if certain is not None:
                s = _at(certain[0], pair)
                continue
            to = of_state.draw(pair, n[:, T + t])
            entered.append(to)
            s = _at(x["next"], to)
        pair = torch.stack(pairs, -1).flatten(0, 1)  # [N, T]
        if certain is not None:
            reward = _at(certain[1], pair)
        else:
            reward = _at(x["reward"], pair * (env.states + 1) + torch.stack(entered, -1).flatten(0, 1))
        table = self._table(start.flatten(), pair, reward)
        for provide in self.provide:
            table = provide(table, self.process)
        return table, torch.arange(count * B, device=self.device).unflatten(0, (count, B))

    def _values(self, pair: Tensor) -> Tensor:
        """The same and 0 after the end, `[N, T+1]`."""
        value = torch.zeros(len(pair), pair.shape[1] + 1, dtype=torch.float64, device=self.device)
        value[:, :-1] = self._seen_values(pair)
        return value

    def _seen_values(self, pair: Tensor) -> Tensor:
        """V at every position `[N, T]`; while the environment speaks, its state is not seen."""
        x, env, T = self._tables, self.process.env, pair.shape[1]
        steps = torch.arange(T, device=pair.device)
        if not env.observation and "value" in x:
            return _at(x["value"], pair + steps * len(x["acts"]))
        s, here = pair // env.actions, _at(x["acts"], pair)
        acted = here.cumsum(-1) > here.long()  # before
        V = _at(x["V"], (steps * 2 + acted) * (env.states + 1) + s)
        if not env.observation:
            return V
        belief = torch.nn.functional.one_hot(s[:, 0], env.states).to(torch.float64)
        means = []
        for t in range(T):
            means.append((belief * x["V"][t, acted[:, t].long(), :-1]).sum(-1))
            moved = x["move"][pair[:, t], :-1]
            spoken = torch.where(here[:, t].unsqueeze(-1), moved, belief @ x["spoken"][:, 0])
            belief = spoken * x["idle"]
            belief = belief / belief.sum(-1, keepdim=True).clamp(min=1e-300)
        return torch.where(here | (s == env.states), V, torch.stack(means, -1))

    def _table(self, start: Tensor, pair: Tensor, reward: Tensor) -> Trajectories:
        """Whatever an estimator does not read is not looked up."""
        x, env = self._tables, self.process.env
        unknown = torch.full_like(start, torch.nan, dtype=torch.float64)

        def at(name: str) -> Callable[[], Tensor]:
            return cache(partial(_at, x[name], pair))

        def end() -> Tensor:
            return (pair < env.states * env.actions).sum(-1)

        paths = Paths.known(
            {name: at(name) for name in ("state", "context", "action", "mask")} | {"end": end}, start=start, reward=reward,
            env_probability=unknown, start_probability=x["initial"][x["starts"]], discount=env.discount,
            discount_clock=env.discount_clock,
        )  # fmt: skip
        columns = {name: at(name) for name in {*self._logps.values(), "cell"}}
        columns |= {name: columns[same] for name, same in self._logps.items()}
        return Trajectories.known(
            columns | {"value": cache(partial(self._values, pair))}, paths=paths, logits=x["logits"], probability=unknown,
            behavior_probability=unknown, kl_coefficient=self.kl_coefficient, entropy_coefficient=self.entropy_coefficient,
            side={},
        )  # fmt: skip

    @cached_property
    def _logps(self) -> dict[str, str]:
        """Log-probabilities, and the first among them that are the same."""
        names, x = ("logp", "behavior_logp", "ref_logp"), self._tables
        return {name: next(n for n in names if torch.equal(x[n], x[name])) for name in names}
