"""What only a GPU shows: repeatable bits, long sequences, arrays beyond 32-bit offsets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCES, Case, call, draw_segments

pytestmark = pytest.mark.gpu

LONG = Case(
    window=64,
    batch=1,
    length=131072,
    num_heads=32,
    num_kv_heads=8,
    key_size=128,
    value_size=128,
    num_slots=64,
)
NAMES = ("q", "k", "v", "log_decay")


@functools.partial(jax.jit, static_argnums=0)
def _draw(case: Case, seed):
    """On the device: these are gigabytes."""
    b, t, g = case.batch, case.length, case.num_kv_heads
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {
        "q": (b, t, case.num_heads, case.key_size),
        "k": (b, t, g, case.key_size),
        "v": (b, t, g, case.value_size),
    }
    x = {
        name: jax.random.normal(key, shape, jnp.bfloat16)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    gates = jax.random.normal(keys[3], (b, t, g, case.num_slots))
    x["log_decay"] = -jax.nn.softplus(gates) / 8
    frequencies = 10000.0 ** (-jnp.arange(case.key_size // 2) / (case.key_size // 2))
    angles = (jnp.arange(t) % 8192)[None, :, None] * frequencies
    return x | {"cos": jnp.cos(angles), "sin": jnp.sin(angles)}


def _chained(case: Case, inputs, length: int, cotangent=None):
    """By XLA in float32, in calls of `length` tokens chained through the cache."""
    piece = dataclasses.replace(case, length=length)

    def pieces(x):
        # [pieces, B, length, ...]; tables have a batch axis of 1
        y = x.reshape(x.shape[0], -1, length, *x.shape[2:])
        return jnp.moveaxis(y, 1, 0)

    @jax.checkpoint
    def step(cache, x):
        x = {name: y.astype(jnp.float32) for name, y in x.items()}
        out, cache = call(piece, "xla", x, cache=cache, return_cache=True)
        return cache, out.astype(inputs["q"].dtype)

    def run(x, ids):
        start = piece.cache("float32", max_length=case.window)
        _, out = jax.lax.scan(step, start, {name: pieces(y) for name, y in x.items()})
        return jnp.moveaxis(out, 0, 1).reshape(case.batch, case.length, case.num_heads, -1)

    return _with_gradients(run, inputs, cotangent)


def _with_gradients(run, inputs, cotangent, ids=None):
    if cotangent is None:
        return jax.jit(run)(inputs, ids)

    @jax.jit
    def both(inputs, cotangent, ids):
        x = {name: inputs[name] for name in NAMES}
        out, pull_back = jax.vjp(lambda x: run(inputs | x, ids), x)
        return out, pull_back(cotangent)[0]

    return both(inputs, cotangent, ids)


def _called(case: Case, inputs, cotangent=None, ids=None, implementation="pallas_triton"):
    """In one call; with a cotangent the gradients, too."""

    def run(x, ids):
        return call(case, implementation, x, segment_ids=ids)

    return _with_gradients(run, inputs, cotangent, ids)


@jax.jit
def _error(found, expected):
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.linalg.norm((found - expected).ravel()) / jnp.linalg.norm(expected.ravel())


def _assert_close(found, expected, dtype: str) -> None:
    """Outputs and gradients, to the dtype's tolerances."""
    (out, gradients), (expected_out, expected_gradients) = found, expected
    tolerance, gradient_tolerance = TOLERANCES[dtype]
    assert _error(out, expected_out) <= tolerance
    for name in NAMES:
        assert _error(gradients[name], expected_gradients[name]) <= gradient_tolerance, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("documents", [False, True])
def test_same_inputs_same_bits(dtype, documents):
    """Of a length at which the recurrence is split."""
    case = Case(
        window=64, batch=4, length=2500, num_heads=8, num_kv_heads=2, key_size=128,
        value_size=128, num_slots=64,
    )  # fmt: skip
    inputs = _draw(case, 1)
    inputs |= {name: inputs[name].astype(dtype) for name in ("q", "k", "v")}
    cotangent = inputs["q"][:, ::-1]
    ids = None
    if documents:
        ids = jnp.asarray(draw_segments(np.random.default_rng(2), 4, 2500, padded=True))
    first = jax.device_get(_called(case, inputs, cotangent, ids))
    for _ in range(3):
        again = jax.device_get(_called(case, inputs, cotangent, ids))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            assert a.tobytes() == b.tobytes()


def test_same_decode_steps_same_bits():
    case = dataclasses.replace(LONG, batch=16, length=1)
    inputs = _draw(case, 7)
    cache = case.cache("bfloat16", max_length=4096)

    @jax.jit
    def steps(inputs, cache):
        def step(cache, _):
            out, cache = call(case, "pallas_triton", inputs, cache=cache, return_cache=True)
            return cache, out

        return jax.lax.scan(step, cache, length=100)

    first, again = (jax.device_get(steps(inputs, cache)) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("documents", [False, True])
def test_8192_tokens_in_splits(documents):
    """One row: output and gradients against XLA in float32."""
    case = dataclasses.replace(LONG, length=8192)
    inputs, ids = _draw(case, 8), None
    cotangent = inputs["q"][:, ::-1]
    if documents:
        lengths = np.array([1, 2, 63, 64, 65, 3000, 700, 2200, 2097])
        ids = jnp.asarray(np.repeat(np.arange(1, 10, dtype=np.int32), lengths)[None])
    wide = {name: x.astype(jnp.float32) for name, x in inputs.items()}
    found = _called(case, inputs, cotangent, ids)
    expected = _called(case, wide, cotangent.astype(jnp.float32), ids, "xla")
    _assert_close(found, expected, "bfloat16")


def test_131072_tokens():
    """Output and gradients against XLA in chained calls of 8192 tokens."""
    inputs = _draw(LONG, 3)
    cotangent = inputs["q"][:, ::-1]
    found = _called(LONG, inputs, cotangent)
    _assert_close(found, _chained(LONG, inputs, 8192, cotangent), "bfloat16")


@pytest.mark.parametrize("window", [64, 0])
def test_xla_in_one_call(window):
    """16384 tokens, whose chunks XLA reads in groups, against chained calls of one group."""
    case = dataclasses.replace(LONG, length=16384, num_heads=8, num_kv_heads=2, window=window)
    inputs = {name: x.astype(jnp.float32) for name, x in _draw(case, 6).items()}
    cotangent = inputs["q"][:, ::-1]
    found = _called(case, inputs, cotangent, implementation="xla")
    _assert_close(found, _chained(case, inputs, 4096, cotangent), "float32")


def test_a_million_tokens():
    case = dataclasses.replace(LONG, length=2**20, num_heads=8, num_kv_heads=2)
    inputs = _draw(case, 4)
    out = _called(case, inputs)
    assert _error(out, _chained(case, inputs, 8192)) <= TOLERANCES["bfloat16"][0]


@pytest.mark.parametrize(
    ("batch", "heads"), [pytest.param(3, 8, id="rows"), pytest.param(1, 24, id="heads")]
)
def test_offsets_beyond_32_bits(batch, heads):
    """3 * 2^30 elements of q and out, forward and backward: the last third is a call alone."""
    case = dataclasses.replace(
        LONG,
        batch=batch,
        length=2**20,
        num_heads=heads,
        num_kv_heads=heads // 4,
        num_slots=16,
    )
    inputs = _draw(case, 5)
    out, gradients = _called(case, inputs, inputs["q"])

    def last(x):
        return x[-1:, :, -(x.shape[2] * 8 // heads) :] if x.ndim == 4 else x

    alone = {name: last(x) for name, x in inputs.items()}
    del inputs
    single = dataclasses.replace(case, batch=1, num_heads=8, num_kv_heads=2)
    expected, expected_gradients = _called(single, alone, alone["q"])
    assert float(jnp.abs(expected).max()) > 0
    # Not to the bit: how the recurrence is split depends on the number of rows and heads.
    found = last(out), {name: last(gradients[name]) for name in NAMES}
    _assert_close(found, (expected, expected_gradients), "bfloat16")
