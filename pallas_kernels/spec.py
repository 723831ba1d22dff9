"""What is static about one call of the kernels, and the arrays that they read.

Rows are the call's tokens, 0 <= r < T; keys are what rows may read, 0 <= j < S, the `past` ones of
a cache first: row r's own key is r + past. Row r retires key r + past - lag. Slots are cut into
chunks of keys, [origin + c C, origin + (c+1) C), which retire at rows [shift + c C,
shift + (c+1) C): one grid for the recurrence, whatever the lag.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Where a document began that goes on from a cache.
BEFORE = -(2**30)
_NARROW = 16


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static: sizes and options of one call."""

    rows: int  # T
    past: int  # keys before the first row's: the rows of a cache's ring
    num_heads: int  # N
    num_kv_heads: int  # G
    key_size: int  # K
    value_size: int  # V
    num_slots: int  # M; 0 where slots are never read
    window: int
    lag: int
    scale: float
    sink: bool  # empty slots are read as zeros; else they are masked
    rope: bool
    tables: bool  # documents, padding or a cache: what rows may read stands in arrays
    dtype: Any  # of q, k, v
    interpret: bool = False

    @property
    def wide(self):
        """Of accumulators, gates and softmax: float32, float64 for float64."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def is_exact(self) -> bool:
        """Whether operands of products are as wide as their sums, and not of 16 bits."""
        return self.dtype == self.wide

    @property
    def adjoint(self):
        """Of stored adjoint states; float16 lacks the range."""
        return jnp.dtype(jnp.float32) if self.dtype == jnp.float16 else self.dtype

    @property
    def log2_scale(self) -> float:
        """Of scores in base 2."""
        return self.scale / math.log(2)

    @property
    def group(self) -> int:
        """R, query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def is_narrow(self) -> bool:
        """Whether rows read few tokens beside the slots.

        Slots may be alike, and like the tokens that are in both: gradients are then what little is
        left of terms that cancel, less than what rounding leaves of an output or a product.
        """
        return self.window < _NARROW or (self.overlaps and 4 * self.window < self.num_slots)

    @property
    def overlaps(self) -> bool:
        """Whether rows read tokens through the window that the slots hold already."""
        return self.lag < self.window

    @property
    def keys(self) -> int:
        """S."""
        return self.past + self.rows

    @property
    def parts(self) -> int:
        """Rotation pairs element i with i + K/2: with it, keys and queries come in two halves."""
        return 2 if self.rope else 1

    @property
    def part_size(self) -> int:
        """Elements of a key or query in one part."""
        return self.key_size // self.parts

    @property
    def origin(self) -> int:
        """The first key that retires in this call."""
        return max(self.past - self.lag, 0)

    @property
    def shift(self) -> int:
        """The row at which key `origin` retires; T if that is after the call."""
        return min(self.lag - self.past, self.rows) if self.past < self.lag else 0

    def chunks(self, chunk: int) -> int:
        """Chunks of keys that retire in this call; at least one, so that arrays have entries."""
        return max(-(-(self.rows - self.shift) // chunk), 1)

    def row_blocks(self, block: int) -> tuple[int, int]:
        """Blocks of rows aligned with the chunks: how many, and how many of them before chunk 0."""
        before = -(-min(self.shift, self.rows) // block)
        after = max(-(-(self.rows - self.shift) // block), 0)
        return before + after, before

    def key_blocks(self, block: int) -> tuple[int, int]:
        """Blocks of keys aligned with the chunks: how many, and how many of them before chunk 0."""
        before = -(-self.origin // block)
        return before + -(-(self.keys - self.origin) // block), before


class Offset(NamedTuple):
    """Of the place of each token behind its index."""

    offset: jax.Array  # []


class Operands(NamedTuple):
    """Arrays of one call. Leading axes [1|B] are 1 where all rows of the batch agree."""

    q: Any  # [B,T,N,K]
    k: Any  # [B,S,G,K] keys of the window; those of the past are rotated already
    slot_k: Any  # [B,S,G,K] keys that retire, unrotated; None: the same as k
    v: Any  # [B,S,G,V]
    log_decay: Any  # [B,S,G,M]; None without slots
    slots_k: Any  # [B,G,M,K] wide, the slots before the first row; None: zero
    slots_v: Any  # [B,G,M,V]
    rotation: Any  # [1|B,T,K] of the rows: cosines, then sines; None without
    key_rotation: Any  # [1|B,S,K] of the keys; None: that of the rows
    # [1|B,T] where each row's token stands in q, k, v, log_decay, out; None: at r. An `Offset` in
    # bodies of `within`
    source: Any
    # With `Spec.tables`, else None:
    reach: Any  # [1|B,T] int32 how many tokens back the row's window reaches; -1 for padding
    start: Any  # [1|B,T] int32 key at which the row's document began, or BEFORE
    readable: Any  # [1|B,T] int32 whether the row may read the slots
    bounds: Any  # [1|B,2] int32: the first key that can retire, and how many rows are no padding


def rotary_table(rope: tuple[jax.Array, jax.Array], dtype: Any) -> jax.Array:
    """Cosines beside sines as the kernels read them, again for every block that is rotated.

    They are a third of what a kernel reads, so bfloat16 calls take them in float16: eight times as
    precise as the keys that they rotate are stored.
    """
    table = jnp.concatenate(jnp.broadcast_arrays(*rope), axis=-1)
    return table.astype(jnp.float16) if dtype == jnp.bfloat16 else table
