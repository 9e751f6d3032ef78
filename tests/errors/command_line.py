"""In a test suite, on the command line, and estimators from anywhere."""

from __future__ import annotations

from tests.errors.cases import section

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
case("a folder that cannot be made", f'''
$ pgcheck run small.toml --out {"n" * 256}
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
