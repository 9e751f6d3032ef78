"""How much memory is free, and how much a model's passes take, so that what does not fit is refused before it is begun.

What a backward pass keeps is counted on one row and on two, as torch saves it, and is a straight line in the rows.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def free_memory(device: Any = "cpu") -> int:
    """Bytes that can be taken without swapping; all of the machine's where the system does not say. Of a GPU, its own."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 2**63 - 1


def kept_by(run: Callable[[], Tensor], *, besides: Iterable[Tensor] = ()) -> int:
    """Bytes that `run` keeps for a backward pass, and what it returns; `besides` (parameters) are there anyway."""
    import torch

    known = {x.untyped_storage().data_ptr() for x in besides}
    kept: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return sum(storage.nbytes() for storage in kept.values()) + out.untyped_storage().nbytes()


def in_bytes(size: float) -> str:
    """A number of bytes, for messages."""
    power = min(int(max(size, 1)).bit_length() - 1, 49) // 10
    return f"{size / 2 ** (10 * power):.3g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


@functools.cache
def keep_freed_memory() -> None:
    """Once a process: what is freed from here on is kept for what is asked for next, up to 64 MiB of it.

    glibc hands large blocks back to the system, and takes twice as large ones to be such after one of them was freed. A pass
    over a few megabytes takes as long again where every page of its result is a new one.
    """
    import torch

    torch.empty(4_000_000, dtype=torch.float64)
