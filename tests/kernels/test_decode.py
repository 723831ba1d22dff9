"""The decode kernels against the definition: interpreted on CPU, compiled on a GPU (`-m gpu`)."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.ops import init_cache
from nha_jax.ops.checks import check_call
from nha_jax.ops.pallas_decode import serves, step
from nha_jax.ops.reference import reference
from nha_jax.ops.xla import xla
from pallas_kernels.blocks import Device
from pallas_kernels.decode import decode_step
from pallas_kernels.decode_blocks import DecodeBlocks
from pallas_kernels.decode_leaves import Leaves

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
VARIANTS = ("sum", "dot", "sum-split", "dot-split")
QUICK = {
    ("window", "sum"),
    ("documents", "dot"),
    ("documents", "sum-split"),
    ("window_0", "dot"),
    ("no_slots", "dot-split"),
    ("full_attention_lag", "dot"),
    ("full_attention_lag", "sum-split"),
    ("bfloat16", "dot"),
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(n, v, marks=() if (n, v) in QUICK else wide)
        for n, case in CASES.items()
        for v in VARIANTS
        if case.window or "split" not in v
    ],
)
def test_steps_interpreted(name, variant):
    """Step after step from an empty cache, wrapping the rings: as the definition."""
    _check_variant(CASES[name], variant)


PLATFORMS = [pytest.param("cpu"), pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("splits", [1, pytest.param(3, marks=wide)])
def test_heads_of_several_products(splits, platform):
    """Twenty by sixteen: the last product is padded; tiles of slots and rows in loops."""
    case = Case(window=90, num_slots=90, heads=20, kv_heads=2, batch=2, max_length=90, ids=True)
    check(case, blocks("dot", splits, heads=16), cache=_filled(case))


@pytest.mark.parametrize("variant", ["sum", pytest.param("dot-split", marks=wide)])
def test_float64_interpreted(variant, x64):
    _check_variant(dataclasses.replace(CASES["documents"], dtype="float64"), variant)


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


def _filled(case: Case, seed: int = 5):
    """A cache with something everywhere: slots of the caller's, rows of different lengths."""
    rng = np.random.default_rng(seed)

    def fill(x):
        return jnp.asarray(rng.standard_normal(x.shape), x.dtype)

    cache = case.cache()
    floats = ("slots_k", "slots_v", "window_k", "window_v", "pending_k")
    rows = np.arange(case.batch)
    return cache.replace(
        **{name: fill(getattr(cache, name)) for name in floats},
        pending_log_decay=-abs(fill(cache.pending_log_decay)),
        slots_empty=jnp.asarray(rows % 2 == 1),
        length=jnp.asarray(3 + 4 * rows, jnp.int32),
        segment_id=jnp.asarray(1 + rows % 2, jnp.int32),
        segment_length=jnp.asarray(3 + 3 * rows, jnp.int32),
    )


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("variant", [pytest.param("sum", marks=wide), "dot-split"])
def test_any_cache_can_be_continued(variant, platform):
    """The caller's slots, rows of different lengths; the ring and pending rows as they were."""
    for case in (Case(window=5, ids=True, steps=3), Case(window=6, slot_lag=3, steps=3)):
        products, _, split = variant.partition("-")
        check(case, blocks(products, splits=3 if split else 1), cache=_filled(case))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("variant", ["sum", "dot", "dot-split"])
def test_padding_leaves_the_cache_bitwise_unchanged(variant, platform):
    """Rows with id 0, beside a row that goes on and one that starts a document."""
    case = Case(window=5, batch=4, ids=True, steps=1)
    products, _, split = variant.partition("-")
    tokens, cache = case.tokens(), _filled(case)
    tokens["segment_ids"] = jnp.asarray([0, 2, 3, 0], jnp.int32)[None, :, None]
    _, _, after = run(case, tokens, cache, blocks(products, splits=3 if split else 1))
    for name in Leaves._fields:
        x, y = np.asarray(getattr(cache, name)), np.asarray(getattr(after, name))[0]
        assert (x[[0, 3]] == y[[0, 3]]).all(), name
        assert (x[1] != y[1]).any() or name in ("segment_id", "slots_empty"), name


def _one_step(case: Case, blocks=None):
    """A function of float arrays alone, for transformations; general calls go to XLA."""
    interpret = jax.default_backend() == "cpu"
    tokens = {n: x[0] for n, x in case.tokens().items()}
    cache = _filled(case)
    names = [n for n in Leaves._fields if jnp.issubdtype(getattr(cache, n).dtype, jnp.floating)]
    floats = {n: getattr(cache, n) for n in names}
    floats |= {n: x for n, x in tokens.items() if n != "segment_ids"}

    def function(floats, kernel=True, length=cache.length):
        changes = {n: floats[n] for n in names}
        x = tokens | {n: floats[n] for n in tokens if n in floats}
        call = case.call(x, cache.replace(**changes, length=length))
        return step(call, interpret, xla, blocks) if kernel else xla(call)

    return function, floats


def _assert_close(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("platform", PLATFORMS)
def test_gradients_are_those_of_the_general_implementation(platform):
    """Through output, slot mass and every floating leaf, in and out; integer leaves pass by."""
    function, floats = _one_step(Case(window=5, ids=True))

    def loss(floats, kernel):
        out, mass, cache = function(floats, kernel)
        parts = [out, mass, *(x for x in jax.tree.leaves(cache) if x.dtype == jnp.float32)]
        return sum((jnp.sin(x) * (i + 1)).sum() for i, x in enumerate(parts))

    gradient = jit(jax.value_and_grad(loss), static_argnums=1)
    found = gradient(floats, True)
    _assert_close(found, gradient(floats, False))
    assert all(np.asarray(x).any() for x in jax.tree.leaves(found[1]))


def _two_calls(variant: str):
    """A function of arrays that differ between two calls and lengths that do; both stacked."""
    products, _, split = variant.partition("-")
    case = Case(window=5, ids=True, batch=2)
    function, floats = _one_step(case, blocks(products, splits=3 if split else 1))
    shared = {n: floats.pop(n) for n in ("k", "cos", "window_v", "slots_k")}
    many = jax.tree.map(lambda x: jnp.stack([x, -2 * x]), floats)
    many["pending_log_decay"] = -abs(many["pending_log_decay"])
    many["log_decay"] = -abs(many["log_decay"])
    lengths = jnp.asarray([[3, 7], [12, 20]], jnp.int32)
    return (lambda x, length: function(x | shared, length=length)), many, lengths


def _one_by_one(function, many, lengths):
    function = jit(function)
    results = [function(jax.tree.map(lambda x, i=i: x[i], many), lengths[i]) for i in range(2)]
    return jax.tree.map(lambda *x: jnp.stack(x), *results)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("variant", ["sum", pytest.param("dot-split", marks=wide)])
def test_vmap_over_some_of_the_arrays(variant, platform):
    function, many, lengths = _two_calls(variant)
    expected = _one_by_one(function, many, lengths)
    _assert_close(jit(jax.vmap(function))(many, lengths), expected)


WIDE_PLATFORMS = [pytest.param("cpu", marks=wide), pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("platform", WIDE_PLATFORMS)
def test_vmap_of_vmap(platform):
    function, many, lengths = _two_calls("dot")
    expected = _one_by_one(function, many, lengths)
    twice = jax.tree.map(lambda x: x[None], (many, lengths))
    _assert_close(
        jit(jax.vmap(jax.vmap(function)))(*twice), jax.tree.map(lambda x: x[None], expected)
    )


@pytest.mark.parametrize("platform", WIDE_PLATFORMS)
def test_vmap_of_gradients_and_remat(platform):
    function, many, lengths = _two_calls("dot")

    def loss(x, length):
        return (function(x, length)[0] ** 2).sum()

    expected = _one_by_one(jax.grad(loss), many, lengths)
    _assert_close(jit(jax.vmap(jax.grad(loss)))(many, lengths), expected)
    _assert_close(jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(many, lengths), expected)


def test_other_calls_are_not_served():
    case = Case(window=5)
    x = {n: a[0] for n, a in case.tokens().items()}
    call = case.call(x, case.cache())
    assert serves(call)
    assert not serves(dataclasses.replace(call, return_cache=False))
    assert not serves(dataclasses.replace(call, cache=None))
    longer = {n: jnp.concatenate([a, a], axis=1) for n, a in x.items()}
    assert not serves(case.call(longer, case.cache()))


# --- lowering for CUDA, on any machine ------------------------------------------------------------


def _lowered(dtype: str, size: int, num_slots: int, window: int, lag: int, heads: int, ids: bool):
    """The CUDA lowering of a step with `default_blocks`, its cache donated."""
    b, g = 2, 2
    cache = jax.eval_shape(
        lambda: init_cache(
            b,
            num_kv_heads=g,
            key_size=size,
            value_size=size,
            num_slots=num_slots,
            window=window,
            slot_lag=lag,
            max_length=window,
            dtype=dtype,
        )
    )
    leaves = Leaves(**{name: getattr(cache, name) for name in Leaves._fields})

    def shape(*axes, dtype=dtype):
        return jax.ShapeDtypeStruct(axes, dtype)

    def run(q, k, v, log_decay, leaves, rope, ids):
        return decode_step(
            *(q, k, v, log_decay, leaves, rope, ids),
            window=window,
            slot_lag=lag,
            mask_empty=True,
            scale=1.0,
            interpret=False,
        )

    arguments = (
        shape(b, 1, g * heads, size),
        shape(b, 1, g, size),
        shape(b, 1, g, size),
        shape(b, 1, g, num_slots, dtype="float32"),
        leaves,
        (shape(1, 1, size // 2, dtype="float32"),) * 2,
        shape(b, 1, dtype="int32") if ids else None,
    )
    with _abstract_gpu():
        traced = jax.jit(run, donate_argnums=4).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def _abstract_gpu():
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.mark.parametrize("window", [64, 5000])
@pytest.mark.parametrize("size", [16, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=wide)])
def test_lowers_for_cuda(dtype, size, window):
    """Every part of the state, and only it, aliases an output: the step copies no ring."""
    text = _lowered(dtype, size, size, window, window, heads=4, ids=True)
    kernels = [line for line in text.splitlines() if "@__gpu$xla.gpu.triton" in line]
    assert len(kernels) == (1 if window == 64 else 2)
    assert kernels[0].count("output_operand_alias<") == 6


@pytest.mark.parametrize(
    ("num_slots", "lag", "heads"), [(0, 64, 1), (1, 0, 8), (256, 7, 64), (200, 64, 3)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_options_lower_for_cuda(dtype, num_slots, lag, heads):
    assert "xla.gpu.triton" in _lowered(dtype, 128, num_slots, 64, lag, heads, ids=False)


@pytest.mark.parametrize(("shared_memory", "stages"), [(99 * 1024, 1), (163 * 1024, 3)])
def test_default_blocks_are_those_of_the_device_at_hand(shared_memory, stages, monkeypatch):
    device = Device("", shared_memory, 58)
    monkeypatch.setattr("pallas_kernels.decode.device_at_hand", lambda: device)
    text = _lowered("bfloat16", 256, 256, 64, 64, heads=64, ids=False)
    assert f"num_stages = {stages} : i32" in text
