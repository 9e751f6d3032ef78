"""`Problem`: an environment, the policies and how batches are drawn.

A batch is `groups` independent draws of a start (start state, prompt) and for each `group_size` independent rollouts
from it, by the behaviour policy: B = groups · group_size rows. B i.i.d. rollouts are `groups=B, group_size=1`.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.envs.language import LMTask
from pgcheck.envs.tabular import MAX_PATHS, TabularMDP
from pgcheck.errors import ProblemError
from pgcheck.generation import Mismatch, mismatch
from pgcheck.policies.given import over_contexts, table_like, writers
from pgcheck.policies.tabular import SoftmaxTable, as_policy, check_logits, in_parameters, logit_gram, logit_jacobian
from pgcheck.sampling import Sampler, Stream, as_device
from pgcheck.trajectories import Paths, SideTable, Trajectories, is_count
from pgcheck.worlds.base import Policies, TruthMethod, World, as_bytes
from pgcheck.worlds.listed import Listed
from pgcheck.worlds.long import Long
from pgcheck.worlds.tree import Tree
from pgcheck.worlds.written import ByModels

_PROBED = 512  # rollouts that an estimator is tried on where they cannot be listed


@dataclass(frozen=True, eq=False)
class Problem:
    """An environment, a policy and a sampling plan.

    Args:
        env: a `TabularMDP`, `Paths` (the table of rollouts itself), or an `LMTask`, which becomes its paths if
            they are few.
        policy: logits `[K, A]`, a module over one-hot contexts, or a policy of `pgcheck.policies`. With a task, a module is
            a language model: one of transformers, or any from tokens `[n, L]` to logits `[n, L, V]`.
        behavior_logits: `[K, A]` of the policy that draws the batches; -inf breaks its support. Or a function of the policy's
            logits, such as `Decoding(top_p=.9)`. Default: the policy. With a task, a language model will do.
        ref_logits: `[K, A]` of the reference policy of KL terms. Default: the policy. With a task, a language model will do.
        kl_coefficient: β, and
        entropy_coefficient: α of the objective E Σ_t γ^t (r_t − β log π/π_ref − α log π), sums over policy positions: J less
            β times the KL to the reference plus α times the entropy, those of whole rollouts where γ = 1. Where γ < 1 both
            are discounted like a reward, by the problem's clock.
        groups: number of independent start draws in a batch.
        group_size: rollouts from each, one number or one for each group.
        contexts: `[S]`, the context of each state, where several states share one. Default: the state itself.
        name: `family/setting`.
        about: one sentence, for reports.

    Raises:
        ProblemError: naming the field, the value and the mend.
    """

    env: TabularMDP | Paths | LMTask
    policy: Any
    _: KW_ONLY
    behavior_logits: Any = None
    ref_logits: Any = None
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    groups: int = 1
    group_size: int | Sequence[int] = 4
    contexts: Sequence[int] | None = None
    name: str = "custom/problem"
    about: str = ""

    def __post_init__(self) -> None:
        env: Any = self.env
        if not isinstance(env, (TabularMDP, Paths, LMTask)):
            raise ProblemError(f"env: {type(env).__name__}; expected a TabularMDP, an LMTask or Paths.")
        self._check_sampling()
        if self.contexts is not None and not isinstance(env, TabularMDP):
            raise ProblemError("contexts: rollouts given as `Paths` carry their own contexts; leave it out.")
        if isinstance(env, LMTask) and env.size == "generated":
            self._set("policy", "behavior_logits", "ref_logits", to=writers(env, *self._given))
        else:
            if isinstance(env, LMTask):
                if env.size == "table":
                    self._set("env", to=(env.paths(),))  # before any model is copied
                self._set("policy", "behavior_logits", "ref_logits", to=over_contexts(env, *self._given))
            self._read_tables()
        self._check_objective()

    def _set(self, *names: str, to: Sequence[Any]) -> None:
        for name, x in zip(names, to, strict=True):
            object.__setattr__(self, name, x)

    @property
    def _given(self) -> tuple[Any, Any, Any]:
        return self.policy, self.behavior_logits, self.ref_logits

    def _read_tables(self) -> None:
        """The policy over contexts, and the logits of the others."""
        number = self._count_contexts()
        self._set("policy", to=(as_policy(self.policy, number),))
        logits = self.logits
        check_logits(logits)
        if isinstance(self.env, TabularMDP) and tuple(logits.shape) != (number, self.env.actions):
            raise ProblemError(
                f"policy_logits: shape {list(logits.shape)}, expected [{number}, {self.env.actions}] (contexts, actions)."
            )
        for name in ("behavior_logits", "ref_logits"):
            self._set(name, to=(table_like(name, getattr(self, name), logits),))

    def _count_contexts(self) -> int:
        """K."""
        if isinstance(self.env, LMTask):
            return len(self.env.contexts)
        if isinstance(self.env, TabularMDP):
            given = self._contexts
            contexts = list(given) if isinstance(given, Iterable) else []
            right = all(isinstance(k, int) and k >= 0 for k in contexts) and len(contexts) == self.env.states
            if not right:
                raise ProblemError(
                    f"contexts: {self.contexts!r}; expected one context ≥ 0 for each of {self.env.states} states."
                )
            return max(contexts) + 1
        return int(self.env.context.max()) + 1

    @property
    def _contexts(self) -> Sequence[int]:
        """Of each state of an MDP, `[S]`."""
        assert isinstance(self.env, TabularMDP)
        return range(self.env.states) if self.contexts is None else self.contexts

    def _check_objective(self) -> None:
        for name in ("kl_coefficient", "entropy_coefficient"):
            given: Any = getattr(self, name)
            if not isinstance(given, (int, float)) or isinstance(given, bool) or not math.isfinite(given):
                raise ProblemError(f"{name}: {given!r}; it must be a finite number.")
            object.__setattr__(self, name, float(given))
        if self.kl_coefficient and self.ref_logits is None:
            raise ProblemError(
                f"kl_coefficient: {self.kl_coefficient}, without a reference; give `ref_logits` as well."
            )

    def _check_sampling(self) -> None:
        if not is_count(self.groups):
            raise ProblemError(f"groups: {self.groups!r}; it must be an integer of at least 1.")
        given: Any = self.group_size
        sizes = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * self.groups
        if len(sizes) != self.groups or not all(is_count(g) for g in sizes):
            raise ProblemError(
                f"group_size: {given!r}; expected a positive integer or {self.groups} of them, one a group."
            )
        object.__setattr__(self, "groups", int(self.groups))
        object.__setattr__(self, "group_size", int(given) if is_count(given) else tuple(map(int, sizes)))

    @classmethod
    def from_trajectories(cls, paths: Paths, policy: Any, **settings: Any) -> Problem:
        """A problem given as its table of rollouts; `settings` as in the constructor."""
        return cls(paths, policy, **settings)

    # -- the sampling plan

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each group."""
        return (self.group_size,) * self.groups if isinstance(self.group_size, int) else tuple(self.group_size)

    @property
    def rows(self) -> int:
        """B, the number of rows of a batch."""
        return sum(self.sizes)

    @cached_property
    def group_labels(self) -> Tensor:
        """The group of each row, `[B]`."""
        return torch.repeat_interleave(torch.arange(self.groups), torch.tensor(self.sizes))

    def with_sampling(self, *, groups: int, group_size: int | Sequence[int]) -> Problem:
        """The same problem with batches of another shape."""
        return replace(self, groups=groups, group_size=group_size)

    # -- the policies and the world

    @property
    def logits(self) -> Tensor:
        """Target policy logits, `[K, A]`.

        Raises:
            BudgetError: a task whose prefixes are too many to be listed.
        """
        if self.written:
            _ = self.world.gradient("enumeration")  # which refuses
        return self._logits.clone()

    @cached_property
    def _logits(self) -> Tensor:
        with torch.no_grad():
            return self.policy().detach().to(torch.float64)

    @cached_property
    def world(self) -> World:
        """The environment under the policies, by how much of it can be listed (`pgcheck.worlds`)."""
        env, prices = self.env, {x: getattr(self, x) for x in ("kl_coefficient", "entropy_coefficient")}
        if self.written:
            assert isinstance(env, LMTask)
            return ByModels(env, *self._given, **prices)
        z, behavior, ref = self.logits, self.behavior_logits, self.ref_logits
        policies = Policies(z, z if behavior is None else behavior, z if ref is None else ref, **prices)
        if isinstance(env, LMTask):
            return Tree(env, policies)
        if isinstance(env, Paths):
            return Listed(env, policies)
        return (Listed if env.count_paths() <= MAX_PATHS else Long).of(env, self._contexts, policies)

    @property
    def written(self) -> bool:
        """Completions are written by the model, as not even their prefixes can be listed."""
        return isinstance(self.env, LMTask) and self.env.size == "generated"

    @property
    def enumerable(self) -> bool:
        """The rollouts can be listed; if not, everything but a table of them is there, by dynamic programming and drawing."""
        return self.world.enumerable

    @property
    def trajectories(self) -> Trajectories:
        """Every rollout with its probabilities, log-probabilities and values.

        Raises:
            BudgetError: they are too many.
        """
        return self.world.table()

    def trajectories_with(self, needs: Sequence[SideTable]) -> Trajectories:
        """The table with the side columns (and auxiliary draws) an estimator declared."""
        return self.world.table(needs)

    # -- drawing batches

    def sampler(self, *, seed: int = 0, needs: Sequence[SideTable] = (), device: str = "cpu") -> Sampler:
        """Numbered draws of whole batches by the behaviour policy; estimators with other `needs` see the same rollouts.

        `device`: where the rollouts are, as torch names it, or "auto"; they are the same ones but for rounding in a law.

        Raises:
            BudgetError: `needs` of a problem that has no table of rollouts.
        """
        device, stream = as_device(device), Stream(seed, (self.digest, "rollouts"))
        return self.world.sampler(self.group_labels.to(device), stream, needs=needs, problem=self.name, device=device)

    def can_draw(self, needs: Sequence[SideTable]) -> bool:
        """Whether what an estimator `needs` can be had: always, where rollouts can be listed."""
        return self.world.can_draw(needs)

    def probe_table(self, needs: Sequence[SideTable] = ()) -> Trajectories:
        """A table of rollouts to try an estimator on: all of them, or where they are too many some, all alike likely."""
        if self.enumerable:
            return self.trajectories_with(needs)
        if (key := tuple(needs)) not in self._probes:
            drawn, _ = self.sampler(needs=needs).draw(0, -(-_PROBED // self.rows))
            one = torch.ones_like(drawn.probability)
            self._probes[key] = replace(drawn, probability=one, behavior_probability=one)
        return self._probes[key]

    @cached_property
    def _probes(self) -> dict[tuple[SideTable, ...], Trajectories]:
        return {}

    def sample(self, batches: int, *, seed: int = 0, first: int = 0, device: str = "cpu") -> Batch:
        """Draws number first … first + batches − 1 as one `Batch` `[batches, B, T]`; the same for the same seed and device.

        Raises:
            ProblemError: `batches` is no count.
            UsageError: there is no such device.
        """
        if not is_count(batches):
            raise ProblemError(f"batches: {batches!r}; it must be an integer of at least 1.")
        sampler = self.sampler(seed=seed, device=device)
        table, index = sampler.draw(first, batches)
        return table.batch(index, sampler.labels)

    def mismatch(self, batches: int, *, seed: int = 0) -> Mismatch:
        """Between the log-probabilities of the policy and those recorded when the rows of so many draws were made."""
        table, index = self.sampler(seed=seed).draw(0, batches)
        return mismatch(table, index)

    # -- facts that conditions of claims and plans of work refer to

    @property
    def steps(self) -> int:
        """T, the number of positions of a row."""
        return self.world.steps

    @property
    def actions(self) -> int:
        """A, what the policy chooses from."""
        return len(self.env.actions or ()) if isinstance(self.env, LMTask) else int(self.logits.shape[1])

    @property
    def rollouts(self) -> int:
        """N, the number of distinct rollouts; of those that are too many to be listed, before merging."""
        return self.world.rollouts

    @cached_property
    def reward_size(self) -> float:
        """The largest Σ_t |r_t| of a rollout; of a task that is written, of a few."""
        known = self.world.reward_size
        return float(self.probe_table().paths.reward.abs().sum(-1).max()) if known is None else known

    @cached_property
    def most_decisions(self) -> int:
        """The most policy positions of a rollout."""
        return self.world.most_decisions

    @cached_property
    def on_policy(self) -> bool:
        """The behaviour policy is the target policy."""
        return self.world.on_policy

    @cached_property
    def full_support(self) -> bool:
        """Every rollout the target policy can produce, the behaviour policy can produce."""
        return self.world.full_support

    @property
    def discount(self) -> float:
        """γ."""
        return self.world.discount

    @property
    def plain_objective(self) -> bool:
        """The objective is the return alone, without a KL or entropy term."""
        return self.kl_coefficient == 0 and self.entropy_coefficient == 0

    @cached_property
    def fixed_length(self) -> bool:
        """Every rollout has the same number of policy positions."""
        return self.world.fixed_length

    @property
    def one_start(self) -> bool:
        """Every rollout begins in the same start state, or from the same prompt."""
        return self.world.one_start

    @cached_property
    def binary_return(self) -> bool:
        """Every rollout returns 0 or 1, to rounding; of rollouts that cannot be listed the task must say so (`returns`), and
        of a long process they must be few enough to tell."""
        return self.world.binary_return

    # -- truth

    def value(self, method: TruthMethod | None = None) -> float:
        """J(π) with the terms of the objective, in units of reward; by enumeration, where that is possible."""
        if method is None:
            method = "enumeration" if self.enumerable else "dynamic_programming"
        return float(self.world.value(_known(method))(self.logits))

    def gradient(self, method: TruthMethod | None = None) -> Tensor:
        """∇J in logit space, `[K, A]`. Without `method`: two derivations that were found to agree."""
        return self._gradient if method is None else self.world.gradient(_known(method))

    @cached_property
    def _gradient(self) -> Tensor:
        return self.world.agreed_gradient(self.name)

    def gradient_by_step(self) -> Tensor:
        """E[γ^t Ĝ_t ∇log π(a_t | k_t)] of each position, `[T, K, A]`; their sum is ∇J."""
        return self._gradient_by_step

    @cached_property
    def _gradient_by_step(self) -> Tensor:
        return self.world.gradient_by_step()

    def logit_jacobian(self) -> Tensor:
        """dz/dθ, `[K·A, P]`."""
        return logit_jacobian(self.policy)

    def logit_gram(self) -> Tensor:
        """(dz/dθ)(dz/dθ)ᵀ, `[K·A, K·A]`."""
        return self._logit_gram

    @cached_property
    def _logit_gram(self) -> Tensor:
        return logit_gram(self.policy)

    def parameter_gradient(self) -> Tensor:
        """∇_θ J = (dz/dθ)ᵀ ∇_z J, `[P]`, in the order of `policy.parameters()`."""
        return self.in_parameters(self.gradient())

    def in_parameters(self, x: Tensor) -> Tensor:
        """(dz/dθ)ᵀ x, `[P]`, of `x` `[K, A]` in logit space; one backward pass."""
        return in_parameters(self.policy, x)

    # -- identity

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that decides an expectation; changes when the problem does."""
        given = [] if self.written else [self.logits, self.behavior_logits, self.ref_logits]
        tables = [b"none" if x is None else b"".join(as_bytes(self.pinned(x))) for x in given]
        h = hashlib.sha256()
        for part in self.world.identity(tables, self.sizes):
            h.update(part)
        return h.hexdigest()[:16]

    def pinned(self, logits: Tensor) -> Tensor:
        """Logits as the identity of the problem has them: those that a module computes, whose last bits differ from
        machine to machine, to nine decimals; to five where they are so many that one may lie between two."""
        decimals = 9 if logits.numel() <= 4096 else 5
        return logits if isinstance(self.policy, SoftmaxTable) else logits.round(decimals=decimals) + 0.0

    def at(self, draw: int) -> Problem:
        """The same problem at another θ: every parameter moved by a seeded normal draw of standard deviation 1/2.

        A bias that vanishes at one θ by luck does not vanish at the next. The behaviour and reference policies stay.
        """
        if not (draw == 0 or is_count(draw)):
            raise ProblemError(f"draw: {draw!r}; it must be an integer of at least 0.")
        if draw == 0:
            return self
        policy = copy.deepcopy(self.policy)
        generator = torch.Generator().manual_seed(draw)
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        return replace(self, policy=policy, name=f"{self.name}@{draw}")


def _known(method: str) -> TruthMethod:
    for name in get_args(TruthMethod):
        if method == name:
            return name
    raise ProblemError(f"method: {method!r} is not one of {', '.join(get_args(TruthMethod))}.")
