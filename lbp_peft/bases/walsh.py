"""Walsh functions, and the order of two-dimensional ones.

The i-th Walsh function of order n is a vector of n signs with exactly i sign changes (its *sequency*, which
is to square waves what frequency is to sines). A two-dimensional basis (i, j) is the outer product of the i-th function
down the rows and the j-th along the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np


def is_power_of_two(n: int) -> bool:
    """Whether an integer is a power of two."""
    return n > 0 and n & (n - 1) == 0


@cache
def walsh_functions(order: int) -> np.ndarray:
    """The Walsh functions of an order, in sequency order.

    Args:
        order: Length and number of the functions, a power of two.

    Returns:
        Array of shape (order, order), float64, entries +-1; row i has i sign changes. Rows are orthogonal, each of
        squared norm `order`.

    Raises:
        ValueError: `order` is not a power of two.
    """
    if not is_power_of_two(order):
        raise ValueError(f"Walsh functions exist for orders that are powers of two, got {order}.")
    hadamard = np.ones((1, 1))
    while len(hadamard) < order:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    sign_changes = (np.diff(hadamard, axis=1) != 0).sum(axis=1)
    functions = hadamard[np.argsort(sign_changes)]
    functions.setflags(write=False)
    return functions


def basis_order(selection: str, rows: Sequence[int], columns: Sequence[int]) -> list[tuple[int, int]]:
    """The order of the two-dimensional bases that two sets of functions make; the first ones are kept.

    Args:
        selection: "lp_l1" orders by i + j (low-pass in the L1 norm), ties by i: (0,0) (0,1) (1,0) (0,2) (1,1) ...
            "lp_linf" orders by max(i, j), ties by i + j, then by i: (0,0) (0,1) (1,0) (1,1) (0,2) (2,0) ...
            The first n(n+1)/2 of the one and the first n**2 of the other are the paper's LP_L1-n and LP_Linf-n
            (arXiv 2309.15275, section 3).
        rows, columns: The sequencies i and j of the functions to pair.

    Returns:
        Pairs of positions in `rows` and `columns`.

    Raises:
        ValueError: the selection is unknown, or its order is not monotone: (a, b) has to come before (i, j) if a <= i
            and b <= j, and so the constant (0, 0) before all others.
    """
    if selection not in _KEYS:
        raise ValueError(f"Unknown selection {selection!r}, choose one of {', '.join(SELECTIONS)}.")
    key = _KEYS[selection]
    positions = [(a, b) for a in range(len(rows)) for b in range(len(columns))]
    order = sorted(positions, key=lambda pair: key(rows[pair[0]], columns[pair[1]]))
    rank = {pair: place for place, pair in enumerate(order)}
    for a, b in order:
        for before in ((a - 1, b), (a, b - 1)):
            if rank.get(before, -1) > rank[a, b]:
                raise ValueError(
                    f"The selection {selection!r} puts the Walsh function {rows[a], columns[b]} before "
                    f"{rows[before[0]], columns[before[1]]}, of lower sequency. Cropped functions are orthonormalised "
                    "in the order of their sequency, so a selection must keep lower ones first in both axes."
                )
    return order


_KEYS = {
    "lp_l1": lambda i, j: (i + j, i),
    "lp_linf": lambda i, j: (max(i, j), i + j, i),
}
SELECTIONS = tuple(_KEYS)
