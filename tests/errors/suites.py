"""Suites and their sentences."""

from __future__ import annotations

from tests.errors.cases import section

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
