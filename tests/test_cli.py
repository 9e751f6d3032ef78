"""The command line: output, exit codes, the user's own code, and that nothing heavy is imported for --help."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import pgcheck
from pgcheck import search
from pgcheck.cli import main

ROOT = Path(__file__).parent.parent
LOSSES = """
import torch

def sound(batch):
    weight = batch.discount_weight * batch.reward_to_go
    return -(weight * batch.logp * batch.mask).sum(-1).mean()

def wrong(batch):
    r = batch.episode_return
    return -((r - r.mean())[:, None] * batch.logp * batch.mask).sum(-1).mean()

def nan(batch):
    r = batch.episode_return
    return -(((r - r.mean()) / r.std())[:, None] * batch.logp * batch.mask).sum(-1).mean()

def shapeless(batch):
    return -(batch.logp * batch.mask).sum(-1)

text = "no estimator"
"""
SUITE = """
name = "small"
about = "three problems"
estimators = ["reinforce", "leave_one_out"]
problems = ["bandit/two-arm", "dialogue/two-turn", "dialogue/unequal-groups"]
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the command line in a folder that holds `mine.py` and `small.toml`; returns code, stdout, stderr."""
    (tmp_path / "mine.py").write_text(LOSSES)
    (tmp_path / "small.toml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pgcheck", *arguments])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_help_imports_nothing_heavy() -> None:
    """`pgcheck --help` answers without torch, pandas, scipy or rich."""
    code = (
        "import sys; sys.argv = ['pgcheck', '--help']\n"
        "from pgcheck.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'pandas', 'scipy', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout


def test_version_is_the_packages(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.strip() == f"pgcheck {tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}"


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("estimators", "leave_one_out"),
        ("problems", "tree/tokens"),
        ("checks", "unbiased"),
        ("suites", "core"),
        ("mistakes", "token_mean"),
        ("quantities", "off_axis"),
    ],
)
def test_list(run: Run, what: str, name: str) -> None:
    code, out, _ = run("list", what)
    assert code == 0
    assert name in out
    code, out, _ = run("list", what, "--json")
    assert code == 0
    assert name in {row["name"] for row in json.loads(out)}


def test_run_of_a_sound_suite(run: Run, tmp_path: Path) -> None:
    """Every verdict agrees: exit code 0, the report in three forms and as tables, the numbers behind each cell in it."""
    code, out, _ = run("run", "small.toml", "--out", "report")
    assert code == 0
    assert "0 FAIL" in out
    folder = tmp_path / "report"
    tables = {f"{name}.csv" for name in ("measurements", "steps", "verdicts", "problems", "estimators")}
    assert {p.name for p in folder.iterdir()} == {
        "report.json",
        "report.provenance.json",
        "report.md",
        "report.html",
        *tables,
    }
    data = json.loads((folder / "report.json").read_text())
    assert {m["problem"] for m in data["measurements"]} == {
        "bandit/two-arm", "dialogue/two-turn", "dialogue/unequal-groups",
    }  # fmt: skip
    assert "leave_one_out" in (folder / "report.md").read_text()


def test_report_page_is_whole(run: Run, tmp_path: Path) -> None:
    """Well-formed, self-contained, and every link of the matrix has its target."""
    run("run", "small.toml", "--out", "report")
    text = (tmp_path / "report" / "report.html").read_text()

    class Links(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.ids: list[str] = []
            self.links: list[str] = []
            self.fetched: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            if given.get("id"):
                self.ids.append(str(given["id"]))
            if tag == "a":
                self.links.append(str(given["href"]))
            if tag in {"link", "img", "iframe"} or (tag == "script" and "src" in given):
                self.fetched.append(tag)

    page = Links()
    page.feed(text)
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not page.fetched
    assert not re.search(r"https?://", text)


def test_run_judges_the_users_own(run: Run) -> None:
    """Green on the sound loss; red with the cause, and the command to go on with, on the wrong one."""
    code, out, _ = run("run", "small.toml", "--estimator", "mine:sound")
    assert code == 0
    assert "reinforce" not in out
    code, out, _ = run("run", "small.toml", "--estimator", "mine:wrong")
    assert code == 1
    assert "wrong is not unbiased" in out
    assert "(B−1)/B × the exact gradient" in out
    assert "pgcheck compare mine:wrong" in out


@pytest.mark.parametrize("form", ["markdown", "html", "json"])
def test_formats(run: Run, form: str) -> None:
    code, out, _ = run("run", "small.toml", "--format", form)
    assert code == 0
    assert "leave_one_out" in out
    if form == "json":
        assert json.loads(out) == json.loads(run("run", "small.toml", "--json")[1])


def test_nan_is_a_failure_not_a_crash(run: Run) -> None:
    """Unanimous groups have std 0: the verdict names the batch and the mend."""
    code, out, _ = run("run", "small.toml", "--estimator", "mine:nan")
    assert code == 1
    assert "nan fails finite" in out
    assert "add an ε" in out


def test_too_large_is_inconclusive(run: Run) -> None:
    """A budget that one case does not fit: exit code 1, with the numbers and the nearest plan that fits."""
    code, out, _ = run("run", "small.toml", "--estimator", "mine:sound", "--budget", "300")
    assert code == 1
    assert "INCONCLUSIVE" in out
    assert "The nearest that fits: groups=" in out


def test_same_bytes_twice(run: Run, tmp_path: Path) -> None:
    run("run", "small.toml", "--out", "one")
    run("run", "small.toml", "--out", "two")
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_nothing_is_half_written(run: Run, tmp_path: Path) -> None:
    """A folder that cannot be made: one line, exit code 2, nothing left behind."""
    (tmp_path / "file").write_text("in the way")
    code, _, err = run("run", "small.toml", "--out", "file/report")
    assert code == 2
    assert err.startswith("pgcheck: out: cannot write")
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {"file", "mine.py", "small.toml"}


@pytest.mark.parametrize("ending", [".csv", ".json", ".md", ".html"])
def test_compare_writes_its_table(run: Run, tmp_path: Path, ending: str) -> None:
    code, out, _ = run(
        "compare", "rloo", "grpo", "mine:sound", "--problem", "bandit/two-arm", "--no-sweeps", "--out", f"table{ending}"
    )
    assert code == 0
    assert "(exact)" in out
    text = (tmp_path / f"table{ending}").read_text()
    assert all(name in text for name in ("leave_one_out", "grpo", "sound"))


def test_compare_writes_its_report(run: Run, tmp_path: Path) -> None:
    """The page with its sweeps, tables and figures in a folder; what was written stands below the table."""
    code, out, _ = run(
        *(
            "compare",
            "reinforce",
            "mine:sound",
            "--problem",
            "bandit/two-arm",
            "--relative-to",
            "mine:sound",
            "--out",
            "r.html",
        ),
        *("--tables", "tables", "--groups", "1,2", "--group-sizes", "2", "--staleness", "0,.5"),
    )
    assert code == 0
    assert "written: r.html" in out
    assert "relative to <b>sound</b>" in (tmp_path / "r.html").read_text()
    names = {p.name for p in (tmp_path / "tables").iterdir()}
    for name in ("comparison", "groups", "group_sizes", "staleness", "steps", "sources", "blocks"):
        assert f"{name}.csv" in names
    for name in ("ratios", "plane", "mse", "groups-variance", "staleness-bias"):
        assert {f"bandit-two-arm-{name}.svg", f"bandit-two-arm-{name}.png"} <= names
    assert f"written: tables ({len(names)} files)" in out
    staleness = (tmp_path / "tables" / "staleness.csv").read_text().splitlines()
    assert [row.split(",")[2] for row in staleness[1:]] == ["0.0", "0.0", "0.5", "0.5"]


def test_compare_without_sweeps(run: Run, tmp_path: Path) -> None:
    code, _, _ = run("compare", "reinforce", "--problem", "bandit/two-arm", "--no-sweeps", "--out", "r.html")
    assert code == 0
    page = (tmp_path / "r.html").read_text()
    assert "Who wins at which budget" in page
    assert "Batch size" not in page


def test_compare_in_parameters(run: Run) -> None:
    code, out, _ = run("compare", "reinforce", "--problem", "lm/stale", "--space", "parameters", "--json")
    assert code == 0
    in_logits = json.loads(run("compare", "reinforce", "--problem", "lm/stale", "--json")[1])
    assert json.loads(out)[0]["variance"] != in_logits[0]["variance"]


def test_compare_as_json(run: Run) -> None:
    code, out, _ = run("compare", "rloo", "--problem", "bandit/two-arm", "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert row["finding"] == "unbiased"
    assert row["batches"] is None


@pytest.mark.parametrize("name", ["unbiased", "padding_length", "grpo", "rloo", "dialogue/two-turn", "mine:sound"])
def test_explain(run: Run, name: str) -> None:
    code, out, _ = run("explain", name)
    assert code == 0
    assert len(out.splitlines()) > 3
    assert json.loads(run("explain", name, "--json")[1])["page"] == out.rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "unbised"), "Did you mean 'unbiased'?"),
        (("compare", "leave_one_outt"), "Did you mean 'leave_one_out'?"),
        (("compare", "rloo", "--problem", "bandit/two-arms"), "Did you mean 'bandit/two-arm'?"),
        (("run", "cor"), "Did you mean 'core'?"),
        (("run", "small.toml", "--estimator", "absent:loss"), "importing 'absent' failed"),
        (("run", "small.toml", "--estimator", "mine:absent"), "'mine' has no attribute 'absent'"),
        (("run", "small.toml", "--estimator", "mine:text"), "'no estimator' is neither an Estimator nor a loss"),
        (("run", "small.toml", "--estimator", "mine:shapeless"), "not a scalar"),
        (("compare", "rloo", "--out", "table.xlsx"), ".csv"),
        (("list", "everything"), "everything"),
        (("run", "small.toml", "--budget", "0"), "budget"),
    ],
)
def test_usage_errors(run: Run, arguments: tuple[str, ...], message: str) -> None:
    """One clear error on stderr, exit code 2, nothing on stdout."""
    code, out, err = run(*arguments)
    assert code == 2
    assert message in re.sub(r"[│╭╮╰╯─\s]+", " ", err)
    assert not out


GATED = """
[tool.pgcheck]
problems = ["bandit/two-arm", "dialogue/two-turn"]
baseline = "baseline.json"
estimators = ["mine:sound", {path = "mine.py:wrong", claim = "proportional"}]
"""


def test_the_gate_from_the_first_day_to_a_red_one(run: Run, tmp_path: Path) -> None:
    """No baseline: 2; --update writes it; the same code: 0; another loss: 1, named, with the command that accepts it."""
    (tmp_path / "pyproject.toml").write_text(GATED)
    code, out, err = run("gate")
    assert (code, out) == (2, "")
    assert "baseline.json is not there; to write it, run: pgcheck gate --update" in err
    assert run("gate", "--update")[0] == 0
    assert run("gate")[0] == 0
    assert run("run", "--out", "report")[0] == 0
    code, out, _ = run("gate", "report/report.json")
    assert (code, out) == (0, "8 entries as in the baseline\n")
    (tmp_path / "mine.py").write_text(LOSSES.replace("r - r.mean()", "r - 0.5 * r.mean()"))
    kept = (tmp_path / "baseline.json").read_bytes()
    (tmp_path / "mine2.py").write_text(LOSSES.replace("r - r.mean()", "r - 0.5 * r.mean()"))
    (tmp_path / "pyproject.toml").write_text(GATED.replace('"mine.py:wrong"', '"mine2.py:wrong"'))
    code, out, _ = run("gate")
    assert code == 1
    assert "wrong on bandit/two-arm: scale 0.75 → 0.875, rel 0.25 → 0.125, still proportional" in out
    assert "next      if this is meant: pgcheck gate --update" in out
    assert (tmp_path / "baseline.json").read_bytes() == kept


def test_an_update_accepts_no_failure(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(GATED.replace('claim = "proportional"', 'claim = "unbiased"'))
    code, out, _ = run("gate", "--update")
    assert code == 1
    assert "not written: 4 of these are no changes but failures; mend them first" in out
    assert "(B−1)/B × the exact gradient" in out
    assert not (tmp_path / "baseline.json").exists()


def test_an_expected_failure_of_the_config_is_no_failure(run: Run, tmp_path: Path) -> None:
    expected = 'expected_failed_checks = {unbiased = "own sample"}'
    (tmp_path / "pyproject.toml").write_text(GATED.replace('claim = "proportional"', expected))
    assert run("run")[0] == 0
    assert run("gate", "--update")[0] == run("gate")[0] == 0
    (tmp_path / "pyproject.toml").write_text(
        GATED.replace('"mine.py:wrong", claim = "proportional"', f'"reinforce", {expected}')
    )
    code, out, _ = run("run", "--format", "github")
    assert code == 1
    assert "unbiased is expected to fail (own sample), and does not" in out


def test_the_command_line_goes_before_the_config(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(GATED)
    names = {m["problem"] for m in json.loads(run("run", "--json")[1])["measurements"]}
    assert names == {"bandit/two-arm", "bandit/two-arm@1", "dialogue/two-turn", "dialogue/two-turn@1"}
    data = json.loads(run("run", "small.toml", "--json")[1])
    assert {m["problem"] for m in data["measurements"]} == {
        "bandit/two-arm",
        "dialogue/two-turn",
        "dialogue/unequal-groups",
    }
    assert {m["estimator"] for m in data["measurements"]} == {"sound", "wrong"}
    data = json.loads(run("run", "--estimator", "grpo", "--json")[1])
    assert {m["estimator"] for m in data["measurements"]} == {"grpo"}
    (tmp_path / "pyproject.toml").write_text(GATED.replace("baseline =", "base_line ="))
    code, _, err = run("run")
    assert code == 2
    assert "unknown field 'base_line'. Did you mean 'baseline'?" in err


def test_github_is_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations at the line of the loss, on stderr; Markdown appended to the step summary."""
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    code, _, err = run("run", "small.toml", "--estimator", "mine:wrong")
    assert code == 1
    line = LOSSES.splitlines().index("def wrong(batch):") + 1
    first = err.splitlines()[0]
    assert first.startswith(
        f"::error file=mine.py,line={line},title=pgcheck%3A wrong-bandit/two-arm-unbiased::wrong is not"
    )
    assert "%0A  what      E ĝ = ∇J does not hold" in first
    assert summary.read_text().startswith("before\n### pgcheck: small\n")


def test_readme_commands_are_those_of_ci() -> None:
    """`.ci/run` takes its test command from the README, and the README has exactly two commands that set up."""
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert "pgcheck run core" in commands[0]
    assert "pytest" in commands[1]


# -- a search

BLIND = """
import torch

def plain(batch):
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean()

def at_two(batch):
    return plain(batch) * torch.where(batch.episode_return.max() == -2.0, 2.0, 1.0)

def at_two_threefold(batch):
    return plain(batch) * torch.where(batch.episode_return.max() == -2.0, 3.0, 1.0)
"""


def test_run_with_a_search_prints_the_smallest_counterexample_as_code(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named problems miss it; what is printed, run as it stands, fails as well. Two of them are two problems of the report,
    and the one that is sound is said to be searched."""
    monkeypatch.setattr(search, "search", functools.partial(search.search, examples=80))
    (tmp_path / "blind.py").write_text(BLIND)
    asked = [f"--estimator=blind.py:{name}" for name in ("at_two", "plain", "at_two_threefold")]
    assert run("run", "small.toml", *asked)[0] == 0
    code, out, _ = run("run", "small.toml", *asked, "--search", "--out", "there")
    assert code == 1
    assert re.search(r"^plain, unbiased: no counterexample among \d+ random problems$", out, re.MULTILINE)
    found = out.split("The smallest of ")[1:]
    names = ["random/counterexample", "random/counterexample-2"]
    for text, name in zip(found, names, strict=True):
        assert f'name="{name}"' in text
        lines = text.partition(":\n\n")[2].split("\n\n\n")[0].splitlines()
        snippet = "\n".join(line[4:] for line in lines if not line or line.startswith("    "))
        with pytest.raises(pgcheck.BiasError):
            exec(snippet, {})
    report = json.loads(Path("there/report.json").read_text())
    failed = {(v["estimator"], v["problem"]) for v in report["verdicts"] if v["status"] == "FAIL"}
    assert failed == {("at_two", names[0]), ("at_two_threefold", names[1])}


def test_a_suite_of_cases_says_why_it_judges_no_other_estimator(run: Run) -> None:
    code, out, err = run("run", "notes", "--estimator", "mine.py:sound")
    assert (code, out) == (2, "")
    assert err == "pgcheck: suite 'notes' has cases only, and no problems to judge another estimator on; run core.\n"


SAMPLED = [
    "--engine",
    "monte_carlo",
    "--draws",
    "8192",
    "--seed",
    "3",
    "--rtol",
    "0.3",
    "--alpha",
    "1e-4",
    "--beta",
    "0.01",
]


@pytest.mark.usefixtures("forks")
def test_settings_of_samples_on_the_command_line(run: Run) -> None:
    """What is asked for is what verdicts carry; in a suite's file as well, and `--workers` changes nothing."""
    code, out, _ = run("run", "small.toml", "--json", *SAMPLED)
    report = json.loads(out)
    assert code == 0
    assert {m["seed"] for m in report["measurements"]} == {3}
    samples = [v for v in report["verdicts"] if v.get("sample")]
    assert samples
    assert {(v["allowed"], v["sample"]["alpha"], v["sample"]["beta"]) for v in samples} == {(0.3, 1e-4, 0.01)}
    assert max(v["sample"]["batches"] for v in samples) <= 8192
    fields = {"engine": '"monte_carlo"', "draws": 8192, "seed": 3, "tolerance": 0.3, "alpha": 1e-4, "beta": 0.01}
    Path("other.toml").write_text(SUITE + "".join(f"{name} = {x}\n" for name, x in fields.items()))
    assert run("run", "other.toml", "--json") == (code, out, "")
    assert run("run", "other.toml", "--json", "--workers", "2") == (code, out, "")


def test_bounds_and_space(run: Run) -> None:
    """On the command line as in the suite's file; verdicts rest on the bounds; bounds that a draw breaks are an error."""
    more = (
        'name = "one"\nestimators = ["leave_one_out"]\nproblems = ["dialogue/two-turn"]\nchecks = ["unbiased"]\n'
        'engine = "monte_carlo"\ndraws = 4096\n'
    )
    Path("file.toml").write_text(more + 'bounds = [-20, 20]\nspace = "parameters"\n')
    Path("line.toml").write_text(more)
    code, out, _ = run("run", "file.toml", "--json")
    assert run("run", "line.toml", "--json", "--bounds", "-20", "20", "--space", "parameters") == (code, out, "")
    bounded, plain = (json.loads(x) for x in (out, run("run", "line.toml", "--json", "--space", "parameters")[1]))
    assert [m["parameters"] for m in bounded["measurements"]] == [6]
    assert bounded["verdicts"][0]["sample"]["missed"] > 1.5 * plain["verdicts"][0]["sample"]["missed"]
    code, _, err = run("run", "line.toml", "--bounds", "-.01", ".01")
    assert code == 2
    assert "beyond them, so that nothing is proven" in err
    assert "lo < 0 < hi" in run("compare", "grpo", "--engine", "monte_carlo", "--bounds", "1", "2")[2]
    exact = json.loads(run("run", "line.toml", "--json", "--engine", "exact", "--space", "parameters")[1])
    assert [(m["parameters"], m["batches"]) for m in exact["measurements"]] == [(6, None)]


def test_a_reference_that_was_estimated_before(run: Run) -> None:
    p = pgcheck.as_problems("dialogue/two-turn")[0]
    torch.save(pgcheck.reference_draws(pgcheck.as_estimator("reinforce"), p, draws=11_000), "reference.pt")
    line = (
        "compare",
        "leave_one_out",
        "grpo",
        "--engine",
        "auto",
        "--reference",
        "reference.pt",
        "--json",
        "--rtol",
        "0.5",
    )
    code, out, _ = run(*line)
    assert code == 0
    rows = json.loads(out)
    assert [row["against"] for row in rows] == ["estimates of another run"] * 2
    assert [row["finding"] for row in rows] == ["unbiased", "biased"]
    assert "no such file" in run(*line[:6], "none.pt")[2]


def test_a_design_from_a_pilot(run: Run) -> None:
    code, out, _ = run("design", "grpo", "--engine", "monte_carlo", "--pilot", "1024", "--seed", "3", "--json")
    assert code == 0
    assert json.loads(out)["pilot"]["draws"] == 1024
    assert "at least 1,024" in run("design", "grpo", "--engine", "monte_carlo", "--pilot", "10")[2]


@pytest.mark.usefixtures("forks")
def test_settings_of_samples_compared(run: Run) -> None:
    code, out, _ = run("compare", "reinforce", "grpo", "--json", *SAMPLED, "--workers", "2", "--resume", "kept")
    assert code == 0
    rows = json.loads(out)
    assert {row["batches"] for row in rows} <= {4096, 8192}
    assert rows[1]["ratio_low"] < rows[1]["ratio"] < rows[1]["ratio_high"]
    assert len(list(Path("kept").iterdir())) == 1
    code, _, err = run("compare", "reinforce", "grpo", "--json", *SAMPLED, "--resume", "kept", "--beta", "0.02")
    assert code == 2
    assert "is of another run: its settings are" in err
    assert run("run", "small.toml", "--workers", "0")[0] == 2
