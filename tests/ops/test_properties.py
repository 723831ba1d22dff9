"""Properties that the definition implies, whatever the numbers."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CACHE_INPUTS,
    CHUNKWISE,
    IMPLEMENTATIONS,
    TOLERANCES,
    Case,
    call,
    draw,
    draw_segments,
    exact_dtype,
    quick,
    relative_error,
    tight,
    with_dtypes,
)
from hypothesis import given, settings
from hypothesis import strategies as st


@functools.cache
def _continued(case: Case, implementation: str):
    """A jitted call with documents and cache: (inputs, ids, cache) -> out, mass, cache."""

    @jax.jit
    def run(inputs, segment_ids, cache):
        return call(
            case,
            implementation,
            inputs,
            segment_ids=segment_ids,
            cache=cache,
            return_slot_mass=True,
            return_cache=True,
        )

    return run


def _pieces(case: Case, inputs, segment_ids, cuts):
    """Cuts every row at its own places; each piece left-aligned in a call of the full length.

    Padding is skipped as if removed, so pieces of any length share one compilation.
    """
    edges = np.concatenate(
        [np.zeros((case.batch, 1), int), cuts, np.full((case.batch, 1), 10**6)], 1
    )
    for first, last in zip(edges.T[:-1], edges.T[1:], strict=True):
        index = np.arange(case.length)
        source = np.minimum(index + first[:, None], case.length - 1)
        inside = index + first[:, None] < np.minimum(last, case.length)[:, None]
        piece = {
            name: jnp.take_along_axis(
                jnp.broadcast_to(x, (case.batch, *x.shape[1:])),
                jnp.asarray(source).reshape(source.shape + (1,) * (x.ndim - 2)),
                axis=1,
            )
            for name, x in inputs.items()
        }
        ids = np.where(inside, np.take_along_axis(np.asarray(segment_ids), source, 1), 0)
        yield piece, jnp.asarray(ids), inside, source


CUT_CASES = {
    "hybrid": Case(window=7, length=40),
    "lag_between": Case(window=11, slot_lag=3, length=40, empty_slots="sink"),
    "linear": Case(window=0, length=40, rope=False),
    "full_bounded": Case(window=100, length=40, num_kv_heads=4),
}


def _cut_cases():
    for implementation in IMPLEMENTATIONS:
        for name in CUT_CASES:
            every_time = {"reference": ["hybrid"], "interpret": ["lag_between"]}
            wide = name not in every_time.get(implementation.id, CUT_CASES)
            marks = [pytest.mark.wide] if wide else implementation.marks
            label = f"{name}-{implementation.id}"
            yield pytest.param(name, *implementation.values, id=label, marks=marks)


@pytest.mark.parametrize(("name", "implementation"), list(_cut_cases()))
@settings(max_examples=6)
@given(seed=st.integers(0, 2**16))
def test_cut_anywhere_equals_whole(name, implementation, seed):
    """Outputs, slot mass and the final cache, each row cut at places of its own."""
    case, dtype, close = CUT_CASES[name], exact_dtype(implementation), tight(implementation)
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        inputs = draw(case, seed, dtype=dtype)
        segment_ids = draw_segments(rng, case.batch, case.length, padded=True)
        cuts = np.sort(rng.integers(0, case.length + 1, (case.batch, 2)), axis=1)
        run = _continued(case, implementation)
        start = case.cache(dtype, max_length=60 if name == "full_bounded" else None)
        out, mass, final = run(inputs, jnp.asarray(segment_ids), start)

        cache = start
        for piece, ids, inside, source in _pieces(case, inputs, segment_ids, cuts):
            part, part_mass, cache = run(piece, ids, cache)
            rows = np.nonzero(inside)
            at = (rows[0], source[rows])
            chex.assert_trees_all_close(part[rows], out[at], **close)
            chex.assert_trees_all_close(part_mass[rows], mass[at], **close)
        chex.assert_trees_all_close(cache, final, **close)
        chex.assert_trees_all_equal(
            *((c.length, c.segment_id, c.segment_length, c.slots_empty) for c in (cache, final))
        )


def _chains():
    """Implementations and the sizes of chained calls: long ones, and short enough for other code.

    The short ones, each with a program of its own, end in a long one.
    """
    for sizes, params in (
        ((20, 20), quick(CHUNKWISE)),
        ((5, 16, 19), quick(CHUNKWISE)),
    ):
        for param in params:
            label = f"{'-'.join(map(str, sizes))}-{param.id}"
            yield pytest.param(*param.values, sizes, id=label, marks=param.marks)


@pytest.mark.parametrize(("implementation", "sizes"), list(_chains()))
def test_gradients_through_a_cut(implementation, sizes, x64):
    """Gradients of chained calls equal those of one, through every leaf of the cache."""
    case, dtype = Case(window=7, slot_lag=4, length=40), exact_dtype(implementation)
    inputs = draw(case, seed=5, dtype=dtype)
    rng = np.random.default_rng(6)
    cotangent = jnp.asarray(rng.standard_normal((2, 40, 4, case.value_size)))
    # A start with history, so that every leaf matters.
    _, start = jax.jit(
        lambda x: call(case, "reference", x, cache=case.cache(dtype), return_cache=True)
    )(draw(case, seed=7, dtype=dtype))
    leaves = {name: getattr(start, name) for name in CACHE_INPUTS}
    targets = {
        name: jnp.asarray(rng.standard_normal(getattr(start, name).shape)) for name in CACHE_INPUTS
    }
    tables = {name: inputs.pop(name) for name in ("cos", "sin")}
    exact_tables = {name: x.astype(jnp.float64) for name, x in tables.items()}

    def score(out, cache):
        return (out * cotangent).sum() + sum(
            (getattr(cache, name) * targets[name]).sum() for name in CACHE_INPUTS
        )

    @jax.jit
    @jax.grad
    def whole(x):
        cache = start.replace(**x["cache"])
        exact = x["inputs"] | exact_tables
        return score(*call(case, "reference", exact, cache=cache, return_cache=True))

    @jax.jit
    @jax.grad
    def cut(x):
        cache = start.replace(**x["cache"])
        outs = []
        for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
            part = {n: y[:, end - size : end] for n, y in (x["inputs"] | tables).items()}
            out, cache = call(case, implementation, part, cache=cache, return_cache=True)
            outs.append(out)
        return score(jnp.concatenate(outs, 1), cache)

    x = {"inputs": inputs, "cache": leaves}
    expected, found = whole(jax.tree.map(lambda y: y.astype(jnp.float64), x)), cut(x)
    for name in CACHE_INPUTS:
        assert float(jnp.abs(expected["cache"][name]).max()) > 0, name
    for part, gradients in expected.items():
        for name, exact in gradients.items():
            assert found[part][name].dtype == x[part][name].dtype
            assert relative_error(found[part][name], exact) <= TOLERANCES[dtype][1], name


@pytest.mark.parametrize("implementation", quick(IMPLEMENTATIONS))
def test_calls_without_ids_continue_the_document(implementation, x64):
    """Ids, then none, then ids again: the tokens without are of the document before them."""
    case, dtype = Case(window=5, length=24), exact_dtype(implementation)
    inputs = draw(case, seed=8, dtype=dtype)
    ids = np.asarray([[1] * 5 + [2] * 19, [0, 3] * 4 + [3] * 12 + [1] * 4], np.int32)

    @jax.jit
    def run(inputs, segment_ids, cache):
        options = {"segment_ids": segment_ids, "cache": cache, "return_cache": True}
        return call(case, implementation, inputs, **options)

    out, final = run(inputs, jnp.asarray(ids), case.cache(dtype))
    cache, parts = case.cache(dtype), []
    for first, given_ids in ((0, True), (8, False), (16, True)):
        here = slice(first, first + 8)
        part = {name: x[:, here] for name, x in inputs.items()}
        part, cache = run(part, jnp.asarray(ids[:, here]) if given_ids else None, cache)
        parts.append(part)
    chex.assert_trees_all_close(jnp.concatenate(parts, 1), out, **tight(implementation))
    chex.assert_trees_all_close(cache, final, **tight(implementation))


@pytest.mark.parametrize("implementation", quick(CHUNKWISE))
@pytest.mark.parametrize("window", [0, 5, 16])
def test_token_by_token_equals_whole(implementation, window, x64):
    """Decoding: T = 1 with a cache, rows at different lengths."""
    case = Case(window=window, length=24, slot_lag=window and window - 1)
    step_case = dataclasses.replace(case, length=1)
    dtype, close = exact_dtype(implementation), tight(implementation)
    inputs = draw(case, seed=8, dtype=dtype)
    prompt = np.ones((2, 24), np.int32)
    prompt[1, 9:] = 0  # the second row is 15 tokens behind
    run = _continued(case, implementation)
    _, _, start = run(inputs, jnp.asarray(prompt), case.cache(dtype))
    more = draw(case, seed=9, dtype=dtype)
    out, mass, final = run(more, jnp.ones((2, 24), jnp.int32), start)
    step, cache = _continued(step_case, implementation), start
    for t in range(24):
        token = {name: x[:, t : t + 1] for name, x in more.items()}
        part, part_mass, cache = step(token, jnp.ones((2, 1), jnp.int32), cache)
        chex.assert_trees_all_close(part[:, 0], out[:, t], **close)
        chex.assert_trees_all_close(part_mass[:, 0], mass[:, t], **close)
    chex.assert_trees_all_close(cache, final, **close)


@pytest.mark.parametrize("implementation", quick(IMPLEMENTATIONS, interpreted=True))
def test_padding_leaves_no_trace(implementation, x64):
    """NaN on padding reaches nothing; an all-padding row keeps its cache bit for bit."""
    case, dtype = Case(window=5, length=40), exact_dtype(implementation)
    inputs = draw(case, seed=10, dtype=dtype)
    ids = draw_segments(np.random.default_rng(11), 2, 40, padded=True)
    run = _continued(case, implementation)
    _, _, start = run(draw(case, seed=12, dtype=dtype), jnp.asarray(ids), case.cache(dtype))
    ids[1] = 0
    hole = jnp.asarray(ids == 0)[:, :, None, None]
    poisoned = {
        name: x if name in ("cos", "sin") else jnp.where(hole, jnp.nan, x)
        for name, x in inputs.items()
    }
    clean = run(inputs, jnp.asarray(ids), start)
    dirty = run(poisoned, jnp.asarray(ids), start)
    chex.assert_trees_all_equal(clean, dirty)
    assert not np.asarray(dirty[0])[ids == 0].any()
    assert not np.asarray(dirty[1])[ids == 0].any()
    row = jax.tree.map(lambda x: x[1], (start, dirty[2]))
    chex.assert_trees_all_equal(*row)

    @jax.jit
    @jax.grad
    def gradient(x):
        out = call(case, implementation, inputs | x, segment_ids=jnp.asarray(ids), cache=start)
        return (out * out).sum()

    gradients = gradient({name: inputs[name] for name in ("q", "k", "v", "log_decay")})
    for name, x in gradients.items():
        assert np.isfinite(x).all(), name
        assert not np.asarray(x)[ids == 0].any(), name


@pytest.mark.parametrize("implementation", quick(CHUNKWISE))
def test_packing_equals_apart(implementation, x64):
    case = Case(window=6, length=40, batch=1)
    dtype, close = exact_dtype(implementation), tight(implementation)
    inputs = draw(case, seed=13, dtype=dtype)
    lengths, first = (1, 17, 2, 20), 0
    ids = np.repeat([3, 1, 2, 1], lengths)[None].astype(np.int32)
    run = _continued(case, implementation)
    packed, mass, _ = run(inputs, jnp.asarray(ids), case.cache(dtype))
    for length in lengths:
        rolled = {name: jnp.roll(x, -first, 1) for name, x in inputs.items()}
        alone_ids = jnp.where(jnp.arange(40) < length, 7, 0)[None]
        alone, alone_mass, _ = run(rolled, alone_ids, case.cache(dtype))
        chex.assert_trees_all_close(packed[:, first : first + length], alone[:, :length], **close)
        chex.assert_trees_all_close(
            mass[:, first : first + length], alone_mass[:, :length], **close
        )
        first += length


@pytest.mark.parametrize("implementation", quick(IMPLEMENTATIONS))
@pytest.mark.parametrize(
    ("window", "lag", "num_slots"), [(4, None, 3), (6, 2, 3), (0, None, 3), (5, None, 0)]
)
def test_causality_and_reach(implementation, window, lag, num_slots, x64):
    """Exact zeros for the future and for what is out of reach; non-zero just inside."""
    case = Case(
        window=window, slot_lag=lag, num_slots=num_slots, batch=1, length=20, rope=False,
        num_heads=2, num_kv_heads=1, key_size=4, value_size=3,
    )  # fmt: skip
    inputs = draw(case, seed=14, dtype=exact_dtype(implementation))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def gradient(inputs, t):
        names = [name for name in ("k", "v", "log_decay") if name in inputs]

        def at(x):
            out = call(case, implementation, inputs | x)
            return jnp.take(out, t, axis=1).sum()

        return jax.grad(at)({name: inputs[name] for name in names})

    gradients = gradient(inputs, jnp.arange(20))  # [t, 1, j, G, .]
    read, token = np.mgrid[:20, :20]
    age = read - token
    sees = (age >= 0) & (age < window)
    if num_slots:
        sees |= age >= case.lag
    for name, x in gradients.items():
        touched = (np.abs(np.asarray(x)) > 0).any((1, 3, 4))
        if name == "log_decay":
            # A gate acts where its token has retired.
            np.testing.assert_array_equal(touched, age >= case.lag)
        elif name == "v":
            np.testing.assert_array_equal(touched, sees)
        else:
            assert not touched[~sees].any()
            # A single readable key has probability 1, whatever its score.
            assert touched[sees & (read > 0)].all()


@pytest.mark.parametrize(
    ("implementation", "dtype"), with_dtypes(CHUNKWISE, ("float32", "float64"))
)
def test_lag_beyond_the_end_is_softmax_attention(implementation, dtype, x64):
    case = Case(window=64, length=50, rope=False, value_size=12)
    inputs = draw(case, seed=15, dtype=dtype)
    out = jax.jit(lambda x: call(case, implementation, x))(inputs)
    exact = {name: x.astype(jnp.float64) for name, x in inputs.items()}
    k, v = (jnp.repeat(exact[name], 2, axis=2) for name in ("k", "v"))
    scores = jnp.einsum("bthk,bshk->bhts", exact["q"], k) * case.key_size**-0.5
    scores = jnp.where(jnp.tri(50, dtype=bool), scores, -jnp.inf)
    expected = jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores, axis=-1), v)
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert error <= TOLERANCES[dtype][0]


@pytest.mark.parametrize("implementation", quick(CHUNKWISE))
def test_no_window_is_gated_slot_attention(implementation, x64):
    """W = 0 against the recurrence of gated slot attention, in numpy."""
    case = Case(window=0, length=30, num_heads=2, num_kv_heads=2, rope=False)
    inputs = draw(case, seed=16, dtype=exact_dtype(implementation))
    out = jax.jit(lambda x: call(case, implementation, x))(inputs)
    inputs = {name: np.asarray(x, np.float64) for name, x in inputs.items()}
    keys = np.zeros((2, 2, case.num_slots, case.key_size))
    values = np.zeros((2, 2, case.num_slots, case.value_size))
    for t in range(30):
        alpha = np.exp(inputs["log_decay"][:, t])[..., None]
        keys = alpha * keys + (1 - alpha) * inputs["k"][:, t, :, None]
        values = alpha * values + (1 - alpha) * inputs["v"][:, t, :, None]
        scores = np.einsum("bhk,bhmk->bhm", inputs["q"][:, t], keys) * case.key_size**-0.5
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        expected = np.einsum("bhm,bhmv->bhv", p, values)
        np.testing.assert_allclose(out[:, t], expected, **tight(implementation))


@pytest.mark.parametrize("implementation", quick(CHUNKWISE))
def test_permutation_over_batch_and_heads(implementation, x64):
    case = Case(window=5, length=40, num_heads=6, num_kv_heads=3)
    inputs = draw(case, seed=17, dtype=exact_dtype(implementation))
    run = jax.jit(lambda x: call(case, implementation, x))
    out = run(inputs)
    heads, groups = np.array([4, 5, 0, 1, 2, 3]), np.array([2, 0, 1])
    permuted = {
        name: x if name in ("cos", "sin") else x[::-1][:, :, heads if name == "q" else groups]
        for name, x in inputs.items()
    }
    chex.assert_trees_all_close(run(permuted), out[::-1][:, :, heads], **tight(implementation))


@pytest.mark.parametrize("implementation", quick(IMPLEMENTATIONS, interpreted=True))
def test_a_gate_that_is_no_number_shows(implementation):
    """From the row on that reads slots behind it, at the latest."""
    case = Case(window=4, batch=1, length=24, num_slots=4)
    inputs = draw(case, 0, dtype="float32")
    inputs["log_decay"] = inputs["log_decay"].at[:, 5].set(jnp.nan)
    out = jax.jit(functools.partial(call, case, implementation))(inputs)
    shows = np.isnan(np.asarray(out)).any((0, 2, 3))
    assert shows[5 + 4 :].all()
