"""What the operator's tests share: implementations, tolerances, inputs, a dense definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops import Cache, init_cache, native_hybrid_attention

# The same suite runs compiled on a GPU with `pytest -m gpu`.
IMPLEMENTATIONS = [
    pytest.param("reference", id="reference"),
    pytest.param("xla", id="xla"),
    pytest.param("pallas_triton_interpret", id="interpret"),
    pytest.param("reference", id="reference-gpu", marks=pytest.mark.gpu),
    pytest.param("xla", id="xla-gpu", marks=pytest.mark.gpu),
    pytest.param("pallas_triton", id="triton-gpu", marks=pytest.mark.gpu),
]
CHUNKWISE = [param for param in IMPLEMENTATIONS if param.values[0] != "reference"]
# Of the kernels' own tests.
KERNELS = [
    "pallas_triton_interpret",
    pytest.param("pallas_triton", marks=pytest.mark.gpu),
]


def quick(params: list, interpreted: bool = False) -> list:
    """The same; interpretation, which compiles slowly, in the wide sweep unless `interpreted`."""
    return [
        pytest.param(*param.values, id=param.id, marks=pytest.mark.wide)
        if param.id.startswith("interpret") and not interpreted
        else param
        for param in params
    ]


def with_dtypes(params: list, dtypes, interpreted=()) -> list:
    """Each implementation beside those of the dtypes that it takes.

    Interpretation runs in the quick suite in the dtypes `interpreted`.
    """
    result = []
    for param in params:
        (name,) = param.values
        for dtype in dtypes_of(name):
            if dtype in dtypes:
                one = [pytest.param(name, dtype, id=f"{param.id}-{dtype}", marks=param.marks)]
                result += quick(one, dtype in interpreted)
    return result


def dtypes_of(implementation: str) -> tuple[str, ...]:
    """Of the table of tolerances, those that an implementation takes; the most exact one first."""
    return tuple(TOLERANCES)[1:] if implementation == "pallas_triton" else tuple(TOLERANCES)


def exact_dtype(implementation: str) -> str:
    return dtypes_of(implementation)[0]


def tight(implementation: str) -> dict[str, float]:
    """Between two ways to compute one thing in the most exact dtype, element by element."""
    if exact_dtype(implementation) == "float64":
        return {"rtol": 1e-9, "atol": 1e-10}
    return {"rtol": 2e-4, "atol": 2e-5}


# Relative error in norm: output, each gradient (`docs/operator.md`, "Numbers").
TOLERANCES = {
    "float64": (1e-10, 1e-10),
    "float32": (2e-5, 1e-4),
    "float16": (2e-3, 5e-3),
    "bfloat16": (1e-2, 2e-2),
}
CACHE_INPUTS = ("slots_k", "slots_v", "window_k", "window_v", "pending_k", "pending_log_decay")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: shapes and static options."""

    window: int
    batch: int = 2
    length: int = 70
    num_heads: int = 4
    num_kv_heads: int = 2
    key_size: int = 12
    value_size: int = 20
    num_slots: int = 6
    slot_lag: int | None = None
    empty_slots: str = "mask"
    rope: bool = True
    scale: float | None = None

    @property
    def lag(self) -> int:
        return self.window if self.slot_lag is None else self.slot_lag

    def options(self, implementation: str | None) -> dict:
        return {
            "window": self.window,
            "slot_lag": self.slot_lag,
            "empty_slots": self.empty_slots,
            "scale": self.scale,
            "implementation": implementation,
        }

    def cache(self, dtype="float64", max_length: int | None = None) -> Cache:
        return init_cache(
            self.batch,
            num_kv_heads=self.num_kv_heads,
            key_size=self.key_size,
            value_size=self.value_size,
            num_slots=self.num_slots,
            window=self.window,
            slot_lag=self.slot_lag,
            max_length=max_length or max(self.window, 4 * self.length),
            dtype=dtype,
        )


def draw(case: Case, seed: int, gates="typical", dtype="float64") -> dict[str, jax.Array]:
    """Random inputs of a case, rounded to `dtype` already."""
    rng = np.random.default_rng(seed)
    b, t, g, m = case.batch, case.length, case.num_kv_heads, case.num_slots

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    wide = jnp.promote_types(dtype, jnp.float32)
    inputs = {
        "q": normal(b, t, case.num_heads, case.key_size),
        "k": normal(b, t, g, case.key_size),
        "v": normal(b, t, g, case.value_size),
    }
    if m:
        inputs["log_decay"] = jnp.asarray(draw_gates(rng, (b, t, g, m), gates), wide)
    if case.rope:
        angles = rng.uniform(0, 2 * np.pi, (1, t, case.key_size // 2))
        inputs["cos"], inputs["sin"] = (
            jnp.asarray(np.cos(angles), wide),
            jnp.asarray(np.sin(angles), wide),
        )
    return inputs


def draw_gates(rng: np.random.Generator, shape, kind) -> np.ndarray:
    """Log decays: "typical" of training, one number throughout, or ("mixed", lowest)."""
    if kind == "typical":
        return -np.log1p(np.exp(rng.normal(size=shape))) / 8
    if isinstance(kind, tuple):  # ("mixed", lowest): never forget, hardly, strongly, side by side
        choices = np.array([0.0, -1e-4, -0.1, kind[1] / 4, kind[1]])
        return rng.choice(choices, shape) * rng.uniform(0.9, 1.0, shape)
    return np.full(shape, float(kind))


def draw_segments(rng: np.random.Generator, batch: int, length: int, padded: bool) -> np.ndarray:
    """Documents of random lengths, ids that may repeat later, padding anywhere if `padded`."""
    ids = np.zeros((batch, length), np.int32)
    for row in ids:
        at = 0
        while at < length:
            size = int(rng.choice([1, 2, 3, 7, 20, 40]))
            row[at : at + size] = int(rng.integers(1, 4))
            at += size
    if padded:
        ids[rng.uniform(size=ids.shape) < 0.15] = 0
    return ids


def call(case: Case, implementation, inputs, *, segment_ids=None, cache=None, **options):
    """One call from the dict of `draw`."""
    rope = (inputs["cos"], inputs["sin"]) if "cos" in inputs else None
    return native_hybrid_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        inputs.get("log_decay"),
        rope=rope,
        segment_ids=segment_ids,
        cache=cache,
        **case.options(implementation),
        **options,
    )


def draw_cotangents(rng, case: Case, dtype) -> tuple[jax.Array, jax.Array]:
    """Of the output, in dtype, and of the slot mass, in at least float32."""
    shape = (case.batch, case.length, case.num_heads)
    out = jnp.asarray(rng.standard_normal((*shape, case.value_size)), dtype)
    return out, jnp.asarray(rng.standard_normal(shape), jnp.promote_types(dtype, jnp.float32))


def outputs_and_gradients(case: Case, implementation, inputs, cotangents, **options):
    """Output, slot mass, and the gradients by name of <out, cotangent> + <mass, mass cotangent>."""
    differentiable = {name: inputs[name] for name in ("q", "k", "v", "log_decay") if name in inputs}

    def run(x):
        return call(case, implementation, inputs | x, return_slot_mass=True, **options)

    outputs, pull_back = jax.vjp(run, differentiable)
    cotangents = tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True))
    return outputs, pull_back(cotangents)[0]


def relative_error(found, expected, floor: float = 0.0) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), floor, 1e-300))


def gradient_errors(found: dict, expected: dict, tolerance: float) -> dict[str, float]:
    """Each gradient by name; that of the gates against at least 1 % of that of the values.

    Those that are zero in exact arithmetic (a softmax over one key, or over slots that are all the
    same) are held against the values: nothing but the output's rounding is left of them.
    """
    assert found.keys() == expected.keys()
    values = expected["v"] if "v" in expected else expected["dv"]
    scale = np.linalg.norm(np.asarray(values, np.float64))

    def floor(name: str) -> float:
        size = np.linalg.norm(np.asarray(expected[name], np.float64))
        if size <= 1e-4 * scale:
            return float(np.clip(4 * tolerance**0.5, 1e-4, 0.5) * scale)
        return float(1e-2 * scale) if "log_decay" in name else 0.0

    return {name: relative_error(found[name], expected[name], floor(name)) for name in found}


def assert_gradients_close(found: dict, expected: dict, tolerance: float) -> None:
    for name, error in gradient_errors(found, expected, tolerance).items():
        assert error <= tolerance, f"gradient of {name}: {error:.2e} > {tolerance:.0e}"


# --- a dense statement of the definition: O(T^2 M), no recurrence, no chunks, float64 -------------


@functools.partial(jax.jit, static_argnums=0)
def dense(case: Case, inputs, segment_ids, initial=None):
    """Output [B,T,N,V] and slot mass [B,T,N] of a call without a cache, straight from the page.

    `initial` are slots (k [B,G,M,K], v [B,G,M,V]) before the first row, not empty.
    """
    b, t = inputs["q"].shape[:2]
    if segment_ids is None:
        segment_ids = jnp.ones((b, t), jnp.int32)
    row = functools.partial(_dense_row, case)
    tables = {name: jnp.broadcast_to(inputs[name], (b, *inputs[name].shape[1:])) for name in inputs}
    if initial is None:
        return jax.vmap(lambda x, ids: row(x, ids, None))(tables, segment_ids)
    return jax.vmap(row)(tables, segment_ids, initial)


def _dense_row(case: Case, x, ids, initial):
    t, heads = ids.shape[0], case.num_heads // case.num_kv_heads
    scale = case.key_size**-0.5 if case.scale is None else case.scale
    token = ids != 0
    rank = jnp.cumsum(token) - 1  # position among the row's tokens
    # The document of a token: how many changes of id came before it, padding skipped.
    last = jax.lax.associative_scan(lambda a, c: jnp.where(c != 0, c, a), ids)
    before = jnp.concatenate([jnp.full((1,), -1), last[:-1]])
    starts = token & ((ids != before) | (rank == 0))
    document = jnp.cumsum(starts)
    same = (document[:, None] == document) & token[:, None] & token
    age = rank[:, None] - rank
    in_window = same & (age >= 0) & (age < case.window)
    retired = same & (age >= case.lag)

    rotated_q, rotated_k = x["q"], x["k"]
    if case.rope:
        rotated_q, rotated_k = (_rotate(y, x["cos"], x["sin"]) for y in (x["q"], x["k"]))

    def grouped(y):
        return y.reshape(t, case.num_kv_heads, heads, -1)

    window_scores = scale * jnp.einsum("tgrk,jgk->tgrj", grouped(rotated_q), rotated_k)
    window_scores = jnp.where(in_window[:, None, None], window_scores, -jnp.inf)
    scores = window_scores
    if case.num_slots:
        # Token j's weight in slot m at time t: (1 - alpha_j) times the alphas of later retirements.
        log_alpha = x["log_decay"]  # [T,G,M]
        after = retired[:, None, :] & (rank[None, None, :] > rank[None, :, None])  # [t,j,i]
        decay = jnp.exp(jnp.einsum("tji,igm->tjgm", after.astype(log_alpha.dtype), log_alpha))
        weight = jnp.where(retired[..., None, None], decay * -jnp.expm1(log_alpha), 0)
        slots_k = jnp.einsum("tjgm,jgk->tgmk", weight, x["k"])
        slots_v = jnp.einsum("tjgm,jgv->tgmv", weight, x["v"])
        empty = ~retired.any(1)
        if initial is not None:
            kept = jnp.exp(jnp.einsum("ti,igm->tgm", retired.astype(log_alpha.dtype), log_alpha))
            slots_k += kept[..., None] * initial[0]
            slots_v += kept[..., None] * initial[1]
            empty = jnp.zeros_like(empty)
        slot_scores = scale * jnp.einsum("tgrk,tgmk->tgrm", grouped(x["q"]), slots_k)
        if case.empty_slots == "mask":
            slot_scores = jnp.where(empty[:, None, None, None], -jnp.inf, slot_scores)
        scores = jnp.concatenate([slot_scores, window_scores], -1)
    scores = jnp.where(token[:, None, None, None], scores, 0.0)  # padding: any finite value
    p = jax.nn.softmax(scores, axis=-1) * token[:, None, None, None]
    p_slots, p_window = p[..., : case.num_slots], p[..., case.num_slots :]
    out = jnp.einsum("tgrj,jgv->tgrv", p_window, x["v"])
    if case.num_slots:
        out += jnp.einsum("tgrm,tgmv->tgrv", p_slots, slots_v)
    return out.reshape(t, case.num_heads, -1), p_slots.sum(-1).reshape(t, case.num_heads)


def _rotate(x, cos, sin):
    half = x.shape[-1] // 2
    a, b, cos, sin = x[..., :half], x[..., half:], cos[:, None], sin[:, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
