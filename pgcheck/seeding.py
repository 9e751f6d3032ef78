"""Random state that belongs to others is given back as it was found."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def global_random_state() -> tuple[Any, ...]:
    """States of the global generators of Python, numpy and torch (CPU)."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_global_random_state(state: tuple[Any, ...]) -> None:
    """Set what `global_random_state` returned."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def same_random_state(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether nothing was drawn between the two."""
    numpy_same = all(np.array_equal(x, y) for x, y in zip(a[1], b[1], strict=True))
    return bool(a[0] == b[0] and numpy_same and torch.equal(a[2], b[2]))


@functools.cache
def fixed_random_state(seed: int) -> tuple[Any, ...]:
    """The state that `seed` gives, without touching the global generators or any device."""
    return (
        random.Random(seed).getstate(),
        np.random.RandomState(seed).get_state(),
        torch.Generator().manual_seed(seed).get_state(),
    )


@contextmanager
def random_state_kept() -> Iterator[tuple[Any, ...]]:
    """Whatever is drawn within, the global generators are afterwards as they were before: in the state that is given."""
    state = global_random_state()
    try:
        yield state
    finally:
        set_global_random_state(state)
