"""jit, vmap, remat, sharding; memory that grows with T and not with T x W; errors."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CHUNKWISE,
    Case,
    call,
    draw,
    draw_cotangents,
    draw_segments,
    outputs_and_gradients,
    quick,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nha_jax.ops import ArgumentError, init_cache, native_hybrid_attention, xla_slots

CASE = Case(window=5, length=40)


def _loss(implementation, inputs, ids=None, case=CASE):
    out = call(case, implementation, inputs, segment_ids=ids)
    return (out * out).sum()


@pytest.mark.parametrize("implementation", quick(CHUNKWISE, interpreted=True))
def test_vmap_and_remat(implementation):
    """Gradients under vmap and under remat equal those of plain calls."""
    stacked = [draw(CASE, seed=seed, dtype="float32") for seed in (1, 2)]
    tables = {name: stacked[0][name] for name in ("cos", "sin")}
    stacked = [{name: x[name] for name in ("q", "k", "v", "log_decay")} for x in stacked]
    ids = jnp.asarray(draw_segments(np.random.default_rng(3), 2, 40, padded=True))
    inputs = {name: jnp.stack([x[name] for x in stacked]) for name in stacked[0]}

    def plain(x):
        return jax.grad(lambda y: _loss(implementation, y | tables, ids))(x)

    def rematerialised(x):
        return jax.grad(jax.checkpoint(lambda y: _loss(implementation, y | tables, ids)))(x)

    alone = jax.jit(jax.grad(lambda x: _loss("xla", x | tables, ids)))
    expected = [alone(x) for x in stacked]
    mapped = jax.jit(jax.vmap(plain))(inputs)
    for i in range(2):
        part = jax.tree.map(lambda x, i=i: x[i], mapped)
        chex.assert_trees_all_close(part, expected[i], rtol=2e-4, atol=1e-4)
    chex.assert_trees_all_close(
        jax.jit(rematerialised)(stacked[0]), expected[0], rtol=2e-4, atol=1e-4
    )


def test_chunks_read_in_groups_equal_all_at_once(monkeypatch, x64):
    """Outputs, gradients and the final cache of 5 chunks, in groups of 2, one of padding."""
    case = Case(window=5, length=300)
    inputs = draw(case, seed=4)
    rng = np.random.default_rng(5)
    ids = jnp.asarray(draw_segments(rng, case.batch, case.length, padded=True))
    cotangents = draw_cotangents(rng, case, "float64")

    def run(most):
        monkeypatch.setattr(xla_slots, "_MILD_CHUNKS", most)
        gradients = jax.jit(
            lambda x: outputs_and_gradients(case, "xla", x, cotangents, segment_ids=ids)
        )
        whole = jax.jit(lambda x: call(case, "xla", x, segment_ids=ids, cache=case.cache()))
        return gradients(inputs), whole(inputs)

    chex.assert_trees_all_close(run(2), run(64), rtol=1e-10, atol=1e-11)


def _summed_axes(jaxpr) -> int:
    """Axes of the largest array that anything in a jaxpr sums or multiplies and sums."""
    most = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("reduce_sum", "reduce_max", "dot_general", "cumsum"):
            most = max(most, *(var.aval.ndim for var in equation.invars + equation.outvars))
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                most = max(most, _summed_axes(inner))
    return most


@pytest.mark.parametrize("window", [0, 5, 10**6])
def test_sums_have_few_axes(window):
    """jaxlib 0.10.2 crashes on the CPU in some sums over seven; `vmap` over `vmap` adds two."""
    case = Case(window=window, length=150)
    inputs = draw(case, seed=20, dtype="float32")
    ids = jnp.asarray(draw_segments(np.random.default_rng(21), 2, 150, padded=True))
    gradient = jax.make_jaxpr(jax.grad(lambda x: _loss("xla", x, ids, case)))(inputs)
    assert 4 <= _summed_axes(gradient.jaxpr) <= 5


@pytest.mark.parametrize("implementation", quick(CHUNKWISE))
def test_vmap_over_some_arguments(implementation):
    """Calls of one row that share their keys, or their documents."""
    case = dataclasses.replace(CASE, batch=1, length=20)
    inputs = draw(case, seed=1, dtype="float32")
    tables = {name: inputs.pop(name) for name in ("cos", "sin")}
    ids = jnp.asarray(draw_segments(np.random.default_rng(3), 1, 20, padded=True))
    q = jnp.stack([inputs["q"], 2 * inputs["q"], -inputs["q"]])

    def gradient(q, inputs):
        x = inputs | {"q": q}
        return jax.grad(lambda y: _loss(implementation, y | tables, ids, case))(x)

    mapped = jax.jit(jax.vmap(gradient, in_axes=(0, None)))(q, inputs)
    single = jax.jit(gradient)
    for i in range(3):
        part = jax.tree.map(lambda x, i=i: x[i], mapped)
        chex.assert_trees_all_close(part, single(q[i], inputs), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("implementation", quick(CHUNKWISE))
def test_rotary_tables_of_which_one_is_shared(length, implementation):
    """cos for all rows of the batch, sin for each."""
    case = dataclasses.replace(CASE, batch=2, length=length)
    inputs = draw(case, seed=4, dtype="float32")
    inputs["sin"] = jnp.concatenate([inputs["sin"], -inputs["sin"]])
    whole = inputs | {"cos": jnp.concatenate([inputs["cos"]] * 2)}
    cache = case.cache("float32") if length == 1 else None

    def gradients(x, implementation):
        def run(q):
            return call(case, implementation, x | {"q": q}, cache=cache, return_cache=length == 1)

        outputs, pull_back = jax.vjp(run, x["q"])
        return jax.tree.leaves((outputs, pull_back(outputs)))

    found = jax.jit(lambda x: gradients(x, implementation))(inputs)
    chex.assert_trees_all_close(found, gradients(whole, "reference"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "pallas_triton_interpret"])
def test_values_that_shard_map_follows_are_refused(implementation):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    inputs = draw(CASE, seed=4, dtype="float32")
    specs = {name: P("x") if x.shape[0] > 1 else P() for name, x in inputs.items()}

    def run(x):
        return call(CASE, implementation, x)

    with pytest.raises(NotImplementedError, match="check_vma=False"):
        jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=P("x"))(inputs)


@pytest.mark.parametrize("with_ids", [pytest.param(False, marks=pytest.mark.wide), True])
@pytest.mark.parametrize(
    ("axis_type", "implementation"),
    [
        (AxisType.Auto, "xla"),
        (AxisType.Auto, "pallas_triton_interpret"),
        (AxisType.Explicit, "xla"),
        pytest.param(AxisType.Explicit, "pallas_triton_interpret", marks=pytest.mark.wide),
    ],
)
def test_sharded_over_batch_and_heads(axis_type, with_ids, implementation):
    """Eight devices, batch x heads = 4 x 2: the same numbers, and no array is gathered."""
    if len(jax.devices()) < 8:
        pytest.skip("needs eight (simulated) devices")
    case = Case(window=20, batch=8, length=80, num_kv_heads=2)
    inputs = draw(case, seed=4, dtype="float32")
    ids = None
    if with_ids:
        ids = jnp.asarray(draw_segments(np.random.default_rng(5), 8, 80, padded=True))
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    spec = {name: P("data", None, "tensor") for name in ("q", "k", "v", "log_decay")}
    spec |= {"cos": P(), "sin": P()}
    sharded = {
        name: jax.device_put(x, NamedSharding(mesh, spec[name])) for name, x in inputs.items()
    }
    sharded_ids = None if ids is None else jax.device_put(ids, NamedSharding(mesh, P("data")))
    tables = {name: inputs.pop(name) for name in ("cos", "sin")}
    sharded_tables = {name: sharded.pop(name) for name in tables}

    def gradient(name):
        def run(x, tables, ids):
            return jax.value_and_grad(lambda y: _loss(name, y | tables, ids, case))(x)

        return jax.jit(run)

    expected = gradient("xla")(inputs, tables, ids)
    compiled = gradient(implementation).lower(sharded, sharded_tables, sharded_ids).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    found = compiled(sharded, sharded_tables, sharded_ids)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
    for name, x in found[1].items():
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec[name]), x.ndim), name


def _temporary_bytes(case: Case, implementation: str) -> int:
    shapes = jax.eval_shape(lambda: draw(dataclasses.replace(case, length=8), 0, dtype="float32"))
    shapes = {
        name: jax.ShapeDtypeStruct((x.shape[0], case.length, *x.shape[2:]), x.dtype)
        for name, x in shapes.items()
    }
    gradient = jax.grad(lambda x: _loss(implementation, x, None, case))
    return jax.jit(gradient).lower(shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("window", [64, 10**6])
@pytest.mark.parametrize("implementation", ["xla", *(param for param in CHUNKWISE if param.marks)])
def test_memory_grows_with_length_alone(window, implementation):
    """Four times the tokens, at most 4.5 times the temporary memory, forward and backward."""
    case = Case(
        window=window, batch=1, length=1024, rope=False, key_size=16, value_size=16, num_slots=8
    )
    short = _temporary_bytes(case, implementation)
    long = _temporary_bytes(dataclasses.replace(case, length=4096), implementation)
    assert long <= 4.5 * short
    # And no array of T x T, which for one head alone would be this large.
    assert long < 4 * case.num_heads * 4096**2


def _arguments(**changes):
    x = draw(CASE, seed=8, dtype="float32")
    arguments = {name: x[name] for name in ("q", "k", "v", "log_decay")}
    return arguments | {"window": 5, "rope": (x["cos"], x["sin"])} | changes


_ZEROS = jnp.zeros
BAD_CALLS = {
    "q_rank": ({"q": _ZEROS((2, 40, 4))}, r"q has shape \(2, 40, 4\).*four axes"),
    "q_integer": ({"q": _ZEROS((2, 40, 4, 12), int)}, "q has dtype int32.*float32, float64"),
    "q_float8": ({"q": _ZEROS((2, 40, 4, 12), "float8_e4m3fn")}, "q has dtype float8_e4m3fn.*one"),
    "k_dtype": ({"k": _ZEROS((2, 40, 2, 12), "bfloat16")}, "k has dtype bfloat16.*q's dtype"),
    "k_length": ({"k": _ZEROS((2, 39, 2, 12))}, r"k has shape \(2, 39, 2, 12\).*\(2, 40, 2, 12\)"),
    "v_heads": ({"v": _ZEROS((2, 40, 4, 20))}, r"v has shape .*k's G"),
    "heads": ({"q": _ZEROS((2, 40, 5, 12))}, "N=5.*G=2.*multiple"),
    "gates_shape": ({"log_decay": _ZEROS((2, 40, 4, 6))}, r"log_decay has shape .*\[B,T,G,M\]"),
    "gates_dtype": (
        {"log_decay": _ZEROS((2, 40, 2, 6), "float16")},
        "log_decay has dtype float16: expected q's dtype float32$",
    ),
    "window": ({"window": -1}, "window=-1.*at least 0"),
    "window_huge": ({"window": 2**31}, "window=2147483648: expected at most 2147483647"),
    "window_float": ({"window": 4.0}, "window=4.0.*int"),
    "lag": ({"slot_lag": 6}, "slot_lag=6.*at most window=5"),
    "nothing_to_read": ({"window": 0, "log_decay": None}, "window=0 with no slots"),
    "empty_slots": ({"empty_slots": "zero"}, "empty_slots='zero'.*'mask' or 'sink'"),
    "rope_length": ({"rope": (_ZEROS((1, 39, 6)),) * 2}, r"rope\[0\].*\(1, 39, 6\).*\(1, 40, 6\)"),
    "rope_single": ({"rope": _ZEROS((1, 40, 6))}, "rope: expected None or a pair"),
    "segments_dtype": ({"segment_ids": _ZEROS((2, 40))}, "segment_ids has dtype float32"),
    "segments_shape": ({"segment_ids": _ZEROS((2, 41), int)}, r"segment_ids has shape \(2, 41\)"),
    "segments_negative": ({"segment_ids": _ZEROS((2, 40), int) - 1}, "segment_ids holds -1.*0 "),
    "segments_beyond_int32": (
        {"segment_ids": np.full((2, 40), 2**32)},
        "segment_ids holds 4294967296: .*to 2147483647",
    ),
    "scale": ({"scale": "small"}, "scale='small'"),
    "scale_bool": ({"scale": True}, "scale=True: expected None or a finite"),
    "scale_nan": ({"scale": float("nan")}, "scale=nan: expected None or a finite"),
    "cache_type": ({"cache": 3}, "cache is a int"),
    "implementation": ({"implementation": "cuda"}, "implementation='cuda'.*'xla', 'reference'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_name_the_argument(name):
    changes, message = BAD_CALLS[name]
    with pytest.raises(ArgumentError, match=message):
        native_hybrid_attention(**_arguments(**changes))


def test_odd_key_size_with_rope():
    case = dataclasses.replace(CASE, key_size=11, rope=False)
    x = draw(case, seed=9, dtype="float32")
    tables = (jnp.ones((1, 40, 5)),) * 2
    with pytest.raises(ArgumentError, match=r"K=11.*even"):
        native_hybrid_attention(x["q"], x["k"], x["v"], x["log_decay"], window=5, rope=tables)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 6}, "window=6 where the call has 5"),
        ({"num_slots": 7}, "num_slots=7 where the call has 6"),
        ({"num_kv_heads": 4}, "num_kv_heads=4 where the call has 2"),
        ({"key_size": 8}, "key_size=8 where the call has 12"),
        ({"batch": 3}, "batch=3 where the call has 2"),
        ({"slot_lag": 2}, "slot_lag=2 where the call has 5"),
    ],
)
def test_a_cache_of_other_dimensions(change, message):
    cache = dataclasses.replace(CASE, **change).cache("float32")
    with pytest.raises(ArgumentError, match=message):
        native_hybrid_attention(**_arguments(cache=cache))
    with pytest.raises(ArgumentError, match="dtype=bfloat16 where the call has float32"):
        native_hybrid_attention(**_arguments(cache=CASE.cache("bfloat16")))


def test_a_document_beyond_max_length():
    """Raises where lengths are concrete; layers with W <= max_length are never bounded."""
    case = dataclasses.replace(CASE, window=100)
    forty = jnp.full((2,), 40)
    cache = case.cache("float32", max_length=60).replace(length=forty, segment_length=forty)
    x = _arguments(window=100)
    with pytest.raises(ArgumentError, match=r"max_length=60.*80 tokens"):
        native_hybrid_attention(**x, cache=cache)
    ids = jnp.full((2, 40), 9)  # a new document starts: it fits

    def under_jit(ids, cache):
        """Only q is traced: what is closed over keeps its numbers."""
        fixed = _arguments(window=100, cache=cache, segment_ids=ids)
        q = fixed.pop("q")
        return jax.eval_shape(lambda q: native_hybrid_attention(q, **fixed), q)

    goes_on = cache.replace(segment_id=jnp.full((2,), 9))
    for same in (ids, np.asarray(ids)):
        assert under_jit(same, cache).shape == (2, 40, 4, 20)
        with pytest.raises(ArgumentError, match=r"max_length=60.*80 tokens"):
            under_jit(same, goes_on)

    small = CASE.cache("float32", max_length=5)
    assert small.capacity == 5
    jax.eval_shape(lambda: native_hybrid_attention(**_arguments(cache=small)))


def test_cache_sizes():
    """Ring rows min(max(W, lag), max_length); pending rows only where a token can retire."""

    def sizes(num_slots=4, **options):
        cache = init_cache(
            1, num_kv_heads=1, key_size=2, value_size=2, num_slots=num_slots, dtype="bfloat16",
            **options,
        )  # fmt: skip
        assert cache.slots_k.dtype == jnp.float32
        assert cache.window_k.dtype == jnp.bfloat16
        return cache.capacity, cache.pending_k.shape[1]

    assert sizes(window=8, max_length=100) == (8, 8)
    assert sizes(window=8, slot_lag=3, max_length=100) == (8, 3)
    assert sizes(window=1000, max_length=100) == (100, 0)
    assert sizes(window=1000, slot_lag=9, max_length=100) == (100, 9)
    assert sizes(window=101, slot_lag=100, max_length=100) == (100, 0)
    # A window of max_length bounds no document: tokens of one that outgrows it retire.
    assert sizes(window=100, max_length=100) == (100, 100)
    assert sizes(window=0, max_length=100) == (0, 0)
    assert sizes(window=8, max_length=100, num_slots=0) == (8, 0)
    with pytest.raises(ArgumentError, match="max_length=0"):
        sizes(window=8, max_length=0)
    with pytest.raises(ArgumentError, match="window=0 with no slots"):
        sizes(window=0, max_length=4, num_slots=0)


@pytest.mark.parametrize("implementation", quick(CHUNKWISE))
def test_a_cache_can_be_donated(implementation):
    case = dataclasses.replace(CASE, length=1)
    inputs = draw(case, seed=10, dtype="float32")
    step = jax.jit(
        lambda x, cache: call(case, implementation, x, cache=cache, return_cache=True),
        donate_argnums=1,
    )
    cache = CASE.cache("float32")
    before = cache.window_k.unsafe_buffer_pointer()
    _, after = step(inputs, cache)
    assert cache.window_k.is_deleted()
    assert after.window_k.unsafe_buffer_pointer() == before
