"""`Problem`: an environment, the policies and how batches are drawn; and the registry of named ones.

A batch is `groups` independent draws of a start (start state, prompt) and for each `group_size` independent rollouts
from it, by the behaviour policy: B = groups · group_size rows. B i.i.d. rollouts are `groups=B, group_size=1`.
"""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pgcheck import truth
from pgcheck.batch import Batch
from pgcheck.envs.language import LMTask, PrefixTree
from pgcheck.envs.tabular import MAX_PATHS, TabularMDP
from pgcheck.errors import BudgetError, PgcheckError, ProblemError, UnknownNameError, in_words
from pgcheck.generation import Mismatch, WritingSampler, mismatch
from pgcheck.policies.decoding import Decoding
from pgcheck.policies.huggingface import HFPolicy, TokensToLogits, is_hugging_face
from pgcheck.policies.tabular import (
    ModulePolicy,
    SoftmaxTable,
    as_policy,
    check_logits,
    in_parameters,
    logit_gram,
    logit_jacobian,
)
from pgcheck.policies.transformer import LanguageModel, LMPolicy
from pgcheck.process import Process, ProcessSampler
from pgcheck.sampling import Sampler, Stream, TableSampler, TreeSampler, as_device
from pgcheck.trajectories import Paths, SideTable, Trajectories, as_table, is_count

_PROBED = 512  # rollouts that an estimator is tried on where they cannot be listed
TruthMethod = Literal["dynamic_programming", "enumeration", "central_differences"]


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
        if isinstance(self.env, LMTask) and self.env.size == "generated":
            self._check_sampling()
            self._hand_over(self.env)
            self._check_objective()
            return
        if isinstance(self.env, LMTask):
            self._read(self.env)
        if not isinstance(self.env, (TabularMDP, Paths, LMTask)):
            raise ProblemError(f"env: {type(self.env).__name__}; expected a TabularMDP, an LMTask or Paths.")
        self._check_sampling()
        if isinstance(self.env, TabularMDP):
            given = range(self.env.states) if self.contexts is None else self.contexts
            contexts = list(given) if isinstance(given, Iterable) else []
            right = all(isinstance(k, int) and k >= 0 for k in contexts) and len(contexts) == self.env.states
            if not right:
                raise ProblemError(
                    f"contexts: {self.contexts!r}; expected one context ≥ 0 for each of {self.env.states} states."
                )
            number = max(contexts) + 1
        elif self.contexts is not None:
            raise ProblemError("contexts: rollouts given as `Paths` carry their own contexts; leave it out.")
        elif isinstance(self.env, LMTask):
            number = len(self.env.contexts)
        else:
            number = int(self.env.context.max()) + 1
        object.__setattr__(self, "policy", as_policy(self.policy, number))
        logits = self.logits
        check_logits(logits)
        if isinstance(self.env, TabularMDP) and tuple(logits.shape) != (number, self.env.actions):
            raise ProblemError(
                f"policy_logits: shape {list(logits.shape)}, expected [{number}, {self.env.actions}] (contexts, actions)."
            )
        for name in ("behavior_logits", "ref_logits"):
            given = getattr(self, name)
            if callable(given):
                given = self._sampled(name, given)
            table = logits if given is None else as_table(name, given)
            if table.shape != logits.shape:
                raise ProblemError(f"{name}: shape {list(table.shape)}, expected {list(logits.shape)} as the policy's.")
            dead = torch.isinf(table).all(-1) | (table == math.inf).any(-1) | torch.isnan(table).any(-1)
            if bool(dead.any()) or (name == "ref_logits" and not bool(torch.isfinite(table).all())):
                allowed = "finite" if name == "ref_logits" else "finite or -inf, and one in each row finite"
                raise ProblemError(f"{name}: every logit must be {allowed}.")
            object.__setattr__(self, name, None if given is None else table)
        self._check_objective()

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

    def _sampled(self, name: str, sampler: Callable[[Tensor], Any]) -> Any:
        try:
            return sampler(self.logits)
        except PgcheckError:
            raise
        except Exception as error:
            raise ProblemError(f"{name}: called with the policy's logits, it raises {in_words(error)}.") from error

    def _read(self, task: LMTask) -> None:
        """The task as its paths, if they are few, and language models as policies over its contexts."""
        if task.size == "table":
            object.__setattr__(self, "env", task.paths())  # before any model is copied

        def read(model: nn.Module, asked: torch.dtype | None = None) -> nn.Module:
            dtype = torch.float64 if asked is None else asked
            if isinstance(model, LMPolicy) and asked not in (None, model.dtype):
                model = model.model
            if isinstance(model, (SoftmaxTable, ModulePolicy, LMPolicy)):
                return model
            if is_hugging_face(model):
                return HFPolicy(model, task, dtype=dtype)
            return LMPolicy(model, task.contexts, vocab_size=task.vocab_size, actions=task.actions, dtype=dtype)

        model = self.policy  # as it was given: a Decoding may want it in another precision
        for name in ("policy", "behavior_logits", "ref_logits"):
            given: Any = getattr(self, name)
            with torch.no_grad():
                if isinstance(given, Decoding) and name == "behavior_logits":
                    source = model if given.model is None else given.model
                    z = (
                        read(source, given.dtype)()
                        if isinstance(source, nn.Module)
                        else as_table("policy_logits", source)
                    )
                    object.__setattr__(self, name, given(z))
                elif isinstance(given, nn.Module):
                    found = read(given)
                    object.__setattr__(self, name, found if name == "policy" else found().detach())

    def _hand_over(self, task: LMTask) -> None:
        """Models, where nothing of the task can be listed."""
        if len(task.actions or ()) < task.vocab_size:
            raise ProblemError(
                f"actions: {len(task.actions or ())} of {task.vocab_size:,} tokens, and too many completions to be listed; only"
                " the whole vocabulary is written by a model. Leave actions out, shorten max_new_tokens, or raise max_prefixes."
            )

        def taken(name: str, given: Any) -> LanguageModel:
            if isinstance(given, LanguageModel):
                return copy.deepcopy(given)
            if is_hugging_face(given):
                given = TokensToLogits(given)
            if not isinstance(given, nn.Module):
                raise ProblemError(
                    f"{name}: {type(given).__name__}; the prefixes of this task are too many for a table of logits, so it must"
                    " be a language model, tokens [n, L] -> logits [n, L, V]."
                )
            return LanguageModel(given, task.probes(), vocab_size=task.vocab_size)

        object.__setattr__(self, "policy", taken("policy", self.policy))
        if (behavior := self.behavior_logits) is not None:
            how = behavior if isinstance(behavior, Decoding) else Decoding(behavior)
            model = taken("behavior_logits", how.by(self.policy).model)
            if how.dtype != torch.float64:
                LanguageModel(model.model, task.probes(), vocab_size=task.vocab_size, dtype=how.dtype)  # it runs
            object.__setattr__(self, "behavior_logits", replace(how, model=model))
        if self.ref_logits is not None:
            object.__setattr__(self, "ref_logits", taken("ref_logits", self.ref_logits))

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

    # -- the policies and the table

    @property
    def written(self) -> bool:
        """Completions are written by the model, as not even their prefixes can be listed."""
        return isinstance(self.env, LMTask) and self.env.size == "generated"

    @property
    def tree(self) -> PrefixTree | None:
        """The tree of prefixes of a task whose completions do not fit a table.

        Raises:
            BudgetError: nor do its prefixes.
        """
        return self.env.tree if isinstance(self.env, LMTask) else None

    @property
    def logits(self) -> Tensor:
        """Target policy logits, `[K, A]`.

        Raises:
            BudgetError: a task whose prefixes are too many to be listed.
        """
        if isinstance(self.env, LMTask):
            _ = self.env.prefixes  # or there are none
        return self._logits.clone()

    @cached_property
    def _logits(self) -> Tensor:
        with torch.no_grad():
            return self.policy().detach().to(torch.float64)

    @cached_property
    def enumerable(self) -> bool:
        """The rollouts can be listed; if not, everything but a table of them is there, by dynamic programming and drawing."""
        if isinstance(self.env, TabularMDP):
            return self.env.count_paths() <= MAX_PATHS
        return isinstance(self.env, Paths)

    @property
    def _long(self) -> bool:
        """A process whose rollouts are too many to be listed."""
        return isinstance(self.env, TabularMDP) and not self.enumerable

    @cached_property
    def process(self) -> Process:
        """The environment with the policies, for problems that are not `enumerable`.

        Raises:
            ProblemError: this is a table of rollouts.
        """
        if not isinstance(self.env, TabularMDP):
            raise ProblemError("env: a table of rollouts has no process behind it; this needs a TabularMDP.")
        contexts = range(self.env.states) if self.contexts is None else self.contexts
        return Process(self.env, list(contexts), *self._three_logits())

    def _three_logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the target, the behaviour and the reference policy."""
        z, behavior, ref = self.logits, self.behavior_logits, self.ref_logits
        return z, z if behavior is None else behavior, z if ref is None else ref

    @cached_property
    def _paths(self) -> Paths:
        if not isinstance(self.env, TabularMDP):
            return self.env if isinstance(self.env, Paths) else self.env.paths()
        paths = self.env.paths()
        if self.contexts is None:
            return paths
        of_state = torch.tensor(list(self.contexts))
        context = torch.where(paths.state >= 0, of_state[paths.state.clamp(min=0)], paths.state)
        return replace(paths, context=context)

    @cached_property
    def trajectories(self) -> Trajectories:
        """Every rollout with its probabilities, log-probabilities and values.

        Raises:
            BudgetError: they are too many.
        """
        table = Trajectories.under(self._paths, *self._three_logits())
        return replace(table, kl_coefficient=self.kl_coefficient, entropy_coefficient=self.entropy_coefficient)

    def trajectories_with(self, needs: Sequence[SideTable]) -> Trajectories:
        """The table with the side columns (and auxiliary draws) an estimator declared."""
        key = tuple(needs)
        if key not in self._tables:
            table = self.trajectories
            for provide in key:
                table = provide(table)
            self._tables[key] = table
        return self._tables[key]

    @cached_property
    def _tables(self) -> dict[tuple[SideTable, ...], Trajectories]:
        return {}

    # -- drawing batches

    def sampler(self, *, seed: int = 0, needs: Sequence[SideTable] = (), device: str = "cpu") -> Sampler:
        """Numbered draws of whole batches by the behaviour policy; estimators with other `needs` see the same rollouts.

        `device`: where the rollouts are, as torch names it, or "auto"; they are the same ones but for rounding in a law.

        Raises:
            BudgetError: `needs` of a problem that has no table of rollouts.
        """
        device = as_device(device)
        stream, labels = Stream(seed, (self.digest, "rollouts")), self.group_labels.to(device)
        if self.enumerable:
            return TableSampler(self.trajectories_with(needs).to(device), labels, stream)
        penalty: dict[str, Any] = {
            "kl_coefficient": self.kl_coefficient,
            "entropy_coefficient": self.entropy_coefficient,
        }
        if isinstance(self.env, LMTask):
            if needs:
                raise BudgetError(
                    f"{self.name}: an estimator that needs more than its rows is given it from the table of all rollouts, and"
                    f" this task has too many; judge it on a smaller one."
                )
            if self.written:
                policy, behavior, ref = self._models_on(device)
                return WritingSampler(self.env, policy, behavior, ref, labels, stream, **penalty, device=device)
            tree, value = self.env.tree, truth.tree_values(self.env.tree, self.logits)[1].to(device)
            z, old, fixed = (x.to(device) for x in self._three_logits())
            return TreeSampler(tree.to(device), z, old, fixed, value, labels, stream, **penalty)
        provide = []
        for need in needs:
            if not hasattr(need, "drawn"):
                raise BudgetError(
                    f"{self.name}: `{type(need).__name__}` is computed from the table of all rollouts, and there are too many"
                    f" of them ({self.rollouts:.3g}); judge such an estimator on a smaller problem."
                )
            provide.append(need.drawn)
        return ProcessSampler(self.process, self.group_labels, stream, tuple(provide), **penalty, device=device)

    def _models_on(self, device: str) -> tuple[LanguageModel, Decoding, LanguageModel]:
        """The policy, the behaviour and the reference of a task that is written; copies, where they are to be moved."""

        def moved(model: Any) -> Any:
            here = next(model.parameters(), torch.zeros(())).device
            return model if here == torch.device(device) else copy.deepcopy(model).to(device)

        policy = moved(self.policy)
        how = self.behavior_logits
        behavior = Decoding(policy) if how is None else replace(how, model=moved(how.model))
        return policy, behavior, policy if self.ref_logits is None else moved(self.ref_logits)

    def can_draw(self, needs: Sequence[SideTable]) -> bool:
        """Whether what an estimator `needs` can be had: always, where rollouts can be listed."""
        return self.enumerable or (self._long and all(hasattr(need, "drawn") for need in needs)) or not needs

    def probe_table(self, needs: Sequence[SideTable] = ()) -> Trajectories:
        """A table of rollouts to try an estimator on: all of them, or where they are too many some, all alike likely."""
        if self.enumerable:
            return self.trajectories_with(needs)
        key = tuple(needs)
        if key not in self._tables:
            drawn, _ = self.sampler(needs=needs).draw(0, -(-_PROBED // self.rows))
            one = torch.ones_like(drawn.probability)
            self._tables[key] = replace(drawn, probability=one, behavior_probability=one)
        return self._tables[key]

    @property
    def steps(self) -> int:
        """T, the number of positions of a row."""
        if isinstance(self.env, TabularMDP):
            return self.env.horizon
        return self._paths.steps if self.enumerable else self.probe_table().paths.steps

    @property
    def actions(self) -> int:
        """A, what the policy chooses from."""
        if isinstance(self.env, LMTask):
            return len(self.env.actions or ())
        return int(self.logits.shape[1])

    @property
    def rollouts(self) -> int:
        """N, the number of distinct rollouts; of those that are too many to be listed, before merging."""
        if isinstance(self.env, LMTask):
            return self.env.completions
        if isinstance(self.env, TabularMDP) and not self.enumerable:
            return self.env.count_paths()
        return len(self.trajectories)

    @cached_property
    def reward_size(self) -> float:
        """The largest Σ_t |r_t| of a rollout; of a task that is written, of a few."""
        if self._long:
            return self.process.reward_size
        if self.written:
            return float(self.probe_table().paths.reward.abs().sum(-1).max())
        if self.tree is not None:
            return float(self.tree.reward.abs().max())
        return float(self._paths.reward.abs().sum(-1).max())

    @cached_property
    def most_decisions(self) -> int:
        """The most policy positions of a rollout."""
        if isinstance(self.env, LMTask):
            return self.env.max_new_tokens
        return self.process.decisions[1] if self._long else int(self._paths.mask.sum(-1).max())

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

    # -- facts that conditions of claims refer to

    @cached_property
    def on_policy(self) -> bool:
        """The behaviour policy is the target policy."""
        if self.written:
            how = self.behavior_logits
            return how is None or (how.plain and _same_weights(how.model, self.policy))
        if self.tree is not None:
            z, behavior, _ = (torch.log_softmax(x, -1) for x in self._three_logits())
            return bool(torch.allclose(z, behavior, rtol=0, atol=1e-14))
        if self._long:
            return self.process.on_policy
        t = self.trajectories
        return bool(torch.allclose(t.logp, t.behavior_logp, rtol=0, atol=1e-14))

    @cached_property
    def full_support(self) -> bool:
        """Every rollout the target policy can produce, the behaviour policy can produce."""
        if self.written:
            return self.behavior_logits is None or not self.behavior_logits.truncates
        if self.tree is not None:
            return bool(torch.isfinite(self._three_logits()[1]).all())
        if self._long:
            return self.process.full_support
        t = self.trajectories
        return bool((t.behavior_probability[t.probability > 0] > 0).all())

    @property
    def discount(self) -> float:
        """γ."""
        return 1.0 if isinstance(self.env, LMTask) else self.env.discount

    @property
    def plain_objective(self) -> bool:
        """The objective is the return alone, without a KL or entropy term."""
        return self.kl_coefficient == 0 and self.entropy_coefficient == 0

    @cached_property
    def fixed_length(self) -> bool:
        """Every rollout has the same number of policy positions."""
        if isinstance(self.env, LMTask):
            return self.env.eos is None or self.env.max_new_tokens == 1
        if self._long:
            least, most = self.process.decisions
            return least == most
        length = self._paths.mask.sum(-1)
        return bool((length == length[0]).all())

    @property
    def one_start(self) -> bool:
        """Every rollout begins in the same start state, or from the same prompt."""
        if isinstance(self.env, LMTask):
            return len(self.env.prompts) == 1
        if isinstance(self.env, TabularMDP):
            return len(self.env.starts) == 1
        return int((self._paths.start_probability > 0).sum()) == 1

    @cached_property
    def binary_return(self) -> bool:
        """Every rollout returns 0 or 1, to rounding; of rollouts that cannot be listed the task must say so (`returns`), and
        of a long process they must be few enough to tell."""
        if self.written:
            return {*(getattr(self.env, "returns", None) or (math.nan,))} <= {0.0, 1.0}
        if self._long:
            returns = self.process.returns
            return returns is not None and all(min(abs(R), abs(R - 1.0)) <= 1e-8 for R in returns)
        tree = self.tree
        R = truth.returns(self._paths) if tree is None else tree.reward[tree.child < 0]
        return bool((torch.minimum(R.abs(), (R - 1.0).abs()) <= 1e-12).all())

    # -- truth

    def value(self, method: TruthMethod | None = None) -> float:
        """J(π) with the terms of the objective, in units of reward; by enumeration, where that is possible."""
        if method is None:
            method = "enumeration" if self.enumerable else "dynamic_programming"
        if method not in get_args(TruthMethod):
            raise ProblemError(f"method: {method!r} is not one of {', '.join(get_args(TruthMethod))}.")
        return float(self._value_at(method)(self.logits))

    def _cost(self, logits: Tensor) -> Tensor | None:
        """What each action costs in J, `[K, A]`."""
        return truth.action_cost(
            logits, self.ref_logits, kl=self.kl_coefficient, entropy=self.entropy_coefficient
        )  # fmt: skip

    def _value_at(self, method: TruthMethod) -> Callable[[Tensor], Tensor]:
        env, tree = self.env, self.tree
        if tree is not None:
            if method == "dynamic_programming":
                return lambda z: truth.tree_values(tree, z, self._cost(z))[1][: tree.prompts].mean()
            return lambda z: truth.tree_value(tree, z, self._cost(z))
        if method == "dynamic_programming":
            if not isinstance(env, TabularMDP):
                raise ProblemError(
                    "method: dynamic programming needs an environment; this problem is a table of rollouts."
                )
            contexts = range(env.states) if self.contexts is None else self.contexts
            return lambda z: truth.value_by_dynamic_programming(env, z, list(contexts), self._cost(z))
        paths = self.trajectories.paths  # found to fit the policies, and to sum to one
        return lambda z: truth.value_by_enumeration(paths, z, self._cost(z))

    def gradient(self, method: TruthMethod | None = None) -> Tensor:
        """∇J in logit space, `[K, A]`. Without `method`: two derivations that were found to agree."""
        if method is None:
            return self._gradient
        if self.tree is not None and method == "enumeration":
            return truth.gradient_by_autograd(self._value_at(method), self.logits)
        if self.tree is not None and method == "dynamic_programming":
            return self.gradient_by_step().sum(0)
        if method == "enumeration":
            return truth.gradient_by_enumeration(self.trajectories, self._cost(self.logits))
        if method == "dynamic_programming":
            return truth.gradient_by_autograd(self._value_at(method), self.logits)
        if method == "central_differences":
            way: TruthMethod = "dynamic_programming" if isinstance(self.env, TabularMDP) else "enumeration"
            return truth.gradient_by_central_differences(self._value_at(way), self.logits)
        raise ProblemError(f"method: {method!r} is not one of {', '.join(get_args(TruthMethod))}.")

    @cached_property
    def _gradient(self) -> Tensor:
        if (tree := self.tree) is not None:
            cost = self._cost(self.logits)
            size = float(tree.reward.abs().max()) + (0.0 if cost is None else tree.steps * float(cost.abs().max()))
            first, second = self.gradient("enumeration"), self.gradient("dynamic_programming")
            return truth.agreed_gradient(first, second, size=size, problem=self.name)
        way: TruthMethod = "dynamic_programming" if isinstance(self.env, TabularMDP) else "enumeration"
        by_autograd = truth.gradient_by_autograd(self._value_at(way), self.logits)
        if self._long:
            cost = self._cost(self.logits)
            size = self.reward_size + (0.0 if cost is None else self.steps * float(cost.abs().max()))
            by_visitation = self.gradient_by_step().sum(0)
            return truth.agreed_gradient(by_autograd, by_visitation, size=size, problem=self.name)
        terms = self._paths.reward.abs()  # that R is a sum of
        t, kl = self.trajectories, abs(self.kl_coefficient)
        terms = terms - (kl + abs(self.entropy_coefficient)) * t.logp - kl * t.ref_logp  # which may cancel in the cost
        size = float(terms.sum(-1).max())
        return truth.agreed_gradient(by_autograd, self.gradient("enumeration"), size=size, problem=self.name)

    def gradient_by_step(self) -> Tensor:
        """E[γ^t Ĝ_t ∇log π(a_t | k_t)] of each position, `[T, K, A]`; their sum is ∇J."""
        return self._gradient_by_step

    @cached_property
    def _gradient_by_step(self) -> Tensor:
        if self.tree is not None:
            return truth.tree_gradient_by_step(self.tree, self.logits, self._cost(self.logits))
        if self._long:
            return self.process.gradient_by_step(self._cost(self.logits))
        return truth.gradient_by_step(self.trajectories, self._cost(self.logits))

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
        if self.written:
            return self._digest_of_models()
        if self._long:
            return self._digest_of_process()
        h = hashlib.sha256()
        if (tree := self.tree) is not None:
            columns = [tree.context, tree.position, tree.child, tree.reward]
        else:
            p, _ = self._paths, self.trajectories  # found to fit the policies
            columns = [p.start, p.state, p.context, p.action, p.reward, p.mask, p.env_probability, p.start_probability]
            columns.append(p.end)
        for x in columns:
            h.update(x.contiguous().numpy().tobytes())
        for x in (self.logits, self.behavior_logits, self.ref_logits):
            h.update(b"none" if x is None else self.pinned(x).contiguous().numpy().tobytes())
        clock = "position" if tree is not None else self._paths.discount_clock
        h.update(repr((float(self.discount), clock, self.sizes)).encode())
        if not self.plain_objective:
            h.update(repr((self.kl_coefficient, self.entropy_coefficient)).encode())
        return h.hexdigest()[:16]

    def _digest_of_models(self) -> str:
        """Over the weights, what the models say on a few texts, and what those are paid: all that is known of a reward."""
        task = self.env
        assert isinstance(task, LMTask)
        h = hashlib.sha256(repr((task.prompts, task.vocab_size, task.eos, task.max_new_tokens, task.returns)).encode())
        texts = task.probes()
        h.update(repr(texts).encode())
        h.update(repr(task.scores([(s, t) for s, t, _ in task.probe_completions()])).encode())
        how = self.behavior_logits
        h.update(b"none" if how is None else repr((how.temperature, how.top_k, how.top_p, how.dtype)).encode())
        for model in (self.policy, None if how is None else how.model, self.ref_logits):
            h.update(b"none" if model is None else b"model")
            for x in [] if model is None else [*model.parameters(), *model.buffers()]:
                h.update(x.detach().cpu().contiguous().view(-1).numpy().tobytes())
            if model is not None:
                with torch.no_grad():
                    said = torch.cat([model(torch.tensor([text]))[0, -1] for text in texts[:8]])
                h.update((said.round(decimals=9) + 0.0).numpy().tobytes())
        h.update(repr((self.sizes, self.kl_coefficient, self.entropy_coefficient)).encode())
        return h.hexdigest()[:16]

    def _digest_of_process(self) -> str:
        env, h = self.process.env, hashlib.sha256()
        for x in (env.transition, env.full_reward, env.initial, self.process.context):
            h.update(x.contiguous().numpy().tobytes())
        for x in (self.logits, self.behavior_logits, self.ref_logits):
            h.update(b"none" if x is None else self.pinned(x).contiguous().numpy().tobytes())
        facts = (
            env.horizon,
            env.discount,
            env.discount_clock,
            sorted(env.terminal),
            sorted(env.observation),
            self.sizes,
        )
        h.update(repr((facts, self.kl_coefficient, self.entropy_coefficient)).encode())
        return h.hexdigest()[:16]

    def pinned(self, logits: Tensor) -> Tensor:
        """Logits as the identity of the problem has them: those of a language model, whose last bits differ from
        machine to machine, to nine decimals; to five where they are so many that one may lie between two."""
        decimals = 9 if logits.numel() <= 4096 else 5
        return logits.round(decimals=decimals) + 0.0 if isinstance(self.policy, LMPolicy) else logits

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


def _same_weights(a: nn.Module, b: nn.Module) -> bool:
    here, there = (dict(m.named_parameters()) for m in (a, b))
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


# -- the registry of named problems

_BUILDERS: dict[str, Callable[[], Problem]] = {}
_SETS: dict[str, list[str]] = {"core": [], "off-policy": [], "penalized": []}
_DOUBLES: dict[str, str] = {}
_HEAVY: dict[str, str] = {}


def register_problem(
    name: str,
    build: Callable[[], Problem],
    *,
    belongs_to: str | None = None,
    double_of: str | None = None,
    heavy: str | None = None,
) -> None:
    """Add a named problem, to the set "core", "off-policy" or "penalized" on which estimators are judged or to none.

    `double_of`: the problem of a set that shows whatever this one shows; it is kept for its range, and belongs to no set.
    `heavy`: what a listing says of it, of a problem that takes a model to be loaded, or that can only be sampled: it is built
    when asked for by its name or family, and by nothing that goes through all problems.

    Raises:
        ProblemError: the name is taken, or has an @ (what follows it names a θ).
    """
    if "@" in name:
        raise ProblemError(f"problem '{name}': a name has no @; NAME@1 is the problem NAME at another θ.")
    if name in _BUILDERS:
        raise ProblemError(f"problem '{name}' is registered already; choose another name.")
    _BUILDERS[name] = build
    if heavy is not None:
        _HEAVY[name] = heavy
    if double_of is not None:
        _DOUBLES[name] = double_of
    elif belongs_to is not None:
        _SETS[belongs_to].append(name)


def problem_sets() -> dict[str, list[str]]:
    """Names by set: "core" (on-policy), "off-policy", "penalized" (with a KL or entropy term in the objective), and "all",
    which is all of them; a family stands together."""
    sets = {name: _by_family(names) for name, names in _SETS.items()}
    return {**sets, "all": [x for names in sets.values() for x in names]}


def _by_family(names: list[str]) -> list[str]:
    families = list(dict.fromkeys(name.partition("/")[0] for name in names))
    return sorted(names, key=lambda name: families.index(name.partition("/")[0]))


def doubles() -> dict[str, str]:
    """Problems that are in no set, and the one of a set that shows whatever they show."""
    return dict(_DOUBLES)


def registered_problems() -> dict[str, Callable[[], Problem]]:
    """Builders by name, in order of registration; without the heavy ones."""
    return {name: build for name, build in _BUILDERS.items() if name not in _HEAVY}


def heavy_problems() -> dict[str, str]:
    """Names of problems that take a model to be loaded, or can only be sampled, and what a listing says of them."""
    return dict(_HEAVY)


def problem_names(pattern: str = "*") -> list[str]:
    """Names that match; a heavy one, or one that can only be sampled, if the pattern spells its family out."""
    family = pattern.partition("/")[0]
    own = [name for name in _BUILDERS if name not in _HEAVY or name.partition("/")[0] == family]
    return [name for name in own if fnmatch.fnmatchcase(name, pattern)]


def find_problem(name: str) -> Problem:
    """The registered problem `family/setting`, or `family/setting@1` for its second θ.

    Raises:
        UnknownNameError: no such problem; suggests the nearest.
    """
    base, _, draw = name.partition("@")
    if base in _BUILDERS and draw and not draw.isdecimal():
        raise UnknownNameError("problem", name, (), hint=f"After the @ stands the number of a θ: {base}@1.")
    if base not in _BUILDERS:
        raise UnknownNameError("problem", name, _BUILDERS)
    return _BUILDERS[base]().at(int(draw or 0))
