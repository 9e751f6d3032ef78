"""Names, arguments and budgets."""

from __future__ import annotations

from tests.errors.cases import section

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
