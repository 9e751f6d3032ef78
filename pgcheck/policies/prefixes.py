"""Prefixes that rows of tokens share, read once: rows of a block become one text with branches.

    rows      1 4 2      block    1 4 2 7 5        a token attends to what is on its own way, at the position it has there
              1 4 7               0 1 2 2 1        (position)
              1 5

Guarantee: every token of every row has its place; a token sees itself and the tokens before it in its row, and no other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_TOKENS = 1024  # of rows, below which little is saved
MOST_PAIRS = 2.0  # attention goes over the square of a block's tokens: so many times that of its rows, or rows are read
_SHARE = 0.75  # of the tokens: where more than this remains, rows are read as they are
_BLOCK = 128  # tokens of the rows of a block


@dataclass(frozen=True)
class Branching:
    """Rows `[n, L]` as m texts of U tokens."""

    tokens: Tensor  # [m, U]
    position: Tensor  # [m, U]
    attend: Tensor  # [m, U, U] bool
    place: Tensor  # [n, L], of each token of a row among the m·U; of padding, that of the token before it


def branching(
    tokens: Tensor, length: Tensor, *, least: int = LEAST_TOKENS, most_pairs: float = MOST_PAIRS
) -> Branching | None:
    """The rows with their shared prefixes once; None where that saves little. `length` `[n]`: real tokens of each."""
    n, L = tokens.shape
    if n * L < least:
        return None
    device, most = tokens.device, int(tokens.max()) + 1
    block = torch.arange(n, device=device) // max(1, _BLOCK // L)
    at, nodes, found = block, int(block[-1]) + 1, []  # at: the node before, at first one for each block
    for t in range(L):
        own, back = torch.unique(at * most + tokens[:, t], return_inverse=True)
        at = torch.where(t < length, nodes + back, at)
        nodes += len(own)
        found.append(at)
    node = torch.stack(found, 1)  # [n, L]
    kept, node = torch.unique(node, return_inverse=True)
    if len(kept) > _SHARE * int(length.sum()):
        return None
    m, U = int(block[-1]) + 1, len(kept)
    of = torch.empty(U, dtype=torch.int64, device=device)
    text, position = torch.empty_like(of), torch.empty_like(of)
    real = torch.arange(L, device=device) < length.unsqueeze(1)
    of[node[real]] = block.unsqueeze(1).expand(n, L)[real]
    text[node[real]], position[node[real]] = tokens[real], torch.arange(L, device=device).expand(n, L)[real]
    order = of.argsort(stable=True)
    begins = torch.searchsorted(of[order], torch.arange(m, device=device))
    slot = torch.empty_like(of)
    slot[order] = torch.arange(U, device=device) - begins[of[order]]
    most = int(slot.max()) + 1
    if m * most**2 > most_pairs * n * L**2:
        return None
    out = torch.zeros(2, m, most, dtype=torch.int64, device=device)
    out[0, of, slot], out[1, of, slot] = text, position
    attend = torch.eye(most, dtype=torch.bool, device=device).repeat(m, 1, 1)
    for before in range(L):
        later = node[:, before:]
        attend[block.unsqueeze(1), slot[later], slot[node[:, before : before + 1]]] = True
    return Branching(out[0], out[1], attend, of[node] * most + slot[node])
