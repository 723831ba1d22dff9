"""What is measured, and what each case is required to reach.

Letters (B, T, N, G, K, V, M, W) as in `docs/operator.md`; K = V throughout.
"""

import dataclasses
from typing import Literal

import numpy as np

# What a limit bounds. "At most" kinds first, "at least" kinds second.
AtMost = Literal["milliseconds", "times_peer", "times_case", "memory_ratio_times_case"]
AtLeast = Literal["speedup_over_peer", "slower_than_case", "copy_bandwidth"]
AT_LEAST: tuple[str, ...] = ("speedup_over_peer", "slower_than_case", "copy_bandwidth")

# Rooms of a cache beyond the context: every timed step adds a token.
DECODE_HEADROOM = 1024


@dataclasses.dataclass(frozen=True)
class Limit:
    """A bound on one figure of a case, for the forward pass and for forward + backward.

    Attributes:
      kind: which figure.
        "milliseconds": kernel time, ms. "times_peer": our time over the peer's. "times_case": our
        time over that of another case. "memory_ratio_times_case": our time over our memory floor,
        divided by the same ratio of another case. "speedup_over_peer": the peer's time over ours.
        "slower_than_case": our time over that of another case, which is to be the faster one.
        "copy_bandwidth": minimal bytes per second as a fraction of a device copy's.
      against: the peer or the case to compare with.
      forward: bound for the forward pass; None: no bound.
      both: bound for forward + backward; None: no bound.
      aim_forward: what we would like rather than require.
      aim_both: likewise.
    """

    kind: AtMost | AtLeast
    against: str = ""
    forward: float | None = None
    both: float | None = None
    aim_forward: float | None = None
    aim_both: float | None = None

    @property
    def at_least(self) -> bool:
        """Whether the figure has to reach the bound rather than to stay below it."""
        return self.kind in AT_LEAST

    def holds(self, figure: float, bound: float) -> bool:
        return figure >= bound if self.at_least else figure <= bound


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the operator. `log_decay` and rotary tables are float32.

    Attributes:
      name: what `--cases` calls it.
      batch: B.
      length: T; of a decode step the tokens already in the cache.
      num_heads: N.
      num_kv_heads: G.
      head_size: K = V.
      num_slots: M.
      window: W; None: everything (W >= T).
      documents: packed documents per row.
      dtype: of queries, keys and values.
      rope: whether rotary tables are passed.
      log_decay: of every gate; None: drawn, `logsigmoid(normal) / 8`.
      backward: whether forward + backward is measured too.
      decode: one token with a cache that is donated.
      implementation: "asked" (the command line's), "automatic" (None), or a name.
      peers: who else is measured at this shape.
      limit: what is required.
    """

    name: str
    batch: int
    length: int
    num_heads: int
    num_kv_heads: int
    head_size: int = 128
    num_slots: int = 64
    window: int | None = 64
    documents: int = 1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rope: bool = True
    log_decay: float | None = None
    backward: bool = True
    decode: bool = False
    implementation: str = "asked"
    peers: tuple[str, ...] = ()
    limit: Limit | None = None

    @property
    def is_full(self) -> bool:
        """Whether no token can leave the window, so that slots stay empty and need not be read."""
        return self.window is None or self.window >= self.length

    @property
    def static_window(self) -> int:
        """The operator's `window` argument."""
        if self.window is not None:
            return self.window
        # A decode step's cache is bounded by max_length; larger windows mean "everything".
        return self.max_length + 1 if self.decode else self.length

    @property
    def max_length(self) -> int:
        """Tokens a decode step's cache has room for."""
        return self.length + DECODE_HEADROOM

    @property
    def document_lengths(self) -> tuple[int, ...]:
        """Tokens of each document of a row: drawn once, so not multiples of any block."""
        if self.documents == 1:
            return (self.length,)
        random = np.random.default_rng(self.documents)
        cuts = np.sort(random.choice(self.length - 1, self.documents - 1, replace=False)) + 1
        edges = np.concatenate([[0], cuts, [self.length]])
        return tuple(int(length) for length in np.diff(edges))


_CAUSAL = ("cudnn_causal", "cudnn_causal_rope")
_WINDOWED = ("cudnn_window", "cudnn_window_rope")
_ALL_PEERS = (*_CAUSAL, *_WINDOWED, "fla_gsa", "jla_gla")

_T2048 = Case(
    "b8_t2048",
    batch=8,
    length=2048,
    num_heads=8,
    num_kv_heads=8,
    peers=_ALL_PEERS,
    limit=Limit("milliseconds", forward=0.24, both=1.1, aim_forward=0.13, aim_both=0.70),
)
_T8192 = Case(
    "t8192",
    batch=1,
    length=8192,
    num_heads=32,
    num_kv_heads=8,
    peers=_ALL_PEERS,
    limit=Limit("milliseconds", forward=0.5, both=2.4, aim_forward=0.25, aim_both=1.3),
)
_T32768 = dataclasses.replace(
    _T8192,
    name="t32768",
    length=32768,
    peers=(*_CAUSAL, *_WINDOWED, "jla_gla"),
    limit=Limit("speedup_over_peer", "cudnn_causal", 8.0, 6.0, aim_forward=15.0, aim_both=10.0),
)
_T131072 = dataclasses.replace(
    _T8192,
    name="t131072",
    length=131072,
    backward=False,
    peers=("cudnn_causal", *_WINDOWED),
    limit=Limit("milliseconds", forward=6.5, aim_forward=3.5),
)
_K64 = Case(
    "k64",
    batch=16,
    length=4096,
    num_heads=16,
    num_kv_heads=16,
    head_size=64,
    peers=("cudnn_causal", "cudnn_window"),
    limit=Limit("memory_ratio_times_case", "b8_t2048", 1.5, 1.5, aim_forward=1.0, aim_both=1.0),
)
_K256 = Case(
    "k256",
    batch=8,
    length=2048,
    num_heads=4,
    num_kv_heads=4,
    head_size=256,
    peers=("cudnn_causal", "cudnn_window"),
    limit=Limit("memory_ratio_times_case", "b8_t2048", 1.5, 2.5, aim_forward=1.0, aim_both=1.0),
)
_W1024 = dataclasses.replace(
    _T32768,
    name="w1024",
    window=1024,
    peers=_WINDOWED,
    limit=Limit("times_peer", "cudnn_window", 3.0, 2.5, aim_forward=2.0, aim_both=1.7),
)
_FULL = dataclasses.replace(
    _T8192,
    name="full",
    window=None,
    implementation="automatic",
    peers=_CAUSAL,
    limit=Limit("times_peer", "cudnn_causal_rope", 1.05, 1.05, aim_forward=1.0, aim_both=1.0),
)
_PACKED = dataclasses.replace(
    _T8192,
    name="packed16",
    documents=16,
    peers=(),
    limit=Limit("times_case", "t8192", 1.15, 1.15, aim_forward=1.0, aim_both=1.0),
)
# A full layer of a hybrid model that trains on packed documents, which cuDNN does not take.
_FULL_PACKED = dataclasses.replace(
    _FULL, name="full_packed16", documents=16, implementation="asked", peers=(), limit=None
)
# Slots alone, a linear RNN: the operator of the peer that PyTorch runs.
_W0 = dataclasses.replace(_T2048, name="w0", window=0, peers=("fla_gsa", "jla_gla"), limit=None)
# What gates cost that forget within a few tokens, in every chunk.
_STRONG = dataclasses.replace(_T2048, name="strong", log_decay=-2.0, peers=(), limit=None)
# Exact products, and twice the bytes.
_FLOAT32 = tuple(
    dataclasses.replace(case, name=f"float32_{case.name}", dtype="float32", peers=(), limit=None)
    for case in (
        _T2048,
        _T8192,
        _K64,
        _K256,
        dataclasses.replace(_T8192, name="t8192_w1024", window=1024),
    )
)
_DECODE_W64 = Case(
    "decode_w64",
    batch=64,
    length=4096,
    num_heads=32,
    num_kv_heads=8,
    backward=False,
    decode=True,
    limit=Limit("copy_bandwidth", forward=0.5, aim_forward=0.8),
)
_DECODE_FULL = tuple(
    dataclasses.replace(
        _DECODE_W64,
        name=f"decode_full_b{batch}",
        batch=batch,
        length=131072,
        # As a layer of full attention has it. A step loads slots that there are, empty or not.
        num_slots=0,
        window=None,
        limit=Limit("copy_bandwidth", forward=0.5, aim_forward=0.85),
    )
    for batch in (1, 3)
)
_XLA = tuple(
    dataclasses.replace(
        case,
        name=f"xla_{case.name}",
        implementation="xla",
        peers=(),
        limit=Limit("slower_than_case", case.name, 3.0, 3.0),
    )
    for case in (_T2048, _T8192, _T32768)
)
_XLA_FLOAT32 = tuple(
    dataclasses.replace(case, name=f"xla_{case.name}", implementation="xla") for case in _FLOAT32
)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _T2048,
        _T8192,
        _T32768,
        _T131072,
        _K64,
        _K256,
        _W1024,
        _FULL,
        _PACKED,
        _FULL_PACKED,
        _W0,
        _STRONG,
        *_FLOAT32,
        _DECODE_W64,
        *_DECODE_FULL,
        *_XLA,
        *_XLA_FLOAT32,
    )
}
