"""Strategies, benchmarks and sampled verdicts."""

from __future__ import annotations

from tests.errors.cases import section

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
