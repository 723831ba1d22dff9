"""Steps on a stack of caches: the layer at hand as if it were alone, the others untouched."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KERNELS
from test_decode import PLATFORMS, Case, _assert_close, _filled, blocks, jit

from nha_jax.ops import native_hybrid_attention
from nha_jax.ops.checks import check_call
from nha_jax.ops.pallas_decode import step
from nha_jax.ops.xla import xla

LAYERS = 3
CASES = {
    "documents": Case(window=5, ids=True),
    "lag": Case(window=6, slot_lag=2, rope="rows"),
    "full_attention": Case(window=1000, max_length=32, num_slots=0),
    "no_window": Case(window=0),
}


def _stack(case: Case):
    caches = [_filled(case, seed) for seed in range(LAYERS)]
    return caches, _stacked(caches)


def _stacked(caches):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)


def _options(case: Case, x):
    return {
        "window": case.window,
        "slot_lag": case.slot_lag,
        "rope": (x["cos"], x["sin"]),
        "segment_ids": x.get("segment_ids"),
    }


def _assert_equal(found, expected):
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("variant", ["sum", "dot-split"])
@pytest.mark.parametrize("name", list(CASES))
def test_a_loop_over_layers_is_each_layer_alone(name, variant, platform):
    """In a compiled loop that carries the stack."""
    case = CASES[name]
    products, _, split = variant.partition("-")
    if split and not case.window:
        pytest.skip("no window to split")
    sizes = blocks(products, splits=3 if split else 1)
    caches, stack = _stack(case)
    x = {n: a[0] for n, a in case.tokens().items()}
    interpret = jax.default_backend() == "cpu"

    def one(cache):
        stacked = cache.layer is not None
        call = check_call(
            x["q"],
            x["k"],
            x["v"],
            x["log_decay"],
            **_options(case, x),
            empty_slots="mask",
            scale=None,
            cache=cache.unstacked() if stacked else cache,
            return_cache=True,
        )
        call = dataclasses.replace(call, stack=cache if stacked else None)
        return step(call, interpret, xla, sizes)

    def loop(stack):
        def layer(stack, number):
            out, mass, after = one(stack.at_layer(number))
            return after.at_layer(None), (out, mass)

        return jax.lax.scan(layer, stack, jnp.arange(LAYERS, dtype=jnp.int32))

    after, (outs, masses) = jit(loop)(stack)
    alone = jit(one)
    expected = [alone(cache) for cache in caches]
    _assert_close(outs, jnp.stack([out for out, _, _ in expected]))
    _assert_close(masses, jnp.stack([mass for _, mass, _ in expected]))
    _assert_close(after, _stacked([cache for *_, cache in expected]))


IMPLEMENTATIONS = ["reference", "xla", *KERNELS]


def _through_the_operator(case: Case, length: int, implementation: str):
    """A function of q, k and a stack at a layer, and one of the cache of that layer alone."""
    x = {n: jnp.concatenate(list(a[:length]), axis=1) for n, a in case.tokens().items()}

    def call(q, k, cache):
        return native_hybrid_attention(
            q,
            k,
            x["v"],
            x["log_decay"],
            **_options(case, x),
            cache=cache,
            return_cache=True,
            implementation=implementation,
        )

    return call, x["q"], x["k"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1, 3])
def test_other_layers_are_untouched(length, implementation):
    case = CASES["documents"]
    caches, stack = _stack(case)
    call, q, k = _through_the_operator(case, length, implementation)
    out, after = jit(call)(q, k, stack.at_layer(1))
    expected_out, expected = jit(call)(q, k, caches[1])
    assert after.layer == 1
    _assert_close(out, expected_out)
    _assert_close(after.unstacked(), expected)
    for other in (0, 2):
        _assert_equal(after.at_layer(other).unstacked(), caches[other])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_gradients_and_vmap(platform):
    """Of every floating leaf of the stack; over stacks, and over the layer at hand."""
    case = CASES["documents"]
    implementation = "pallas_triton_interpret" if platform == "cpu" else "pallas_triton"
    _, stack = _stack(case)
    kernel, q, k = _through_the_operator(case, 1, implementation)
    plain, _, _ = _through_the_operator(case, 1, "xla")

    def loss(call, q, k, slots, ring, layer):
        out, after = call(q, k, stack.replace(slots_k=slots, window_v=ring).at_layer(layer))
        after = (after.slots_k, after.slots_v, after.window_k, after.pending_k)
        return sum(jnp.sin(leaf).sum() * (i + 1) for i, leaf in enumerate((out, *after)))

    arguments = (q, k, stack.slots_k, stack.window_v)
    gradients = [
        jit(jax.grad(functools.partial(loss, call), argnums=(0, 1, 2, 3)))(*arguments, 2)
        for call in (kernel, plain)
    ]
    _assert_close(*gradients)
    assert all(np.asarray(leaf).any() for leaf in gradients[0])

    many = jnp.stack([stack.slots_k, -stack.slots_k, 2 * stack.slots_k])
    layers = jnp.array([2, 0, 1])

    def values(call, slots, layer):
        return call(q, k, stack.replace(slots_k=slots).at_layer(layer))

    found = jit(jax.vmap(functools.partial(values, kernel)))(many, layers)
    _assert_close(found, jit(jax.vmap(functools.partial(values, plain)))(many, layers))
    found = jit(jax.vmap(functools.partial(values, kernel), (0, None)))(many, 1)
    _assert_close(found, jit(jax.vmap(functools.partial(values, plain), (0, None)))(many, 1))
