"""The tables of documents and padding against the plain functions of `nha_jax.ops.rows`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops.checks import Call
from nha_jax.ops.rows import rows_of
from pallas_kernels.documents import document_tables
from pallas_kernels.spec import BEFORE


def draw(length: int, mean: int, padding: float, seed: int = 0) -> np.ndarray:
    """Three rows of documents of `mean` tokens, and that share of padding anywhere between them."""
    rng = np.random.default_rng([seed, length])
    ids = 1 + np.cumsum(rng.random((3, length)) < 1 / mean, axis=1) % 3
    return np.where(rng.random((3, length)) < padding, 0, ids).astype(np.int32)


def expected(ids, window: int, lag: int, sink: bool):
    """Source, reach, start, readable and count of tokens; and which rows are tokens."""
    ids = jnp.asarray(ids)
    q = jnp.zeros((*ids.shape, 1, 1))
    call = Call(
        q, q, q, q, window, lag, "mask", rope=None, scale=1.0, segment_ids=ids, cache=None,
        return_cache=False,
    )  # fmt: skip
    rows = rows_of(call)
    readable = rows.valid & (sink | (rows.position >= lag))
    start = jnp.where(rows.start < 0, BEFORE, rows.start)
    tables = rows.source, rows.reach(max(window, 1)), start, readable, rows.num_tokens
    return tables, rows.valid


def check(ids, window: int = 10, lag: int = 4, sink: bool = False, interpret: bool = True) -> None:
    options = {"window": window, "lag": lag, "sink": sink}
    tables = document_tables(jnp.asarray(ids), **options, interpret=interpret)
    (source, reach, start, readable, count), valid = expected(ids, **options)
    np.testing.assert_array_equal(
        np.sort(tables.source), np.arange(ids.shape[1])[None].repeat(3, 0)
    )
    np.testing.assert_array_equal(np.where(valid, tables.source, 0), np.where(valid, source, 0))
    np.testing.assert_array_equal(tables.reach, reach)
    np.testing.assert_array_equal(tables.start, start)
    np.testing.assert_array_equal(tables.readable, readable)
    np.testing.assert_array_equal(tables.bounds, np.stack([0 * count, count], axis=1))


@pytest.mark.parametrize("padding", [0, 0.1, 0.9, 1])
@pytest.mark.parametrize("length", [1, 31, 32, 300, 4096, 9000])
def test_padding_anywhere(length, padding):
    check(draw(length, 20, padding))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 300, 9000])
def test_compiled(length):
    for mean in (1, 20, 10**9):
        for padding in (0, 0.1, 1):
            check(draw(length, mean, padding), 64, 64, interpret=False)


@pytest.mark.parametrize("mean", [1, 3, 1000, 10**9])
def test_documents_of_any_length(mean):
    check(draw(9000, mean, 0.2))


@pytest.mark.parametrize(("window", "lag", "sink"), [(0, 0, False), (64, 0, False), (64, 64, True)])
def test_options(window, lag, sink):
    check(draw(500, 50, 0.2), window, lag, sink)


def test_padding_at_both_ends_and_long_gaps():
    ids = draw(10000, 300, 0)
    ids[0, :5000], ids[1, 4000:], ids[2, 100:9990] = 0, 0, 0
    check(ids)


def test_vmap_and_jit():
    ids = jnp.asarray(np.stack([draw(100, 10, 0.2, seed) for seed in range(2)]))

    def run(ids):
        return document_tables(ids, window=10, lag=4, sink=False, interpret=True)

    mapped = jax.jit(jax.vmap(run))(ids)
    alone = jax.tree.map(lambda *x: jnp.stack(x), run(ids[0]), run(ids[1]))
    jax.tree.map(np.testing.assert_array_equal, mapped, alone)


def test_64_bit_types(x64):
    check(draw(300, 20, 0.2))
