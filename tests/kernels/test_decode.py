"""The decode kernels against the definition: interpreted on CPU, compiled on a GPU (`-m gpu`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops import init_cache
from nha_jax.ops.checks import check_call
from nha_jax.ops.pallas_decode import serves, step
from nha_jax.ops.reference import reference
from pallas_kernels.decode import Leaves
from pallas_kernels.decode_blocks import DecodeBlocks

# Of the output and slot mass, and of the slots, which are float32 throughout; relative, in norm.
TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}
SLOT_TOLERANCES = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-6, "bfloat16": 1e-6}
# Rotated keys are rounded to their dtype after a product that may be fused or not.
KEY_TOLERANCES = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}
COPIES = ("slots_empty", "window_v", "pending_k", "pending_log_decay", "length", "segment_id")


@dataclasses.dataclass(frozen=True)
class Case:
    """Steps of one layer."""

    window: int
    slot_lag: int | None = None
    max_length: int = 64
    batch: int = 3
    heads: int = 2  # query heads per key/value head
    kv_heads: int = 2
    key_size: int = 12
    value_size: int = 20
    num_slots: int = 6
    empty_slots: str = "mask"
    rope: str = "shared"  # "rows": a table for each row; "none"
    ids: bool = False
    scale: float | None = None
    dtype: str = "float32"
    steps: int = 14

    def cache(self):
        return init_cache(
            self.batch,
            num_kv_heads=self.kv_heads,
            key_size=self.key_size,
            value_size=self.value_size,
            num_slots=self.num_slots,
            window=self.window,
            slot_lag=self.slot_lag,
            max_length=self.max_length,
            dtype=self.dtype,
        )

    def tokens(self, seed: int = 0) -> dict[str, jax.Array]:
        """Arrays whose leading axis is the step."""
        rng = np.random.default_rng(seed)
        lead, g = (self.steps, self.batch, 1), self.kv_heads
        wide = jnp.promote_types(self.dtype, jnp.float32)

        def normal(*shape):
            return jnp.asarray(rng.standard_normal((*lead, *shape)), self.dtype)

        x = {
            "q": normal(g * self.heads, self.key_size),
            "k": normal(g, self.key_size),
            "v": normal(g, self.value_size),
        }
        gates = -np.log1p(np.exp(rng.normal(size=(*lead, g, self.num_slots)))) / 2
        gates *= rng.choice([0, 1, 30], gates.shape)
        x["log_decay"] = jnp.asarray(gates, wide)
        if self.rope != "none":
            rows = 1 if self.rope == "shared" else self.batch
            angles = rng.uniform(0, 6, (self.steps, rows, 1, self.key_size // 2))
            x["cos"], x["sin"] = (
                jnp.asarray(np.cos(angles), wide),
                jnp.asarray(np.sin(angles), wide),
            )
        if self.ids:  # documents of a few tokens, padding in between, so that rows drift apart
            change = rng.uniform(size=lead) < 0.2
            ids = 1 + np.cumsum(change, axis=0) % 3
            x["segment_ids"] = jnp.asarray(
                np.where(rng.uniform(size=lead) < 0.25, 0, ids), jnp.int32
            )
        return x

    def call(self, x: dict[str, jax.Array], cache):
        return check_call(
            x["q"],
            x["k"],
            x["v"],
            x["log_decay"],
            window=self.window,
            slot_lag=self.slot_lag,
            empty_slots=self.empty_slots,
            rope=(x["cos"], x["sin"]) if "cos" in x else None,
            scale=self.scale,
            segment_ids=x.get("segment_ids"),
            cache=cache,
            return_cache=True,
        )


def jit(function, **options):
    if jax.default_backend() == "cpu":
        options["compiler_options"] = {"xla_backend_optimization_level": 0}
    return jax.jit(function, **options)


def run(case: Case, tokens, cache, blocks=None):
    """Every step by the kernel: outputs, slot masses and caches, stacked over steps."""
    interpret = jax.default_backend() == "cpu"

    def one(cache, x):
        call = case.call(x, cache)
        assert serves(call)
        out, mass, cache = step(call, interpret, reference, blocks)
        return cache, (out, mass, cache)

    return jit(lambda cache, x: jax.lax.scan(one, cache, x)[1])(cache, tokens)


def expect(case: Case, tokens, cache):
    """The same by the definition, in float64 on the same rounded inputs where that is at hand."""

    def one(cache, x):
        out, mass, cache = reference(case.call(x, cache))
        return cache, (out, mass, cache)

    return jit(lambda cache, x: jax.lax.scan(one, cache, x)[1])(cache, tokens)


def relative_error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-300))


def check(case: Case, blocks=None, seed=0, cache=None):
    tokens = case.tokens(seed)
    cache = case.cache() if cache is None else cache
    found, expected = run(case, tokens, cache, blocks), expect(case, tokens, cache)
    assert found[0].dtype == case.dtype
    for name, x, y in zip(("out", "slot_mass"), found[:2], expected[:2], strict=True):
        assert np.isfinite(np.asarray(x, np.float64)).all(), name
        assert relative_error(x, y) <= TOLERANCES[case.dtype], name
    if case.ids:  # exactly nothing on padding
        padding = np.asarray(tokens["segment_ids"] == 0)[..., 0]
        assert padding.any()
        assert not np.asarray(found[0], np.float64)[padding].any()
        assert not np.asarray(found[1])[padding].any()
    for name in Leaves._fields:
        x, y = (np.asarray(getattr(result[2], name)) for result in (found, expected))
        if name in COPIES or (name == "window_k" and case.rope == "none"):
            assert (x == y).all(), name
        elif name == "window_k":
            assert relative_error(x, y) <= KEY_TOLERANCES[case.dtype], name
        elif name in ("slots_k", "slots_v"):
            assert relative_error(x, y) <= SLOT_TOLERANCES[case.dtype], name
    return found


def blocks(products: str, splits: int = 1, **changes) -> DecodeBlocks:
    return DecodeBlocks(slots=16, window=16, splits=splits, products=products, **changes)


wide = pytest.mark.wide
CASES = {
    "window": Case(window=5),
    "documents": Case(window=5, ids=True, rope="rows"),
    "sink": Case(window=5, empty_slots="sink", ids=True, scale=0.7),
    "lag_0": Case(window=5, slot_lag=0, ids=True),
    "lag_below_window": Case(window=6, slot_lag=2, ids=True, rope="none"),
    "window_0": Case(window=0, ids=True),
    "window_0_sink": Case(window=0, empty_slots="sink"),
    "no_slots": Case(window=5, num_slots=0, ids=True),
    "window_1": Case(window=1, heads=1),
    "full_attention": Case(window=1000, max_length=16),
    "full_attention_documents": Case(window=1000, max_length=16, ids=True),
    "full_attention_lag": Case(window=1000, slot_lag=3, max_length=16, ids=True),
    "full_attention_lag_0": Case(window=1000, slot_lag=0, max_length=16),
    "full_attention_no_slots": Case(window=1000, num_slots=0, max_length=16),
    "many_slots": Case(window=5, num_slots=90, steps=8),
    "many_rows": Case(window=90, steps=100, max_length=200, batch=2, heads=3),
    "one_of_each": Case(window=3, heads=1, kv_heads=1, key_size=2, value_size=1, num_slots=1),
    "bfloat16": Case(window=5, dtype="bfloat16", ids=True),
    "float16": Case(window=5, dtype="float16", ids=True),
}
QUICK = ("window", "documents", "lag_0", "window_0", "no_slots", "full_attention_lag", "bfloat16")


@pytest.mark.parametrize("variant", ["sum", "dot", "sum-split", "dot-split"])
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=wide) for n in CASES])
def test_steps_interpreted(name, variant):
    """Step after step from an empty cache, wrapping the rings: as the definition."""
    _check_variant(CASES[name], variant)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["default", "sum", "dot", "sum-split", "dot-split", "narrow"])
@pytest.mark.parametrize("name", list(CASES))
def test_steps_compiled(name, variant):
    if variant == "default":
        check(CASES[name])
    elif variant == "narrow":
        check(CASES[name], blocks("dot", narrow_loads=True))
    else:
        _check_variant(CASES[name], variant)


def _check_variant(case: Case, variant: str) -> None:
    products, _, split = variant.partition("-")
    if split and not case.window:
        pytest.skip("no window to split")
    check(case, blocks(products, splits=3 if split else 1))
