"""What is known of a number that depends on log-probabilities that are not known.

With n = B·T and d = logp − behavior_logp, which is known, a `Form` is one of two things:

* linear: Σ_(i,t) (p_it logp_it + q_it behavior_logp_it) + a number;
* a function of d: its value, and its derivatives by the d_it.

Forms are added up and multiplied by numbers. What is linear with p = −q is a function of d, and the tangent of such a function
is linear. Of functions of d there are products, exp, clamp, min and max.

Guarantee: a value is had only of functions of d; asking for any other raises `NotLinearError`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch


class NotLinearError(RuntimeError):
    """Something was asked of a log-probability that is not known."""


class Form:
    """Linear: Σ_k terms[k] x_k + number, with x = (logp, behavior_logp) of 2n entries. Or a function of d: number is its value,
    terms[k] its derivative by d_k. All forms of one call of a loss have the same list d `[n]`."""

    __slots__ = ("d", "known", "number", "terms")

    def __init__(self, d: list[float], number: float, terms: dict[int, float], known: bool) -> None:
        self.d, self.number, self.terms, self.known = d, number, terms, known

    def plus(self, other: Form | float, sign: float = 1.0) -> Form:
        """self + sign · other."""
        if not isinstance(other, Form):
            return Form(self.d, self.number + sign * other, self.terms, self.known)
        a, b = self, other
        if a.d is not b.d:
            raise NotLinearError
        if a.known != b.known:
            a, b = a.linear(), b.linear()
        terms = a.terms.copy()
        for k, c in b.terms.items():
            terms[k] = terms.get(k, 0.0) + sign * c
        return Form(a.d, a.number + sign * b.number, terms, a.known)

    def times(self, other: Form | float) -> Form:
        """A product; of two forms, where both are known."""
        if not isinstance(other, Form):
            return Form(self.d, self.number * other, {k: c * other for k, c in self.terms.items()}, self.known)
        a, b = self.of_d(), other.of_d()
        product = a.times(b.number).plus(b.times(a.number))
        product.number = a.number * b.number
        return product

    def over(self, number: float) -> Form:
        """Divided; by 0 only torch can."""
        if number == 0:
            raise NotLinearError
        return Form(self.d, self.number / number, {k: c / number for k, c in self.terms.items()}, self.known)

    def minus(self, other: Form | float) -> Form:
        return self.plus(other, -1.0)

    @staticmethod
    def total(several: Sequence[Form]) -> Form:
        """Their sum."""
        first = several[0]
        number, terms = 0.0, dict[int, float]()
        for x in several:
            if x.known is not first.known or x.d is not first.d:
                return functools.reduce(Form.plus, several)
            number += x.number
            for k, c in x.terms.items():
                terms[k] = terms.get(k, 0.0) + c
        return Form(first.d, number, terms, first.known)

    __add__ = plus  # of arrays of forms

    def of_d(self) -> Form:
        """The function of d that it is.

        Raises:
            NotLinearError: it is none.
        """
        if self.known:
            return self
        d, terms, n = self.d, self.terms, len(self.d)
        value, derivatives = self.number, {}
        for k, c in terms.items():
            if k < n:
                derivatives[k] = c
                value += c * d[k]
            if c != -terms.get(k + n if k < n else k - n, 0.0):
                raise NotLinearError
        return Form(self.d, value, derivatives, True)

    def linear(self) -> Form:
        """Of a function of d, its tangent."""
        if not self.known:
            return self
        d, n = self.d, len(self.d)
        number = self.number - sum(c * d[k] for k, c in self.terms.items())
        return Form(self.d, number, self.terms | {k + n: -c for k, c in self.terms.items()}, False)

    def detached(self) -> Form:
        """Without a gradient; logp = behavior_logp + d."""
        if self.known:
            return Form(self.d, self.number, {}, True)
        d, n = self.d, len(self.d)
        number, terms = self.number, dict[int, float]()
        for k, c in self.terms.items():
            number += c * d[k] if k < n else 0.0
            terms[k if k >= n else k + n] = terms.get(k if k >= n else k + n, 0.0) + c
        return Form(self.d, number, terms, False)

    def exp(self) -> Form:
        x = self.of_d()
        value = _exp(x.number)
        return Form(self.d, value, {k: c * value for k, c in x.terms.items()}, True)

    def clamped(self, low: float, high: float) -> Form:
        x = self.of_d()
        if low <= x.number <= high:
            return x
        if x.number != x.number:
            raise NotLinearError
        return Form(self.d, low if x.number < low else high, {}, True)

    def smaller(self, other: Form | float, sign: float = 1.0) -> Form:
        """The minimum; where both are the same, each has half of the gradient. With sign −1 the maximum."""
        a = self.of_d()
        b = other.of_d() if isinstance(other, Form) else Form(self.d, other, {}, True)
        gap = sign * (b.number - a.number)
        if gap != gap:
            raise NotLinearError
        return a if gap > 0 else b if gap < 0 else a.plus(b).times(0.5)

    def larger(self, other: Form | float) -> Form:
        return self.smaller(other, -1.0)


@functools.lru_cache(4096)
def _exp(x: float) -> float:
    """To the last digit as torch has it."""
    return torch.tensor(x, dtype=torch.float64).exp().item()
