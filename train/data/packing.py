"""Packing: which pieces of which documents share a row.

A document of at most `context` tokens is one piece; a longer one is cut into consecutive
pieces of `context` tokens and a rest. Pieces of full length have a row of their own, the
others are packed best-fit decreasing: longest first, each into the fullest row that still has
room. Lengths are small integers, so this works on the histogram of lengths and costs nothing
per document; documents are then dealt to the patterns of lengths with array operations.
"""

import dataclasses
import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt32

from train.data.manifest import DataError
from train.data.permutation import mix64, mix_key

# Raise it when the same arguments would give another plan: stored plans are told apart by it.
PLAN_VERSION = 1
_MAGIC = 0x4E484131
_HEADER = 4


@dataclasses.dataclass(frozen=True, eq=False)
class RowPlan:
    """Rows of pieces. Row `r` holds the entries `starts[r] : starts[r + 1]` of the other two.

    Attributes:
      starts: `[rows + 1]`.
      documents: index of the piece's document, `[pieces]`.
      pieces: number of the piece within its document: its tokens begin at `piece * context`.
    """

    starts: UInt32[np.ndarray, " rows_plus_1"]
    documents: UInt32[np.ndarray, " pieces"]
    pieces: UInt32[np.ndarray, " pieces"]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    @property
    def num_pieces(self) -> int:
        """Number of pieces in all rows."""
        return len(self.documents)


def plan_rows(lengths: UInt32[np.ndarray, " documents"], context: int, key: int) -> RowPlan:
    """Plans the rows of a split.

    Args:
      lengths: tokens per document, each at least 1.
      context: positions per row, at least 2.
      key: which of the equally long pieces go together; the same arguments give the same plan.

    Raises:
      DataError: `context` is too small, or there are more pieces than a plan can count.
    """
    if context < 2:
        raise DataError(f"data: context={context} is too small: a target needs a token before it")
    full, rest = np.divmod(lengths, np.uint32(context))
    num_pieces = int(full.sum(dtype=np.int64)) + int(np.count_nonzero(rest))
    if num_pieces >= 2**32:
        raise DataError(f"data: {num_pieces:,} pieces of context={context} are too many to plan")

    full_documents = np.repeat(np.arange(len(lengths), dtype=np.uint32), full)
    first_of_document = np.cumsum(full, dtype=np.int64) - full
    full_pieces = np.arange(len(full_documents)) - first_of_document[full_documents]

    rest_documents = np.flatnonzero(rest).astype(np.uint32)
    rest_lengths = rest[rest_documents]
    # Shuffled within each length, so that neighbours in the input do not share rows.
    shuffle = mix64(np.arange(len(rest_documents), dtype=np.uint64) ^ np.uint64(mix_key(key)))
    rest_documents = rest_documents[np.lexsort((shuffle, rest_lengths))]
    histogram = np.bincount(rest_lengths, minlength=context)
    row_sizes, packed = _deal(best_fit_decreasing(histogram, context), histogram, rest_documents)

    sizes = np.concatenate((np.ones(len(full_documents), np.int64), row_sizes))
    return RowPlan(
        starts=np.concatenate(([0], np.cumsum(sizes))).astype(np.uint32),
        documents=np.concatenate((full_documents, packed)),
        pieces=np.concatenate((full_pieces, full[packed])).astype(np.uint32),
    )


def best_fit_decreasing(
    histogram: Int64[np.ndarray, " lengths"], capacity: int
) -> list[tuple[list[int], int]]:
    """Packs pieces given how many there are of each length.

    Args:
      histogram: number of pieces by length, `[lengths]` with `lengths <= capacity + 1`.
      capacity: room of a row.

    Returns:
      Patterns `(lengths of the pieces in a row, number of such rows)`.
    """
    # Open rows by the room they have left: groups (number of rows, pattern), where a pattern is
    # a chain (pattern before, length, how many of it). A bit set finds the least room that fits.
    groups: list[list[tuple[int, tuple | None]]] = [[] for _ in range(capacity + 1)]
    rooms = 0

    def put(room: int, count: int, pattern: tuple | None) -> None:
        nonlocal rooms
        if count:
            groups[room].append((count, pattern))
            rooms |= 1 << room

    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                count, pattern = groups[room].pop()
                if not groups[room]:
                    rooms ^= 1 << room
            else:
                room, count, pattern = capacity, left, None
            # The row just filled is the fullest with room, so it is filled as far as it goes.
            per_row = room // length
            filled = min(count, left // per_row)
            put(room - per_row * length, filled, (pattern, length, per_row))
            left -= filled * per_row
            count -= filled
            if left and count:
                put(room - left * length, 1, (pattern, length, left))
                left, count = 0, count - 1
            if pattern is not None:
                put(room, count, pattern)

    def unchain(pattern: tuple | None) -> list[int]:
        lengths: list[int] = []
        while pattern is not None:
            pattern, length, count = pattern
            lengths = [length] * count + lengths
        return lengths

    return [(unchain(pattern), count) for room in groups for count, pattern in room]


def _deal(
    patterns: list[tuple[list[int], int]],
    histogram: Int64[np.ndarray, " lengths"],
    documents: UInt32[np.ndarray, " n"],
) -> tuple[Int64[np.ndarray, " rows"], UInt32[np.ndarray, " n"]]:
    """Deals documents, sorted by length, to patterns: pieces per row, and the rows end to end."""
    next_of_length = (np.cumsum(histogram) - histogram).tolist()
    sizes, dealt = [np.empty(0, np.int64)], [np.empty(0, np.uint32)]
    for lengths, count in patterns:
        columns = []
        for length in lengths:
            start = next_of_length[length]
            next_of_length[length] = start + count
            columns.append(documents[start : start + count])
        sizes.append(np.full(count, len(lengths), np.int64))
        dealt.append(np.stack(columns, axis=1).ravel())
    return np.concatenate(sizes), np.concatenate(dealt)


def save_plan(path: Path, plan: RowPlan) -> None:
    """Writes a plan atomically as one `.npy` file of uint32: header, then the three arrays.

    Raises:
      OSError: the folder cannot be written.
    """
    body = np.concatenate((plan.starts, plan.documents, plan.pieces))
    header = np.array([_MAGIC, zlib.crc32(body.data), plan.num_rows, plan.num_pieces], np.uint32)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, np.concatenate((header, body)))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_plan(path: Path, *, check: bool = True) -> RowPlan | None:
    """Maps a stored plan into memory; None when there is none or it is damaged.

    Args:
      path: the file.
      check: read it all and compare its checksum.
    """
    try:
        table = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    if table.dtype != np.uint32 or table.ndim != 1 or len(table) < _HEADER:
        return None
    magic, checksum, rows, pieces = (int(value) for value in table[:_HEADER])
    body = table[_HEADER:]
    if magic != _MAGIC or len(body) != rows + 1 + 2 * pieces:
        return None
    if check and zlib.crc32(np.ascontiguousarray(body).data) != checksum:
        return None
    starts, documents, last = np.split(body, (rows + 1, rows + 1 + pieces))
    return RowPlan(starts, documents, last)
