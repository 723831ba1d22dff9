"""Pieces behind a cache, through cuDNN: here with exact softmaxes in its place, on a GPU itself."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCES, Case, call, draw, relative_error
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nha_jax.ops import api, cudnn, cudnn_pieces, init_cache
from nha_jax.ops.cache import HEAD_AXES

WHOLE = 10**6  # a window over any text
CASE = Case(window=WHOLE, batch=3, length=24)
ROOM = 80
LENGTHS = (0, 7, 24)  # of the rows, before the first piece
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def _softmax(q, k, v, lengths, *, scale):
    """What `cudnn_pieces.softmax` does, in the dtype at hand."""
    (b, t, n, _), s = q.shape, k.shape[1]
    scores = scale * jnp.einsum("btgrk,bsgk->btgrs", q.reshape(b, t, k.shape[2], -1, q.shape[3]), k)
    if lengths is None:
        seen = jnp.tril(jnp.ones((1, t, s), bool))
    else:
        seen = jnp.arange(s) < jnp.maximum(lengths, 1)[:, None, None]
    scores = jnp.where(seen[:, :, None, None], scores, -jnp.inf)
    out = jnp.einsum("btgrs,bsgv->btgrv", jax.nn.softmax(scores), v)
    return out.reshape(b, t, n, -1), jax.nn.logsumexp(scores, -1).reshape(b, t, n)


@pytest.fixture
def replaced(monkeypatch):
    """The path to cuDNN on any device, in any dtype and for short pieces."""
    monkeypatch.setattr(cudnn_pieces, "softmax", _softmax)
    serves_all = api.IMPLEMENTATIONS["cudnn"]._replace(refusals=lambda call: [])
    monkeypatch.setitem(api.IMPLEMENTATIONS, "cudnn", serves_all)


@pytest.fixture
def exact(replaced, x64):
    """The same in float64."""


def _filled(case: Case, lengths=LENGTHS, dtype="float64", room=ROOM, implementation="xla"):
    """A cache after rows of these lengths."""
    first = dataclasses.replace(case, length=max(lengths))
    ids = (jnp.arange(first.length) < jnp.asarray(lengths)[:, None]).astype(jnp.int32)
    cache = case.cache(dtype, max_length=room)
    inputs = draw(first, seed=1, dtype=dtype)

    @jax.jit
    def fill(inputs, cache):
        return call(first, implementation, inputs, segment_ids=ids, cache=cache, return_cache=True)[
            1
        ]

    return fill(inputs, cache)


def _piece(case: Case, implementation, inputs, cache):
    @jax.jit
    def run(inputs, cache):
        return call(
            case, implementation, inputs, cache=cache, return_cache=True, return_slot_mass=True
        )

    return run(inputs, cache)


CASES = {
    "slots": CASE,
    "no slots": dataclasses.replace(CASE, num_slots=0),
    "no rope": dataclasses.replace(CASE, rope=False, scale=0.7),
    "one key head": dataclasses.replace(CASE, num_kv_heads=1, num_slots=0),
}


@pytest.mark.parametrize("name", CASES)
def test_pieces_are_read_as_the_definition_says(name, exact):
    """Rows of different lengths, one of them empty; then a second piece."""
    case = CASES[name]
    found = expected = _filled(case)
    assert found.length.tolist() == list(LENGTHS)
    for seed in (2, 3):
        inputs = draw(case, seed)
        *outputs, found = _piece(case, "cudnn", inputs, found)
        *wanted, expected = _piece(case, "reference", inputs, expected)
        chex.assert_trees_all_close(outputs, wanted, **EXACT)
        chex.assert_trees_all_close(found, expected, **EXACT)


def test_slots_that_were_given_are_read(exact):
    """In the rows whose slots are not empty."""
    rng = np.random.default_rng(5)
    cache = _filled(CASE)
    cache = cache.replace(
        slots_k=jnp.asarray(rng.standard_normal(cache.slots_k.shape)),
        slots_v=jnp.asarray(rng.standard_normal(cache.slots_v.shape)),
        slots_empty=jnp.asarray([False, True, False]),
    )
    found, expected = (_piece(CASE, name, draw(CASE, 2), cache) for name in ("cudnn", "reference"))
    chex.assert_trees_all_close(found, expected, **EXACT)
    mass = np.asarray(found[1])
    assert (mass[[0, 2]] > 0).all() and (mass[1] == 0).all()


def test_earlier_documents_are_not_read(exact):
    """They lie in the same ring, which the second piece finds gone round."""
    first = dataclasses.replace(CASE, length=80)
    ids = np.ones((3, 80), np.int32)
    ids[0, 70:], ids[1, 40:] = 2, 2
    ids[2, 10:60], ids[2, 60:] = 2, 3
    ids = jnp.asarray(ids)
    inputs, cache = draw(first, 1), CASE.cache(max_length=88)
    _, cache = call(first, "xla", inputs, segment_ids=ids, cache=cache, return_cache=True)
    assert cache.segment_length.tolist() == [10, 40, 20]
    found = expected = cache
    for seed in (2, 3):
        inputs = draw(CASE, seed)
        *outputs, found = _piece(CASE, "cudnn", inputs, found)
        *wanted, expected = _piece(CASE, "reference", inputs, expected)
        chex.assert_trees_all_close(outputs, wanted, **EXACT)
        chex.assert_trees_all_close(found, expected, **EXACT)


def test_nothing_leaks_from_an_empty_row(exact):
    cache = _filled(CASE)
    cache = cache.replace(
        window_k=cache.window_k.at[0].set(jnp.nan), window_v=cache.window_v.at[0].set(jnp.nan)
    )
    inputs = draw(CASE, 2)
    out, *_ = _piece(CASE, "cudnn", inputs, cache)
    alone = call(CASE, "reference", inputs)
    np.testing.assert_allclose(out[0], alone[0], **EXACT)


def _loss(case, implementation):
    floating = ("slots_k", "slots_v", "window_k", "window_v")

    def loss(x, leaves, cache):
        cache = cache.replace(**leaves)
        out, mass, cache = call(
            case, implementation, x, cache=cache, return_cache=True, return_slot_mass=True
        )
        return (out * jnp.cos(out)).sum() + (mass * mass).sum() + (cache.window_k**2).sum()

    return loss, lambda cache: {name: getattr(cache, name) for name in floating}


def test_gradients_are_those_of_the_next_implementation(exact):
    """Of all inputs, the tables of the rotation and the cache included; with rematerialisation."""
    cache = _filled(CASE).replace(slots_empty=jnp.asarray([False, True, False]))
    x = draw(CASE, 2)
    results = {}
    for name in ("cudnn", "xla"):
        loss, leaves = _loss(CASE, name)
        run = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1)))
        results[name] = run(x, leaves(cache), cache)
        # Only some of the inputs.
        part = jax.jit(jax.grad(lambda q, loss=loss: loss({**x, "q": q}, {}, cache)))(x["q"])
        np.testing.assert_allclose(part, results[name][0]["q"], **EXACT)
    chex.assert_trees_all_close(results["cudnn"], results["xla"], **EXACT)
    assert float(abs(results["cudnn"][1]["window_k"][1]).max()) > 0


def test_pieces_under_vmap(exact):
    """Over queries and cache, and over queries alone."""
    case = dataclasses.replace(CASE, num_slots=0)
    caches = [_filled(case, lengths) for lengths in (LENGTHS, (3, 0, 11))]
    inputs = [draw(case, seed) for seed in (2, 3)]

    def run(x, cache):
        return call(case, "cudnn", x, cache=cache)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
    both = jax.jit(jax.vmap(run))(stacked, jax.tree.map(lambda *x: jnp.stack(x), *caches))
    alone = jax.jit(jax.vmap(lambda x: run(x, caches[0])))(stacked)
    for i, x in enumerate(inputs):
        np.testing.assert_allclose(both[i], run(x, caches[i]), **EXACT)
        np.testing.assert_allclose(alone[i], run(x, caches[0]), **EXACT)


def test_pieces_on_a_mesh(replaced):
    """Each device reads its own rows and heads, with the lengths of those rows."""
    if len(jax.devices()) < 8:
        pytest.skip("needs eight (simulated) devices")
    case = dataclasses.replace(CASE, batch=4)
    cache, inputs = _filled(case, (0, 7, 24, 3), "float32"), draw(case, 2, dtype="float32")
    expected = _piece(case, "xla", inputs, cache)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(x, heads):
        """Along the batch, and the heads if there are any."""
        spec = ["data" if x.shape[0] > 1 else None, *[None] * (x.ndim - 1)]
        if heads is not None:
            spec[heads] = "tensor"
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    inputs = {name: place(x, 2 if x.ndim == 4 else None) for name, x in inputs.items()}
    names = [field.name for field in dataclasses.fields(cache)]
    leaves = {name: getattr(cache, name) for name in names}
    leaves = {name: x for name, x in leaves.items() if isinstance(x, jax.Array) and x.size}
    cache = cache.replace(**{name: place(x, HEAD_AXES.get(name)) for name, x in leaves.items()})

    @jax.jit
    def run(inputs, cache):
        return call(case, "cudnn", inputs, cache=cache, return_cache=True, return_slot_mass=True)

    compiled = run.lower(inputs, cache).compile()
    assert "all-to-all" not in compiled.as_text()
    assert "all-gather" not in compiled.as_text()
    chex.assert_trees_all_close(compiled(inputs, cache), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "room", "reason"),
    [
        ({"length": 24}, 200, "T=24 after a cache: it takes pieces of at least 128 tokens"),
        ({"window": 300}, 300, "window=300 does not exceed the cache's max_length=300"),
        ({"slot_lag": 250}, 300, "slot_lag=250 is less than the cache's max_length=300"),
        ({"window": 300, "num_slots": 0}, 300, "window=300 does not exceed"),
        ({"slot_lag": 250, "num_slots": 0}, 300, None),
        ({}, 300, None),
    ],
)
def test_what_is_refused_after_a_cache(changes, room, reason, monkeypatch):
    monkeypatch.setattr(cudnn, "nvidia_compute_capability", lambda: 9.0)
    monkeypatch.setattr(cudnn_pieces, "softmax", _softmax)
    case = Case(**{"window": WHOLE, "length": 150, "key_size": 16, "value_size": 16} | changes)
    inputs = draw(case, 1, dtype="bfloat16")
    cache = case.cache("bfloat16", max_length=room)

    def run():
        return jax.eval_shape(lambda: call(case, "cudnn", inputs, cache=cache))

    if reason is None:
        assert run().dtype == jnp.bfloat16
    else:
        with pytest.raises(NotImplementedError, match=re.escape(reason)):
            run()


def test_what_is_asked_of_cudnn(monkeypatch):
    """The log-sum-exp comes in float32, and no array has the size of all scores."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "nvidia_compute_capability", lambda: 9.0)
    t, size = 131, 523
    case = Case(window=WHOLE, length=t, key_size=16, value_size=16)
    x = draw(case, 1, dtype="bfloat16")
    lengths = jnp.zeros((case.batch,), jnp.int32)
    for options in (None, lengths):
        out, lse = jax.eval_shape(
            lambda x, n: cudnn_pieces.softmax(x["q"], x["k"], x["v"], n, scale=1.0), x, options
        )
        assert (out.shape, out.dtype) == ((2, t, 4, 16), jnp.bfloat16)
        assert (lse.shape, lse.dtype) == ((2, t, 4), jnp.float32)
    cache = case.cache("bfloat16", max_length=size)
    program = str(jax.make_jaxpr(lambda x, cache: call(case, "cudnn", x, cache=cache))(x, cache))
    shapes = set(re.findall(r"\w+\[([\d,]+)\]", program))
    assert f"2,{size},2,16" in shapes, "keys and values are not expanded to the query heads"
    assert not any({str(t), str(size)} <= set(shape.split(",")) for shape in shapes)
    assert not any({str(size), "4"} <= set(shape.split(",")) for shape in shapes)


# --- on a GPU -------------------------------------------------------------------------------------

LARGE = Case(
    window=WHOLE, batch=3, length=256, num_heads=8, num_kv_heads=2, key_size=128, value_size=128
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [0.01, None, 2.0])
def test_cudnns_softmax(dtype, scale):
    """Output and log-sum-exp, in its base and sign; to any number of keys but 0."""
    x = draw(LARGE, 1, dtype=dtype)
    q, k, v = x["q"][:, :130], x["k"], x["v"]
    scale = 128**-0.5 if scale is None else scale
    for k_, v_, lengths in (
        (k, v, jnp.asarray([1, 100, 256], jnp.int32)),
        (k[:, :130], v[:, :130], None),
    ):
        found = jax.jit(lambda *x, s=scale: cudnn_pieces.softmax(*x, scale=s))(q, k_, v_, lengths)
        with jax.default_matmul_precision("highest"):
            expected = _softmax(*(y.astype(jnp.float32) for y in (q, k_, v_)), lengths, scale=scale)
        assert found[1].dtype == jnp.float32
        np.testing.assert_allclose(found[1], expected[1], atol=2e-3, rtol=1e-4)
        assert relative_error(found[0], expected[0]) <= TOLERANCES[dtype][0]


def _in_float32(tree):
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_slots", [0, 6])
@pytest.mark.parametrize("key_size", [64, 128])
def test_pieces_on_a_gpu(dtype, num_slots, key_size):
    """Against XLA in float32 from the same inputs; caches against XLA's in the same dtype."""
    case = dataclasses.replace(LARGE, key_size=key_size, value_size=key_size, num_slots=num_slots)
    found = expected = _filled(case, (0, 5, 300), dtype, room=1000)
    for seed in (2, 3):
        inputs = draw(case, seed, dtype=dtype)
        wanted, *_ = _piece(case, "xla", _in_float32(inputs), _in_float32(found))
        *_, expected = _piece(case, "xla", inputs, expected)
        out, mass, found = _piece(case, "cudnn", inputs, found)
        for row in range(3):
            assert relative_error(out[row], wanted[row]) <= TOLERANCES[dtype][0]
        assert not mass.any()
        chex.assert_trees_all_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_none_chooses_cudnn_for_pieces_and_the_kernels_for_their_gradients(caplog):
    inputs = draw(LARGE, 2, dtype="bfloat16")
    cache = _filled(LARGE, (0, 5, 300), "bfloat16", room=1000)
    api._log_choice.cache_clear()
    with caplog.at_level("INFO", logger="nha_jax.ops.api"):
        found = jax.jit(lambda x, cache: call(LARGE, None, x, cache=cache))(inputs, cache)
    assert caplog.records[0].getMessage().endswith("chose 'cudnn'")
    kernels = jax.jit(lambda x, cache: call(LARGE, "pallas_triton", x, cache=cache))(inputs, cache)
    assert relative_error(found, kernels) <= TOLERANCES["bfloat16"][0]

    def gradient(name):
        def loss(x, window_k):
            x = {**inputs, **x}
            out = call(LARGE, name, x, cache=cache.replace(window_k=window_k))
            return (out.astype(jnp.float32) ** 2).sum()

        x = {name: inputs[name] for name in ("q", "k", "v", "log_decay")}
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, cache.window_k)

    for leaf, expected in zip(
        jax.tree.leaves(gradient("cudnn")), jax.tree.leaves(gradient("pallas_triton")), strict=True
    ):
        assert np.array_equal(leaf, expected) or relative_error(leaf, expected) <= 1e-3


@pytest.mark.gpu
def test_a_long_cache_on_a_gpu():
    """32,768 tokens before 4,096, in a cache with room for more; against the kernels."""
    case = dataclasses.replace(LARGE, batch=1, length=4096, num_slots=0)
    cache = init_cache(
        1, num_kv_heads=2, key_size=128, value_size=128, num_slots=0, window=WHOLE,
        max_length=65536, dtype="bfloat16",
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 2)
    shape = cache.window_k.shape
    cache = cache.replace(
        window_k=jax.random.normal(keys[0], shape, jnp.bfloat16).at[:, 32768:].set(0),
        window_v=jax.random.normal(keys[1], shape, jnp.bfloat16).at[:, 32768:].set(0),
        length=jnp.full((1,), 32768, jnp.int32),
        segment_length=jnp.full((1,), 32768, jnp.int32),
    )
    inputs = draw(case, 2, dtype="bfloat16")
    found, expected = (_piece(case, name, inputs, cache)[0] for name in ("cudnn", "pallas_triton"))
    assert relative_error(found, expected) <= TOLERANCES["bfloat16"][0]
