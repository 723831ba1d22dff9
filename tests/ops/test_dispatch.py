"""Which implementation serves a call, what it refuses and where; rotary tables have no gradient."""

import dataclasses
import logging
import types

import chex
import jax
import jax.numpy as jnp
import pytest
from cases import Case, call, draw
from jax.sharding import AbstractDevice, AbstractMesh

from nha_jax.ops import api, native_hybrid_attention

CASE = Case(window=5, length=40)
PLAIN = Case(window=40, length=24, key_size=16, value_size=16)
KERNELS = ("pallas_triton", "pallas_triton_interpret")


def test_none_chooses_xla_and_says_so_once(caplog):
    api._log_choice.cache_clear()
    inputs = draw(CASE, seed=6, dtype="float32")
    with caplog.at_level(logging.INFO, logger="nha_jax.ops.api"):
        for _ in range(2):
            jax.eval_shape(lambda: call(CASE, None, inputs))
    assert [record.getMessage() for record in caplog.records] == [
        "native_hybrid_attention: implementation=None chose 'xla'"
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "dtype", "chosen"),
    [
        (CASE, "float32", "pallas_triton"),
        (dataclasses.replace(CASE, num_slots=257), "bfloat16", "xla"),
        (Case(window=40, length=40, key_size=64, value_size=64), "bfloat16", "cudnn"),
        (Case(window=39, length=40, key_size=64, value_size=64), "bfloat16", "pallas_triton"),
    ],
)
def test_none_chooses_on_a_gpu(case, dtype, chosen, caplog):
    api._log_choice.cache_clear()
    inputs = draw(case, seed=6, dtype=dtype)
    with caplog.at_level(logging.INFO, logger="nha_jax.ops.api"):
        jax.eval_shape(lambda: call(case, None, inputs))
    remark = "; float32 trains faster through 'xla'" if dtype == "float32" else ""
    assert caplog.records[0].getMessage().endswith(f"chose {chosen!r}{remark}")


def device(kind, capability, version="PJRT C API\ncuda 13000"):
    client = types.SimpleNamespace(platform_version=version)
    found = types.SimpleNamespace(platform="gpu", device_kind=kind, client=client)
    if capability is not None:
        found.compute_capability = capability
    return found


# By the device at hand (None: a CPU): what serves plain causal attention, and any other call.
CHOICES = {
    "cpu": (None, "xla", "xla"),
    "7.5": (device("Tesla T4", "7.5"), "xla", "xla"),
    "8.0": (device("NVIDIA A100-SXM4-40GB", "8.0"), "cudnn", "pallas_triton"),
    "8.9": (device("NVIDIA L4", "8.9"), "cudnn", "pallas_triton"),
    "9.0": (device("NVIDIA H100 80GB HBM3", "9.0"), "cudnn", "pallas_triton"),
    "10.0": (device("NVIDIA B200", "10.0"), "cudnn", "pallas_triton"),
    "unknown": (device("NVIDIA H100 80GB HBM3", None), "xla", "xla"),
    "amd": (device("AMD Instinct MI300X", "9.4", "PJRT C API\nrocm 60000"), "xla", "xla"),
}


def _checked(case, window, dtype):
    inputs = draw(case, seed=6, dtype=dtype)
    rest = dict.fromkeys(("slot_lag", "rope", "scale", "segment_ids", "cache"))
    arrays = (inputs[each] for each in ("q", "k", "v", "log_decay"))
    options = {"window": window, "empty_slots": "mask", "return_cache": False}
    return api.check_call(*arrays, **rest, **options)


def _pretend(monkeypatch, found):
    """That this is the device at hand; None: a CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu" if found is None else "gpu")
    monkeypatch.setattr(jax, "devices", lambda backend=None: [found])


@pytest.mark.parametrize("name", CHOICES)
def test_none_chooses_by_the_device_at_hand(name, monkeypatch):
    found, *expected = CHOICES[name]
    calls = [_checked(PLAIN, window, "bfloat16") for window in (24, 23)]
    _pretend(monkeypatch, found)
    chosen = [api.choose(call, None) for call in calls]
    assert chosen == [api.IMPLEMENTATIONS[each] for each in expected]
    with jax.default_device("cpu"):
        assert api.choose(calls[1], None) == api.IMPLEMENTATIONS["xla"]


def test_choice_says_what_float32_loses(monkeypatch, caplog):
    api._log_choice.cache_clear()
    _pretend(monkeypatch, CHOICES["9.0"][0])
    with caplog.at_level(logging.INFO, logger="nha_jax.ops.api"):
        for dtype in ("bfloat16", "float32", "float32"):
            api.choose(_checked(PLAIN, 5, dtype), None)
    said = [record.getMessage().split("chose ")[1] for record in caplog.records]
    assert said == ["'pallas_triton'", "'pallas_triton'; float32 trains faster through 'xla'"]


REFUSALS = {
    "float64": ("pallas_triton", CASE, "float64", {}, "float64.*bfloat16, float16 and float32"),
    "slots": ("pallas_triton", dataclasses.replace(CASE, num_slots=300), None, {}, "M=300.*256"),
    "key_size": ("pallas_triton", dataclasses.replace(CASE, key_size=258), None, {}, "K=258.*256"),
    "value_size": (KERNELS[1], dataclasses.replace(CASE, value_size=257), None, {}, "V=257.*256"),
    "cudnn_window": ("cudnn", CASE, "bfloat16", {}, "window=5 is shorter than T=40.*slot_lag=5"),
    "cudnn_sink": (
        "cudnn",
        Case(window=40, length=40, empty_slots="sink", key_size=64, value_size=64),
        "bfloat16",
        {"segment_ids": jnp.ones((2, 40), jnp.int32)},
        "empty_slots='sink'; segment_ids",
    ),
    "cudnn_dtype": (
        "cudnn", Case(window=40, length=40), None, {"return_cache": True}, "float32: it takes.*K=",
    ),
}  # fmt: skip


@pytest.mark.parametrize("num_slots", [0, 5])
@pytest.mark.parametrize("given", [False, True], ids=["fresh", "given"])
def test_cudnn_returns_the_cache_after_its_call(given, num_slots, monkeypatch):
    """With XLA's attention in cuDNN's place."""
    real = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *x, implementation, **options: real(*x, implementation="xla", **options),
    )
    monkeypatch.setattr("nha_jax.ops.cudnn.nvidia_compute_capability", lambda: 9.0)
    case = dataclasses.replace(PLAIN, num_slots=num_slots)
    inputs = draw(case, seed=3, dtype="bfloat16")
    cache = case.cache("bfloat16", max_length=30) if given else None
    new = cache.as_new() if given else None
    found = jax.jit(lambda x: call(case, "cudnn", x, cache=new, return_cache=True))(inputs)
    expected = jax.jit(lambda x: call(case, "xla", x, cache=cache, return_cache=True))(inputs)
    chex.assert_trees_all_close(found, expected, atol=0.03, rtol=0.03)
    assert not found[-1].is_new and int(found[-1].length[0]) == case.length
    with pytest.raises(NotImplementedError, match=r"T=24 after a cache: .* at least 128 tokens"):
        jax.eval_shape(lambda x, cache: call(case, "cudnn", x, cache=cache), inputs, found[-1])


def test_a_cache_that_is_called_new_is_empty():
    case, inputs = PLAIN, draw(PLAIN, seed=3, dtype="float32")
    _, cache = call(case, "xla", inputs, return_cache=True)
    with pytest.raises(ValueError, match="cache is called new, but has 24 tokens"):
        call(case, "xla", inputs, return_cache=True, cache=cache.as_new())
    given = case.cache("float32").replace(slots_empty=jnp.zeros((case.batch,), bool))
    with pytest.raises(ValueError, match="cache is called new, but its slots are not empty"):
        call(case, "xla", inputs, cache=given.as_new())


@pytest.mark.parametrize("leaf", ["length", "slots_empty"])
def test_a_cache_that_is_wrongly_called_new_shows_under_jit(leaf):
    case, inputs = PLAIN, draw(PLAIN, seed=3, dtype="float32")
    new = case.cache("float32")
    changed = {"length": new.length.at[1].set(3), "slots_empty": new.slots_empty.at[1].set(False)}
    read = jax.jit(lambda x, cache: call(case, "xla", x, cache=cache.as_new()))
    out = read(inputs, new.replace(**{leaf: changed[leaf]}))
    assert jnp.isfinite(out[0]).all() and jnp.isnan(out[1]).all()
    chex.assert_trees_all_close(out[0], call(case, "xla", inputs)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_named_implementation_never_falls_back(name, x64):
    """It raises where it cannot serve the call, with every reason."""
    implementation, case, dtype, options, reasons = REFUSALS[name]
    inputs = draw(case, seed=7, dtype=dtype or "float32")
    with pytest.raises(
        NotImplementedError, match=f"implementation='{implementation}': .*{reasons}"
    ):
        jax.eval_shape(lambda: call(case, implementation, inputs, **options))


def test_kernels_refuse_to_be_lowered_for_a_cpu():
    inputs = draw(CASE, seed=7, dtype="float32")
    with pytest.raises(NotImplementedError, match=r"pallas_triton.*NVIDIA.*compiled for cpu"):
        jax.jit(lambda x: call(CASE, "pallas_triton", x)).lower(inputs)
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match=r"compiled for cpu.*'xla'"):
            call(CASE, "pallas_triton", inputs)


def test_kernels_are_lowered_for_cuda_without_a_gpu():
    """Under a mesh of one device, as eight of them are at hand here."""
    case = Case(window=5, length=40, num_slots=0)
    shapes = jax.eval_shape(lambda: draw(case, seed=7, dtype="bfloat16"))
    function = jax.jit(lambda x: call(case, "pallas_triton", x))
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = function.trace(shapes).lower(lowering_platforms=("cuda",))
    assert "nha_outputs" in lowered.as_text()


def _rope(positions):
    angles = positions[..., None] * jnp.exp2(-jnp.arange(CASE.key_size // 2))
    return jnp.cos(angles), jnp.sin(angles)


def _loss(implementation, x, rope):
    out = native_hybrid_attention(
        x["q"], x["k"], x["v"], x["log_decay"],
        window=CASE.window, rope=rope, implementation=implementation,
    )  # fmt: skip
    return (out * out).sum()


@pytest.mark.parametrize("implementation", KERNELS)
def test_rotary_tables_have_no_gradient(implementation):
    """Asking for one is an error; a table computed from positions is none, under remat and scan."""
    inputs = draw(CASE, seed=9, dtype="float32")
    x = {name: inputs[name] for name in ("q", "k", "v", "log_decay")}
    positions = jnp.arange(CASE.length, dtype=jnp.float32)[None]

    def learned(x, positions):
        return _loss(implementation, x, _rope(positions))

    for transform in (lambda f: f, jax.jit, jax.checkpoint):
        with pytest.raises(NotImplementedError, match=r"rope.*'xla'.*stop_gradient"):
            jax.eval_shape(jax.grad(transform(learned), argnums=(0, 1)), x, positions)

    def layers(x, positions):
        def layer(carry, positions):
            scaled = x | {"q": x["q"] * carry}
            return carry + jax.checkpoint(learned)(scaled, positions), None

        total, _ = jax.lax.scan(layer, jnp.float32(1), jnp.stack([positions, positions + 1]))
        return total

    def stopped(x, positions):
        return learned(x, jax.lax.stop_gradient(positions))

    for function in (learned, jax.checkpoint(learned), jax.jit(learned), layers, stopped):
        gradients = jax.eval_shape(jax.grad(function), x, positions)
        assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, x)
    both = jax.eval_shape(jax.grad(stopped, argnums=(0, 1)), x, positions)
    assert both[1].shape == positions.shape


@pytest.mark.parametrize("implementation", KERNELS)
def test_rotary_tables_of_a_step_have_no_gradient(implementation):
    """One token with a cache in and out, which runs a kernel of its own."""
    case = dataclasses.replace(CASE, length=1)
    inputs = draw(case, seed=9, dtype="float32")
    tables = {name: inputs.pop(name) for name in ("cos", "sin")}
    slots = CASE.cache("float32")

    def loss(x, tables, slots_k):
        cache = slots.replace(slots_k=slots_k)
        out, cache = call(case, implementation, x | tables, cache=cache, return_cache=True)
        return (out * out).sum() + cache.window_v.sum()

    for arguments in (0, 2, (0, 2)):
        jax.eval_shape(jax.grad(loss, arguments), inputs, tables, slots.slots_k)
    with pytest.raises(NotImplementedError, match=r"rope.*'xla'.*stop_gradient"):
        jax.eval_shape(jax.grad(loss, (0, 1)), inputs, tables, slots.slots_k)
