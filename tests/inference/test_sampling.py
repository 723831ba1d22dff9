"""Sampling against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.inference import SamplingConfig
from nha_jax.inference import sampling as s

B, P = 5, 40
LOGITS = np.random.default_rng(0).normal(size=(B, P)).astype(np.float32) * 3
COUNTS = np.random.default_rng(1).integers(0, 3, (B, P)).astype(np.int32)


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def kept(result):
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(result)]


def by_hand(logits, counts, config):
    """One row, token by token."""
    logits = logits.astype(np.float64)
    for token in np.flatnonzero(counts):
        value = logits[token]
        r = config.repetition_penalty
        logits[token] = value / r if value > 0 else value * r
    if config.temperature == 0:
        return logits
    logits = logits / config.temperature
    order = np.argsort(-logits)
    if config.top_k is not None:
        logits[order[config.top_k :]] = -np.inf
    if config.top_p is not None:
        total = 0.0
        probabilities = softmax(logits)
        for token in order:
            if total >= config.top_p:
                logits[token] = -np.inf
            total += probabilities[token]
    if config.min_p is not None:
        probabilities = softmax(logits)
        logits[probabilities < config.min_p * probabilities.max()] = -np.inf
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.3, "repetition_penalty": 0.7},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.01},
        {"top_p": 0.8},
        {"top_p": 1.0},
        {"min_p": 0.0},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {
            "temperature": 1.7,
            "top_k": 20,
            "top_p": 0.9,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
        },
    ],
    ids=str,
)
def test_logits_are_processed_as_by_hand(options):
    config = SamplingConfig(**options)
    found = np.asarray(s.processed_logits(jnp.asarray(LOGITS), jnp.asarray(COUNTS), config))
    for row in range(B):
        expected = by_hand(LOGITS[row], COUNTS[row], config)
        if not config.is_greedy:
            expected -= expected.max()  # logits count up to a constant only
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)


def test_ties_at_the_border_stay():
    logits = jnp.asarray([[2.0, 1.0, 1.0, 0.0]])
    assert kept(s.keep_top_k(logits, 2)) == [{0, 1, 2}]
    assert kept(s.keep_top_p(logits, 0.7)) == [{0, 1, 2}]


def test_the_order_is_top_k_then_top_p_then_min_p():
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
    # Of the two that top-k leaves, the first has 0.57: top-p of 0.5 keeps it alone.
    config = SamplingConfig(top_k=2, top_p=0.5)
    assert kept(s.processed_logits(logits, jnp.zeros((1, 4), jnp.int32), config)) == [{0}]
    assert kept(s.keep_top_p(logits, 0.5)) == [{0, 1}]


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-300])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 3}], ids=str)
def test_the_coldest_draws_are_greedy(temperature, options):
    config = SamplingConfig(temperature=temperature, **options)
    keys, positions = s.row_keys(0, B), jnp.zeros(B, jnp.int32)
    found = s.choose_tokens(jnp.asarray(LOGITS), jnp.asarray(COUNTS), keys, positions, config)
    np.testing.assert_array_equal(found, LOGITS.argmax(-1))


def test_greedy_takes_the_largest():
    config = SamplingConfig(temperature=0.0)
    keys, positions = s.row_keys(0, B), jnp.zeros(B, jnp.int32)
    found = s.choose_tokens(jnp.asarray(LOGITS), jnp.asarray(COUNTS), keys, positions, config)
    np.testing.assert_array_equal(found, LOGITS.argmax(-1))


def test_draws_have_the_distribution_of_the_processed_logits():
    rows, config = 4000, SamplingConfig(temperature=0.8, top_k=5)
    logits = jnp.tile(jnp.asarray(LOGITS[:1, :12]), (rows, 1))
    counts = jnp.zeros_like(logits, jnp.int32)
    tokens = s.choose_tokens(
        logits, counts, s.row_keys(0, rows), jnp.zeros(rows, jnp.int32), config
    )
    expected = softmax(by_hand(LOGITS[0, :12], np.zeros(12), config))
    found = np.bincount(tokens, minlength=12) / rows
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / rows**0.5)
    assert not found[expected == 0].any()
    # Another position is another draw; the same one is the same draw.
    again = s.choose_tokens(logits, counts, s.row_keys(0, rows), jnp.zeros(rows, jnp.int32), config)
    later = s.choose_tokens(logits, counts, s.row_keys(0, rows), jnp.ones(rows, jnp.int32), config)
    np.testing.assert_array_equal(tokens, again)
    assert (tokens != later).mean() > 0.1


def test_log_probabilities_are_the_models_own():
    tokens = jnp.asarray([3, 1, 4, 1, 5])
    expected = jax.nn.log_softmax(LOGITS)[np.arange(B), np.asarray(tokens)]
    np.testing.assert_allclose(
        s.log_probabilities(jnp.asarray(LOGITS), tokens), expected, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e30),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_fields_out_of_range_are_named(field, value):
    expected = "a finite number" if field == "temperature" else ""
    with pytest.raises(ValueError, match=rf"sampling\.{field}=.*expected {expected}"):
        SamplingConfig(**{field: value})
