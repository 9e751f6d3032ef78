"""Forms are what plain numbers say: values by `math`, derivatives by differences of those values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from pgcheck.estimators.forms import Form, NotLinearError

D = [0.3, -0.2, 0.05]
H = 1e-6

Value = Callable[[Sequence[float]], float]
Made = Callable[[Sequence[Form]], Form]

FUNCTIONS: dict[str, tuple[Made, Value]] = {
    "sum": (lambda x: x[0].times(2.0).plus(x[1]).minus(x[2]).plus(1.5), lambda d: 2 * d[0] + d[1] - d[2] + 1.5),
    "total": (lambda x: Form.total([x[0], x[1].exp(), x[2]]), lambda d: d[0] + math.exp(d[1]) + d[2]),
    "product": (lambda x: x[0].times(x[1]).times(x[2].exp()), lambda d: d[0] * d[1] * math.exp(d[2])),
    "quotient": (lambda x: x[0].exp().over(4.0), lambda d: math.exp(d[0]) / 4),
    "ratio of a row": (lambda x: Form.total(x).exp(), lambda d: math.exp(sum(d))),
    "clamped": (lambda x: x[0].clamped(-0.1, 0.1).plus(x[2].clamped(-0.1, 0.1)), lambda d: 0.1 + d[2]),
    "smaller": (lambda x: x[0].smaller(x[1]).plus(x[2].smaller(0.0)), lambda d: min(d[0], d[1]) + min(d[2], 0.0)),
    "larger": (lambda x: x[0].larger(x[1].exp()), lambda d: max(d[0], math.exp(d[1]))),
    "tangent": (lambda x: x[0].exp().linear().plus(x[1].times(3.0)), lambda d: math.exp(d[0]) + 3 * d[1]),
}  # fmt: skip


def leaves(name: str, d: list[float]) -> list[Form]:
    """logp or behavior_logp of every position."""
    first = len(d) if name == "behavior_logp" else 0
    return [Form(d, 0.0, {first + k: 1.0}, False) for k in range(len(d))]


def differences(d: list[float]) -> list[Form]:
    return [p.minus(q) for p, q in zip(leaves("logp", d), leaves("behavior_logp", d), strict=True)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_d(name: str) -> None:
    made, value = FUNCTIONS[name]
    form = made(differences(D)).of_d()
    assert math.isclose(form.number, value(D), rel_tol=1e-14)
    for k in range(len(D)):
        up, down = ([x + h * (i == k) for i, x in enumerate(D)] for h in (H, -H))
        slope = (value(up) - value(down)) / (2 * H)
        assert math.isclose(form.terms.get(k, 0.0), slope, rel_tol=1e-8, abs_tol=1e-8)


def test_half_of_the_gradient_where_both_are_the_same() -> None:
    x = differences(D)
    found = x[0].smaller(x[0].times(1.0).plus(x[1]).minus(x[1]))
    assert found.terms == {0: 1.0, 1: 0.0}
    assert x[0].smaller(D[0]).terms == {0: 0.5}


def test_detached_has_its_value_and_no_gradient() -> None:
    """π/π_old by hand: logp less itself, detached, is 0 with the gradient of logp."""
    for p, k in zip(leaves("logp", D), range(3), strict=True):
        gap = p.minus(p.detached()).of_d()
        assert gap.number == 0.0
        assert {i: c for i, c in gap.terms.items() if c} == {k: 1.0}
    assert differences(D)[0].exp().detached().terms == {}


def test_what_is_no_function_of_d_has_no_value() -> None:
    p, q = leaves("logp", D), leaves("behavior_logp", D)
    for form in (p[0], q[0], p[0].plus(q[0]), p[0].minus(q[1]), p[0].times(2.0).minus(q[0])):
        for ask in (form.of_d, form.exp, lambda form=form: form.clamped(-1.0, 1.0), lambda form=form: form.times(form)):
            with pytest.raises(NotLinearError):
                ask()
    with pytest.raises(NotLinearError):
        p[0].plus(leaves("logp", list(D))[0])  # of another call
    with pytest.raises(NotLinearError):
        p[0].over(0.0)
