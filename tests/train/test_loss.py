"""Chunked cross-entropy against the plain one, and the logits it never holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from train.loss import chunked_cross_entropy

B, T, D, P = 3, 10, 8, 13


@pytest.fixture(scope="module")
def example() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "table": jnp.asarray(rng.normal(size=(D, P)), jnp.float32),
        "hidden": jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
        "targets": jnp.asarray(rng.integers(0, P, (B, T)), jnp.int32),
        "mask": jnp.asarray(rng.random((B, T)) < 0.7),
    }


def chunked(table, hidden, targets, mask, chunk_size):
    return chunked_cross_entropy(
        lambda h: jnp.einsum("bcd,dp->bcp", h, table), hidden, targets, mask, chunk_size=chunk_size
    )


def plain(table, hidden, targets, mask):
    logits = jnp.einsum("btd,dp->btp", hidden, table)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nats = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(nats * mask), jnp.sum(log_z**2 * mask)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 10, 64])
def test_values_and_gradients_equal_the_plain_loss(example, chunk_size: int) -> None:
    def total(sums):
        return sums[0] + 0.1 * sums[1]

    table, hidden, targets, mask = example.values()
    ours, our_gradients = jax.jit(
        jax.value_and_grad(lambda t, h: total(chunked(t, h, targets, mask, chunk_size)), (0, 1))
    )(table, hidden)
    theirs, their_gradients = jax.jit(
        jax.value_and_grad(lambda t, h: total(plain(t, h, targets, mask)), (0, 1))
    )(table, hidden)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    for a, b in zip(our_gradients, their_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_masked_targets_count_for_nothing(example) -> None:
    table, hidden, targets, mask = example.values()
    loss = jax.jit(lambda h, t: chunked(table, h, t, mask, 4).nats)
    changed = jnp.where(mask, targets, (targets + 1) % P)
    assert loss(hidden, targets) == loss(hidden, changed)
    gradient = jax.jit(jax.grad(loss))(hidden, targets)
    assert np.all(np.asarray(gradient)[~np.asarray(mask)] == 0)
    assert np.any(np.asarray(gradient)[np.asarray(mask)] != 0)


def _largest_with_vocabulary(function, *arguments) -> int:
    """Elements of the largest array, anywhere in the program, that has the vocabulary's size."""
    largest = 0

    def visit(jaxpr) -> None:
        nonlocal largest
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                if P in variable.aval.shape and D not in variable.aval.shape:
                    largest = max(largest, variable.aval.size)
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return largest


def test_logits_of_the_whole_batch_never_exist(example) -> None:
    table, hidden, targets, mask = example.values()

    def ours(t, h):
        return chunked(t, h, targets, mask, 2).nats

    def theirs(t, h):
        return plain(t, h, targets, mask)[0]

    both = (0, 1)
    assert _largest_with_vocabulary(jax.grad(theirs, both), table, hidden) == B * T * P
    assert _largest_with_vocabulary(jax.grad(ours, both), table, hidden) == B * 2 * P
