"""What the code of a case finds: small problems, and a world in which something is missing."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import pgcheck
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.verdicts.quantities import find_quantity

# beside the code
FILES = {
    "mine.py": "def loss(batch):\n    return -(batch.logp * batch.mask).sum()\n\n"
    "def typo(batch):\n    return -(batch.advantages * batch.logp).sum()\n\ntext = 'loss'\nnumber = 3\n",
    "shelf.py": "def loss(batch): return 0\nALL = {'a': loss, 'b': loss}\nNONE = {}\ndef make(eps): return eps / 0\n",
    "fails.py": "import pgcheck\n\nproblem = pgcheck.find('mdp/two-state')\n",
    "small.toml": 'name = "small"\nestimators = ["reinforce"]\nproblems = ["bandit/two-arm"]\n',
    "typo.toml": 'name = "typo"\nestimators = ["reinforce"]\nproblems = ["bandit/two-arms"]\n',
}


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


def gate_session(**options: Any) -> Any:
    """The gate of a pytest session with these options."""
    from pgcheck.verdict_items import Session

    names = dict.fromkeys(("baseline", "update", "suite", "report", "seed", "inconclusive"))
    given = {f"pgcheck_{name}": value for name, value in (names | options).items()}
    here = types.SimpleNamespace(dir=Path())
    option = types.SimpleNamespace(**given)
    return Session(types.SimpleNamespace(option=option, rootpath=Path(), invocation_params=here))  # type: ignore[arg-type]


def marked(session: Any, estimators: list[Any], takes: tuple[str, ...] = ("verdict",)) -> list[Any]:
    """The verdicts of a test that is marked with these estimators."""

    def test_mine() -> None: ...

    made: list[Any] = []

    def parametrize(_: str, items: list[Any], **__: Any) -> None:
        made.extend(item.values[0] for item in items)

    of_test = types.SimpleNamespace(fixturenames=takes, function=test_mine, parametrize=parametrize)
    mark = types.SimpleNamespace(args=(estimators,), kwargs={"problems": "bandit/two-arm", "checks": ["finite"]})
    session.parametrize(of_test, mark, "verdict")
    return made


NAMES: dict[str, Any] = {
    x.__name__: x
    for x in (mdp, task, rollouts, log_probs, suite, number, hugging_face, text, memory, without, gate_session, marked)
}
