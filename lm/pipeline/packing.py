"""Packing: which pairs share a row, planned from their lengths alone."""

from __future__ import annotations

import numpy as np

MAX_OPEN_ROWS = 128  # rows that may still take a pair; the oldest is closed for a new one


def first_fit(lengths: np.ndarray, capacity: tuple[int, int]) -> np.ndarray:
    """Assign each pair to the first open row with space for its inputs and targets.

    Pairs are assigned in a fixed random order, because neighbours in a corpus are alike and would
    make correlated rows.

    Args:
      lengths: int [pairs, 2], tokens of inputs and targets.
      capacity: columns of inputs and targets.

    Returns: the row of each pair, int64 [pairs]; no row is empty.
    Raises ValueError for a pair that is longer than a row.
    """
    too_long = np.flatnonzero((lengths > capacity).any(axis=1))
    if len(too_long):
        raise ValueError(
            f"pair {too_long[0]} of {tuple(map(int, lengths[too_long[0]]))} tokens is longer than "
            f"a row of {capacity}; use a longer data.input_length and data.target_length."
        )
    row_of = np.empty(len(lengths), np.int64)
    open_rows = np.zeros(MAX_OPEN_ROWS, np.int64)  # numbers of the open rows, the oldest first
    space = np.zeros((2, MAX_OPEN_ROWS), np.int64)  # free columns of their inputs and targets
    num_open = num_rows = 0
    order = np.random.default_rng(0).permutation(len(lengths))
    for pair, inputs, targets in zip(order.tolist(), *lengths[order].T.tolist(), strict=True):
        fits = (space[0] >= inputs) & (space[1] >= targets)
        slot = int(fits.argmax())
        if not fits[slot]:
            if num_open == MAX_OPEN_ROWS:
                open_rows[:-1], space[:, :-1] = open_rows[1:], space[:, 1:]
                num_open -= 1
            slot, num_open = num_open, num_open + 1
            open_rows[slot], space[0, slot], space[1, slot] = num_rows, *capacity
            num_rows += 1
        row_of[pair] = open_rows[slot]
        space[0, slot] -= inputs
        space[1, slot] -= targets
    return row_of
