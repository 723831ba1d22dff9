"""Random numbers by position: hashing and a permutation that is evaluated point by point.

Both are plain integer arithmetic, so a run resumed under another NumPy version still
visits the same rows.
"""

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 6


def mix64(values: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Hashes 64-bit integers to 64-bit integers, one to one (the finaliser of SplitMix64).

    Args:
      values: integers of any shape but the scalar's, whose overflow NumPy reports.

    Returns:
      uint64 of the same shape.
    """
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix_key(*parts: int) -> int:
    """One 64-bit key from integers, each taken modulo 2^64; their order matters."""
    key = 0
    for part in parts:
        key = int(mix64(np.array([key ^ (part % 2**64)], np.uint64))[0])
    return key


def permute(positions: Int64[np.ndarray, " n"], size: int, key: int) -> Int64[np.ndarray, " n"]:
    """Where a pseudo-random permutation of `range(size)` sends the positions.

    A Feistel network permutes the next power of four; a value that falls outside `range(size)` is
    sent through again until it is inside (at most four times on average).
    Constant time and memory per position, so any step of an epoch is reached at once.

    Args:
      positions: integers in `[0, size)`, shape `[n]`.
      size: length of the permuted range, at least 1.
      key: chooses the permutation.

    Returns:
      int64 `[n]` in `[0, size)`.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    bits, mask = np.uint64(half), np.uint64(2**half - 1)
    keys = mix64(np.arange(_ROUNDS, dtype=np.uint64) ^ np.uint64(mix_key(key)))
    values = positions.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> bits, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (mix64(right ^ round_key) & mask)
        values[outside] = (left << bits) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)
