"""Environments and problems."""

from __future__ import annotations

from tests.errors.cases import section

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
