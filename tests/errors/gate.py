"""The configuration and the gate."""

from __future__ import annotations

from tests.errors.cases import section

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
