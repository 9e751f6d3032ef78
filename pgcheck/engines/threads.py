"""One thread inside torch operations while an engine works.

The tensors of a block fit the cache, so handing half of them to a second thread costs more than it brings: the core suite
takes 10 s on one thread and, with another process on the second core, 36 to 70 s on two. Run several processes instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch uses one intra-operation thread; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
