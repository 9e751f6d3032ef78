"""Words for functions: other words for other functions, the same in every process."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

from pgcheck.fingerprint import described

WANTED = {"7 + 8": "15"}
HALF = re.compile(r"\d+")


def halved(x: float) -> float:
    return x / 2


def plain(prompt: Any, text: Any) -> float:
    return float(sum(text) % 3 == 0)


def more(prompt: Any, text: Any) -> float:
    return float(sum(text) % 3 <= 0)


def of_tables(prompt: Any, text: Any) -> float:
    return float(WANTED.get(prompt) == text) + halved(len(HALF.findall(text)))


def closed(k: Any) -> Any:
    return lambda prompt, text: float(sum(text) % k == 0)


@dataclasses.dataclass(frozen=True)
class Scored:
    k: int = 3

    def __call__(self, prompt: Any, text: Any) -> float:
        return float(sum(text) % self.k == 0)


class Judge(torch.nn.Module):
    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w))


pair = (lambda prompt, text: 1.0), (lambda prompt, text: 2.0)  # on one line
calls: list[Any] = [
    plain, more, of_tables, closed(3), closed(4), closed([3]), closed({1: 2}), closed({1: 3}), closed(halved), Scored(),
    Scored(4), Judge(0.5), Judge(1.5), functools.partial(plain, 1), functools.partial(plain, 2), Scored().__call__,
    Scored(5).__call__, *pair, closed(torch.tensor([1.0])), closed(torch.tensor([2.0])), closed(max), closed({3, 4}),
]  # fmt: skip


def test_other_words_for_others() -> None:
    told = list(map(described, calls))
    assert len(set(told)) == len(told)
    assert not any("0x" in words for words in told)
    assert described(closed(3)) == described(closed(3))
    assert "return 1.0" not in described(pair[0])
    assert described(pair[0]).startswith("lambda prompt, text: 1.0")


def test_lambdas_of_one_line_without_positions() -> None:
    """As Python 3.12 compiles those that return a constant, and all of them under -X no_debug_ranges."""
    bare = [FunctionType(f.__code__.replace(co_linetable=b""), f.__globals__) for f in pair]
    assert not any(None not in p for f in bare for p in f.__code__.co_positions())
    told = list(map(described, bare))
    assert len(set(told)) == 2
    assert all("1.0" in words and "2.0" in words for words in told)


def test_what_a_function_names_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = described(of_tables)
    monkeypatch.setitem(WANTED, "7 + 8", "16")
    other = described(of_tables)
    assert other != before
    monkeypatch.setitem(globals(), "halved", plain)
    assert described(of_tables) not in (other, before)


SOURCE = '''
import itertools
EACH = {7, 8, 9, "a", "b", "c"}
class Kept:
    """Of no account."""
    def __init__(self): self.seen = []
    def __call__(self, prompt, text): self.seen.append(text); return 1.0
counter = itertools.count()
def inner(x): return inner(x - 1) if x else len(EACH)
def reward(prompt, text, *, scale=2.0):
    DOC
    return inner(len(text)) * scale   # REMARK
made = [reward, Kept(), lambda prompt, text: next(counter) + (lambda x: x)(1)]
'''


def test_the_same_in_every_process(tmp_path: Path) -> None:
    """Whatever the hashes of strings, comments, docstrings and layout are; and with recursion, state and iterators."""
    found = []
    for seed, doc, remark in (("1", '"""One."""', "one"), ("2", "pass", "two"), ("3", '"""Two\n\n    lines."""', "")):
        source = SOURCE.replace("DOC", doc).replace("REMARK", remark)
        source = source.replace("    pass\n", "")
        (tmp_path / "mine.py").write_text(source)
        code = "import mine; from pgcheck.fingerprint import described; mine.made[1](0, 1); print(*map(described, mine.made))"
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"},
        )  # fmt: skip
        found.append(ran.stdout)
    assert found[0] == found[1] == found[2]
    assert "return inner(len(text)) * scale" in found[0]


def test_without_a_source() -> None:
    """What was typed at a prompt is told by its constants and names."""
    texts = "lambda x: x + 1.5", "lambda x: x + 2.5", "lambda x: x.count(7)", "lambda x: x.index(7)"
    told = [described(eval(text)) for text in texts]
    assert len(set(told)) == 4
    assert described(eval("lambda x: x + 1.5")) == told[0]
