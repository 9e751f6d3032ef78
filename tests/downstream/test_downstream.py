"""pgcheck as another project meets it: installed from a wheel, in that project's own environment, tests and CI.

The environment borrows the dependencies of the running interpreter; pgcheck itself comes from the wheel, with its entry
points. Nothing here shares code with the package: exit codes, words, JUnit counts and bytes.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

from tests.once import Once

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GATE = "--pgcheck-baseline=pgcheck.json"
LOSSES = "tinyrl/losses.py"
ON = "tests/test_off_policy.py"


@dataclass(frozen=True)
class Ran:
    code: int
    text: str


Results = dict[str, tuple[Ran, Path]]  # of runs by name, and where they were made


def outside() -> dict[str, str]:
    """The environment without this checkout in it."""
    drop = {"PYTHONPATH", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST"}
    return {k: v for k, v in os.environ.items() if k not in drop} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.fixture(scope="session")
def python(once: Once) -> Path:
    """The interpreter of an environment in which the wheel of this checkout is installed."""
    return once("downstream: python", lambda: _installed(once.folder / "environment"))


def _installed(folder: Path) -> Path:
    folder.mkdir()
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True, env=outside())
    (wheel,) = folder.glob("*.whl")
    venv.EnvBuilder(symlinks=True).create(folder / "venv")
    made = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(made), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, env=outside())
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    borrowed = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    asked = subprocess.run(
        [made, "-c", "import pgcheck; print(pgcheck.__file__)"], cwd=folder, check=True, capture_output=True, text=True,
        env=outside(),
    )  # fmt: skip
    assert Path(asked.stdout.strip()).is_relative_to(folder), "not the wheel's"
    return made


@dataclass(frozen=True)
class Project:
    """The project, which stays as it is, and copies of it; runs are made in one process each, of one interpreter."""

    python: Path
    folder: Path

    def requests(self, requests: list[dict[str, Any]]) -> list[Ran]:
        """Run them one after the other."""
        here = Path(tempfile.mkdtemp(dir=self.folder.parent))
        for i, x in enumerate(requests):
            x |= {"folder": str(x["folder"]), "log": str(here / f"log{i}")}
        (here / "requests.json").write_text(json.dumps(requests))
        done = subprocess.run(
            [self.python, str(HERE / "scenarios.py"), "requests.json"],
            cwd=here, capture_output=True, text=True, env=outside(), timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [
            Ran(code, Path(x["log"]).read_text()) for x, code in zip(requests, json.loads(done.stdout), strict=True)
        ]

    def copy(self, name: str) -> Path:
        """A second copy, with the baseline as it is."""
        to = self.folder.parent / name
        shutil.copytree(self.folder, to)
        return to


@pytest.fixture(scope="module")
def project(once: Once, python: Path) -> Project:
    """The project with its baseline accepted."""
    return once("downstream: project", lambda: _accepted(Project(python, once.folder / "downstream" / "tinyrl")))


def _accepted(project: Project) -> Project:
    shutil.copytree(HERE / "project", project.folder)
    first, second = project.requests(
        [
            {"run": ["pytest", "-q", "--pgcheck-update"], "folder": project.folder},
            {"run": ["pytest", "-q", GATE], "folder": project.folder},
        ]
    )
    assert first.code == 0, first.text
    assert "written" in first.text
    assert second.code == 0, second.text
    return project


def counts(path: Path) -> dict[str, int]:
    """What a JUnit file says of itself; it must agree with what is in it."""
    (suite,) = ET.parse(path).getroot().iter("testsuite")
    said = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    cases = list(suite.iter("testcase"))
    held = {"tests": len(cases), "failures": 0, "errors": 0, "skipped": 0}
    for case in cases:
        for tag, name in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            held[name] += case.find(tag) is not None
    assert said == held
    return said


def failing(path: Path) -> set[str]:
    return {c.attrib["name"] for c in ET.parse(path).getroot().iter("testcase") if c.find("failure") is not None}


# -- as a stranger would, with nothing prepared


def test_green_by_pytest_and_by_the_command_line(project: Project) -> None:
    """The entry point is found, `python -m pytest` gates, and `pgcheck run` with `pgcheck gate` do."""
    folder = project.copy("green")
    run = [str(project.python), "-m", "pytest", "-q", GATE, "--junitxml=green.xml"]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, env=outside(), check=False)
    assert done.returncode == 0, done.stdout
    found = counts(folder / "green.xml")
    assert found["failures"] == found["errors"] == 0
    assert found["tests"] > 100
    cases = ET.parse(folder / "green.xml").getroot().iter("testcase")
    (case,) = [c for c in cases if c.attrib["name"] == "rloo-dialogue/two-turn-0.9-unbiased"]
    told = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
    assert set(told) == {"measured", "allowed", "seed", "engine"}
    assert float(told["measured"]) <= float(told["allowed"])
    report = "report/report.json"
    asked = (
        ["run", "--out", "report"],
        ["gate", report],  # the marked tests are no part of this run
        ["gate", report, "--baseline", "cli.json", "--update"],
        ["gate", report, "--baseline", "cli.json"],
    )
    ran, gated, accepted, again = project.requests([{"run": ["pgcheck", *x], "folder": folder} for x in asked])
    assert (ran.code, accepted.code, again.code) == (0, 0, 0), ran.text + accepted.text + again.text
    assert gated.code == 1
    assert "ppo: in the baseline, and not in the run" in gated.text


# -- ten one-line regressions


@dataclass(frozen=True)
class Regression:
    name: str
    old: str
    new: str
    red: str  # an item that must fail
    words: str  # what must be said


REGRESSIONS = [
    Regression("γ^t dropped", "batch.discount_weight * batch.reward_to_go", "batch.reward_to_go",
               "reward_to_go-dialogue/unequal-groups-unbiased", "`reward_to_go_undiscounted_weight`"),
    Regression("mask forgotten", "((r - others)[:, None] * batch.logp * batch.mask)", "((r - others)[:, None] * batch.logp)",
               "rloo-mask_respected", "rloo fails mask_respected"),
    Regression("own sample in the mean", "others = (r.sum() - r) / (len(r) - 1)", "others = r.mean()",
               "rloo-dialogue/two-turn-0.9-unchanged", "scale 1 → 0.75"),
    Regression("wrong side of the clip", "torch.min(batch.ratio", "torch.max(batch.ratio",
               "test_off_policy[ppo-off-policy/dialogue-stale-unchanged]", "ppo on off-policy/dialogue-stale: scale"),
    Regression("sign flipped", "return -(weight", "return (weight",
               "reward_to_go-dialogue/two-turn-0.9-unchanged", "scale 1 → -1"),
    Regression("std of B − 1", "correction=0", "correction=1",
               "grpo-dialogue/two-turn-0.9-unchanged", "grpo on dialogue/two-turn-0.9: scale"),
    Regression("weight not detached", "batch.ratio.detach().clamp", "batch.ratio.clamp",
               "test_off_policy[cispo-off-policy/dialogue-stale-unchanged]", "cispo on off-policy/dialogue-stale"),
    Regression("sum over rows", "adv[:, None] * batch.logp * batch.mask).sum(-1).mean()\n\n\ndef make_grpo",
               "adv[:, None] * batch.logp * batch.mask).sum(-1).sum()\n\n\ndef make_grpo",
               "mean-dialogue/two-turn-0.9-unchanged", "still proportional, variance"),
    Regression("louder, and as unbiased", "batch.discount_weight * batch.reward_to_go", "batch.episode_return[:, None]",
               "reward_to_go-dialogue/two-turn-0.9-unchanged", "grew ×"),
    Regression("length forgotten", "-(row / batch.length).mean()", "-row.mean()",
               "grpo-dialogue/two-turn-0.9-unchanged", "grew ×"),
]  # fmt: skip


@pytest.fixture(scope="module")
def changed(once: Once, project: Project) -> dict[str, Results]:
    """What becomes of each regression and of each way of checking less, and where."""
    for r in REGRESSIONS:
        assert (project.folder / LOSSES).read_text().count(r.old) == 1, r.name
    red, less = (["pytest", "-q", *x] for x in ([GATE, "--junitxml=red.xml"], ["--junitxml=less.xml"]))
    asked = {
        "downstream: regression": {r.name: {"run": red, "edit": [LOSSES, r.old, r.new]} for r in REGRESSIONS},
        "downstream: less": {x.name: {"run": [*less, *x.arguments], "edit": x.edit} for x in LESS},
    }
    return once.each({name: functools.partial(_each_in_a_copy, project, name, x) for name, x in asked.items()})


@pytest.fixture(scope="module")
def regressed(changed: dict[str, Results]) -> Results:
    return changed["downstream: regression"]


@pytest.fixture(scope="module")
def less(changed: dict[str, Results]) -> Results:
    return changed["downstream: less"]


def _each_in_a_copy(project: Project, name: str, asked: dict[str, dict[str, Any]]) -> Results:
    folders = [project.copy(f"{name.split()[-1]}{i}") for i in range(len(asked))]
    ran = project.requests([x | {"folder": f} for x, f in zip(asked.values(), folders, strict=True)])
    return dict(zip(asked, zip(ran, folders, strict=True), strict=True))


@pytest.mark.parametrize("regression", REGRESSIONS, ids=lambda r: r.name)
def test_a_regression_is_red_and_named(regression: Regression, regressed: Results) -> None:
    ran, folder = regressed[regression.name]
    assert ran.code == 1, ran.text
    assert regression.words in ran.text
    assert "Traceback" not in ran.text
    assert regression.red in failing(folder / "red.xml")
    found = counts(folder / "red.xml")
    assert found["failures"] == ran.text.count("\nFAILED ") > 0
    assert found["errors"] == 0


def test_only_what_changed_is_red(regressed: Results) -> None:
    """A change of one loss fails items of that loss alone."""
    for r in REGRESSIONS:
        names = failing(regressed[r.name][1] / "red.xml")
        owners = {name.removeprefix("test_off_policy[").partition("-")[0] for name in names}
        assert owners == {r.red.removeprefix("test_off_policy[").partition("-")[0]}, r.name


# -- ways of checking less


@dataclass(frozen=True)
class Less:
    name: str
    edit: tuple[str, str, str] | None
    arguments: list[str]
    code: int
    words: str


LESS = [
    Less("a test is renamed, so that pytest does not find it", (ON, "def test_off_policy", "def off_policy"), [GATE], 1,
         "ppo-off-policy/dialogue-stale-orphaned"),
    Less("an estimator is renamed", ("pyproject.toml", 'name = "grpo"', 'name = "grpo2"'), [GATE], 1,
         "grpo2-dialogue/two-turn-0.9-missing"),
    Less("an estimator is deleted", ("pyproject.toml", '  "tinyrl.losses:rloo",\n', ""), [GATE], 1,
         "rloo-dialogue/two-turn-0.9-orphaned"),
    Less("a problem is deleted", ("pyproject.toml", ', "dialogue/unequal-groups"', ""), [GATE], 1,
         "rloo-dialogue/unequal-groups-orphaned"),
    Less("a marked problem is another one", (ON, '"off-policy/dialogue-stale"', '"off-policy/tree-stale"'), [GATE], 1,
         "ppo-off-policy/tree-stale-missing"),
    Less("a claim is weakened", ("pyproject.toml", '"tinyrl.losses:rloo"',
         '{path = "tinyrl.losses:rloo", claim = "proportional"}'), [GATE], 1, "the claims changed: unbiased → proportional"),
    Less("a check is no longer asked", ("pyproject.toml", "[tool.pgcheck]",
         '[tool.pgcheck]\nchecks = ["unbiased", "proportional", "biased"]'), [GATE], 1, "row_order 2 → 0"),
    Less("everything is deselected", None, [GATE, "-k", "nothing_of_pgcheck"], 5, "nothing was checked"),
    Less("nothing is there", None, [GATE, "--ignore=tests", "-k", "nowhere"], 5, "nothing was checked"),
    Less("the problem of a name is another one", ("pgcheck.json", '"digest": "', '"digest": "0'), [GATE], 1,
         "the problem is another one (digest 0"),
    Less("there is no baseline", None, ["--pgcheck-baseline=gone.json"], 2, "is not there"),
    Less("the estimators cannot be imported", ("tinyrl/losses.py", "import torch", "import torhc"), [GATE, "tests"], 2,
         "importing 'tinyrl.losses' failed: ModuleNotFoundError"),
]  # fmt: skip


@pytest.mark.parametrize("case", LESS, ids=lambda x: x.name)
def test_checking_less_is_red(case: Less, less: Results) -> None:
    ran, folder = less[case.name]
    assert ran.code == case.code, ran.text
    assert case.words in ran.text
    assert "Traceback" not in ran.text
    if case.code == 1:
        found = counts(folder / "less.xml")
        assert found["failures"] == ran.text.count("\nFAILED ") > 0
        assert found["errors"] == 0


def test_a_change_is_accepted_by_an_update(project: Project) -> None:
    """Red, then green after --pgcheck-update, and the diff of the baseline holds what changed and nothing else; an update
    accepts no failure."""
    meant, failed = project.copy("meant"), project.copy("failed")
    before = (meant / "pgcheck.json").read_text()
    quiet = [LOSSES, "others = (r.sum() - r) / (len(r) - 1)", "others = 0.5 * (r.sum() - r) / (len(r) - 1)"]
    worse = [LOSSES, "others = (r.sum() - r) / (len(r) - 1)", "others = r.mean()"]
    red, update, green, refused = project.requests(
        [
            {"run": ["pytest", "-q", GATE], "edit": quiet, "folder": meant},
            {"run": ["pytest", "-q", "--pgcheck-update"], "folder": meant},
            {"run": ["pytest", "-q", GATE], "folder": meant},
            {"run": ["pytest", "-q", "--pgcheck-update"], "edit": worse, "folder": failed},
        ]
    )
    assert (red.code, update.code, green.code, refused.code) == (1, 0, 0, 1)
    lines = [set((x / "pgcheck.json").read_text().splitlines()) for x in (meant, failed)]
    changed = set(before.splitlines()) ^ lines[0]
    assert changed
    assert all('"estimator": "rloo"' in line for line in changed)
    assert set(before.splitlines()) == lines[1]
    assert "not written" in refused.text


# -- nothing happens by chance


def test_twenty_runs_of_the_unchanged_project_write_the_same_bytes(project: Project) -> None:
    """Seeds, orders, files and numbers of workers vary; none is red, and report.json is the same to the byte."""
    generator = random.Random(6)
    requests, folders = [], []
    for i in range(20):
        folder = project.copy(f"again{i}")
        folders.append(folder)
        arguments = [GATE, "--pgcheck-report=report.json"]
        if i >= 18:
            arguments += [f"-n{i - 16}"]
        if i % 2:
            arguments += [f"--pgcheck-seed={generator.randrange(2**31)}"] if i % 4 == 1 else ["--pgcheck-vary-seed"]
        if i % 3:
            shuffle = (
                "import random\n\ndef pytest_collection_modifyitems(items):\n    random.Random({}).shuffle(items)\n"
            )
            (folder / "conftest.py").write_text(shuffle.format(7 if i >= 18 else i))
        requests.append({"run": ["pytest", "-q", *arguments], "folder": folder})
    for ran in project.requests(requests):
        assert ran.code == 0, ran.text
    assert len({(folder / "report.json").read_bytes() for folder in folders}) == 1
    told = [json.loads((folder / "report.provenance.json").read_text())["seed"] for folder in folders]
    assert told[0] is None
    assert len(set(told)) == 11


def test_ten_kills_leave_what_was_there(project: Project) -> None:
    """SIGKILL at random moments of an update: the baseline and the report are the old ones or the new ones, whole."""
    folder = project.copy("killed")
    new = [LOSSES, "others = (r.sum() - r) / (len(r) - 1)", "others = 0.5 * (r.sum() - r) / (len(r) - 1)"]
    run = ["pytest", "-q", "--pgcheck-update", "--pgcheck-report=report.json"]
    old_baseline = (folder / "pgcheck.json").read_bytes()
    (first,) = project.requests([{"run": run, "folder": folder}])
    assert first.code == 0
    old = {(folder / "pgcheck.json").read_bytes(), (folder / "report.json").read_bytes()}
    assert old_baseline in old
    generator, requests, folders = random.Random(1), [], []
    for i in range(10):
        folders.append(project.folder.parent / f"kill{i}")
        shutil.copytree(folder, folders[-1])
        when = {"kill_after": generator.uniform(0.0, 3.0)}
        requests.append({"run": run, "edit": new, "folder": folders[-1], **when})
    final = project.folder.parent / "kill-none"
    shutil.copytree(folder, final)
    requests.append({"run": run, "edit": new, "folder": final})
    *killed, done = project.requests(requests)
    assert done.code == 0
    assert any(ran.code == -9 for ran in killed)
    whole = old | {(final / name).read_bytes() for name in ("pgcheck.json", "report.json")}
    for x in folders:
        for name in ("pgcheck.json", "report.json"):
            assert (x / name).read_bytes() in whole
            json.loads((x / name).read_text())


# -- the action, as a runner of GitHub executes it


def run_action(project: Project, folder: Path, inputs: dict[str, str]) -> Ran:
    """The steps of action.yml, one after the other: `shell: bash` is `bash --noprofile --norc -eo pipefail FILE`."""
    action = yaml.safe_load((ROOT / ".github/actions/pgcheck/action.yml").read_text())
    values = {f"inputs.{name}": inputs.get(name, x["default"]) for name, x in action["inputs"].items()}
    assert set(inputs) <= set(action["inputs"])
    assert action["runs"]["using"] == "composite"

    def filled(text: str) -> str:
        return re.sub(r"\$\{\{ *([\w.-]+) *\}\}", lambda found: values[found[1]], text)

    said = ""
    for number, step in enumerate(action["runs"]["steps"]):
        assert set(step) == {"shell", "working-directory", "env", "run"}
        assert step["shell"] == "bash"
        assert "${{" not in step["run"], "an input would be read as shell"
        script = folder / f"step{number}.sh"
        script.write_text(step["run"])
        given = outside() | {name: filled(x) for name, x in step["env"].items()}
        given |= {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
        given |= {"GITHUB_ACTION_PATH": str(ROOT / ".github/actions/pgcheck")}
        given["PATH"] = f"{project.python.parent}{os.pathsep}{given['PATH']}"
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)], cwd=folder / filled(step["working-directory"]),
            capture_output=True, text=True, env=given, check=False,
        )  # fmt: skip
        said += done.stdout + done.stderr
        if done.returncode:
            return Ran(done.returncode, said)
    return Ran(0, said)


def test_the_action_is_green_and_red(project: Project) -> None:
    """Green on the accepted baseline; red, with an annotation at the loss and a summary, on a change; an error without one."""
    folder = project.copy("action")
    config = folder / "pyproject.toml"
    config.write_text(config.read_text().replace("[tool.pgcheck]", '[tool.pgcheck]\nchecks = ["biased"]\nthetas = 1'))
    inputs = {"pgcheck": "none", "baseline": "of action.json", "report": "a report"}
    absent = run_action(project, folder, inputs)
    assert absent.code == 2, absent.text
    assert "of action.json is not there; to write it, run: pgcheck gate 'a report/report.json'" in absent.text
    report = "a report/report.json"
    (made,) = project.requests(
        [{"run": ["pgcheck", "gate", report, "--baseline", "of action.json", "--update"], "folder": folder}]
    )
    assert made.code == 0, made.text
    green = run_action(project, folder, inputs)
    assert green.code == 0, green.text
    assert "::error" not in green.text
    losses = folder / LOSSES
    losses.write_text(losses.read_text().replace("correction=0", "correction=1"))
    red = run_action(project, folder, inputs)
    assert red.code == 1, red.text
    line = losses.read_text().splitlines().index("    def grpo(batch):") + 1
    assert f"::error file={LOSSES},line={line},title=pgcheck%3A grpo-dialogue/two-turn-0.9-changed::grpo on" in red.text
    assert "grpo-dialogue/two-turn-0.9-changed" in (folder / "summary.md").read_text()
    unknown = run_action(project, folder, {**inputs, "suite": "croe"})
    assert unknown.code == 2
    assert "Did you mean 'core'" in unknown.text


def test_the_action_installs_what_it_is_told(project: Project, tmp_path: Path) -> None:
    """A pip that writes down its arguments: the package first, then the copy of pgcheck that the action is part of."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >> "$(dirname "$0")/seen"\n')
    fake.chmod(0o755)
    (fake.parent / "pgcheck").write_text("#!/bin/sh\nexit 0\n")
    (fake.parent / "pgcheck").chmod(0o755)
    stranger = Project(fake, tmp_path)
    for inputs, installed in (
        (
            {"install": ". pytest-xdist"},
            [
                ".",
                "pytest-xdist",
                str(ROOT / ".github/actions/pgcheck/../../.."),
            ],
        ),
        ({"install": ".", "pgcheck": "a wheel.whl"}, [".", "a wheel.whl"]),
        ({"pgcheck": "none"}, None),
    ):
        (fake.parent / "seen").unlink(missing_ok=True)
        assert run_action(stranger, tmp_path, inputs).code == 0
        if installed is None:
            assert not (fake.parent / "seen").exists()
        else:
            assert (fake.parent / "seen").read_text().splitlines() == ["-m", "pip", "install", "-q", *installed]
    assert (ROOT / ".github/actions/pgcheck/../../.." / "pyproject.toml").resolve() == ROOT / "pyproject.toml"
