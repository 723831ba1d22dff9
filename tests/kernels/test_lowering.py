"""Every kernel is lowered for CUDA without a GPU: the tuned table and the heuristic's corners.

This finds primitives and sizes that the lowering lacks; not wrong numbers, nor too little shared
memory. The device's kind matters from JAX 0.11 on.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import nha_jax.ops.pallas as adapter
from nha_jax.ops import init_cache, native_hybrid_attention
from pallas_kernels import blocks, tune

DEVICES = {
    "sm_80": blocks.Device("NVIDIA A100-SXM4-80GB", 163 * 1024, 108),
    "sm_90": blocks.Device("NVIDIA H100 80GB HBM3", 227 * 1024, 132),
}


@dataclasses.dataclass(frozen=True)
class Case:
    key_size: int
    value_size: int
    num_slots: int
    window: int
    dtype: str = "bfloat16"
    rope: bool = True
    group: int = 1
    documents: bool = False
    cache: bool = False
    length: int = 300
    batch: int = 2
    slot_lag: int | None = None
    empty_slots: str = "mask"

    @property
    def reads_slots(self) -> bool:
        """Whether any may hold something, or is read empty."""
        lag = self.window if self.slot_lag is None else self.slot_lag
        full = not self.cache and self.empty_slots == "mask" and lag >= self.length
        return self.num_slots > 0 and not full

    @property
    def label(self) -> str:
        flags = [name for name in ("rope", "documents", "cache") if getattr(self, name)] + [
            "gqa"
        ] * (self.group > 1)
        sizes = f"K{self.key_size}-V{self.value_size}-M{self.num_slots}-W{self.window}"
        return "-".join([self.dtype, sizes, f"T{self.length}", *flags])


def lower(case: Case, device: blocks.Device, monkeypatch) -> str:
    """The text of forward and backward of a call, lowered for CUDA."""
    monkeypatch.setattr(adapter, "device_at_hand", lambda: device)
    b, t, g = case.batch, case.length, 2
    wide, shape = jnp.float32, jax.ShapeDtypeStruct
    x = {
        "q": shape((b, t, g * case.group, case.key_size), case.dtype),
        "k": shape((b, t, g, case.key_size), case.dtype),
        "v": shape((b, t, g, case.value_size), case.dtype),
    }
    if case.num_slots:
        x["log_decay"] = shape((b, t, g, case.num_slots), wide)
    table = shape((1, t, case.key_size // 2), wide)
    rope = (table, table) if case.rope else None
    ids = shape((b, t), jnp.int32) if case.documents else None
    cache = None
    if case.cache:
        cache = jax.eval_shape(
            lambda: init_cache(
                b, num_kv_heads=g, key_size=case.key_size, value_size=case.value_size,
                num_slots=case.num_slots, window=case.window, slot_lag=case.slot_lag,
                max_length=1000, dtype=case.dtype,
            )
        )  # fmt: skip

    def gradients(x, rope, ids, cache):
        def run(x):
            return native_hybrid_attention(
                x["q"], x["k"], x["v"], x.get("log_decay"),
                window=case.window, slot_lag=case.slot_lag, empty_slots=case.empty_slots,
                rope=rope, segment_ids=ids, cache=cache, return_cache=case.cache,
                return_slot_mass=True, implementation="pallas_triton",
            )  # fmt: skip

        outputs, pull_back = jax.vjp(run, x)
        return outputs, pull_back(outputs)

    kind = AbstractDevice(device_kind=device.kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(gradients).trace(x, rope, ids, cache)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def check(case: Case, device: blocks.Device, monkeypatch) -> None:
    text = lower(case, device, monkeypatch)
    kernels = {"nha_outputs", "nha_query_gradients"}
    slots = {"nha_chunk_states", "nha_adjoint_scan", "nha_slot_key_gradients"}
    slots |= {"nha_adjoint_contributions", "nha_gate_gradients", "nha_outputs_strong"}
    if case.reads_slots:
        kernels |= slots
    else:
        assert not [name for name in slots if name in text]
    if case.window:
        kernels |= {"nha_window_key_gradients"}
    if case.documents and not case.cache:
        kernels |= {"nha_document_tables"}
    assert not [name for name in kernels if name not in text]


def corners() -> list[Case]:
    """Balanced draws: each value of each option as often as the others, beside all the others."""
    rng = np.random.default_rng(0)

    def column(*values):
        return rng.permutation(np.resize(np.array(values, object), 32))

    columns = {
        "key_size": column(16, 80, 128, 256),
        "value_size": column(16, 80, 128, 256),
        "num_slots": column(1, 64, 100, 256),
        "window": column(0, 1, 64, 1000),
        "dtype": column("bfloat16", "float16", "float32"),
        "rope": column(True, False),
        "group": column(1, 4, 3),
        "documents": column(True, False),
        "cache": column(True, False),
        "empty_slots": column("mask", "sink"),
        "length": column(300, 1, 64),
    }
    return [
        Case(**dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]  # fmt: skip


QUICK = [
    Case(128, 128, 64, 64, group=4),
    Case(80, 16, 100, 1, dtype="float32", rope=False, documents=True),
    Case(256, 256, 256, 0, dtype="float16", rope=False),
    Case(16, 80, 1, 1000, cache=True, documents=True, slot_lag=5, empty_slots="sink"),
    Case(64, 64, 0, 64, documents=True),
    Case(128, 128, 64, 64, cache=True, length=1, group=4),
]
LONG = Case(128, 128, 64, 64, group=4, length=131072, batch=1)  # the recurrence in splits
# More chunks than CUDA's second axis holds.
VERY_LONG = dataclasses.replace(LONG, group=1, length=2**23)
WIDE = [LONG, VERY_LONG, *corners()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=case.label) for case in QUICK),
        *(pytest.param(case, id=case.label, marks=pytest.mark.wide) for case in WIDE),
    ],
)
def test_the_heuristics_corners(case, device, monkeypatch):
    check(case, DEVICES[device], monkeypatch)


def test_slots_that_nothing_reaches_are_not_computed(monkeypatch):
    """Full attention over packed documents, as layers of a hybrid model have it."""
    case = Case(128, 128, 64, 300, documents=True, group=4)
    assert not case.reads_slots
    check(case, DEVICES["sm_90"], monkeypatch)


def test_a_long_sequence_is_split(monkeypatch):
    case = dataclasses.replace(LONG, length=4096)
    assert "nha_split_summaries" in lower(case, DEVICES["sm_90"], monkeypatch)


def test_64_bit_types(monkeypatch, x64):
    check(dataclasses.replace(QUICK[0], documents=True), DEVICES["sm_90"], monkeypatch)


GROUPS = {"mha": 1, "gqa": 4, "gqa odd": 3}


def case_of(key: str) -> tuple[str, Case]:
    """The kind of device and a call that a key of the tuned table names."""
    match = re.fullmatch(r"(.+) (\w+) K(\d+) V(\d+) M(\d+) (mha|gqa|gqa odd)( rope)?( wide)?", key)
    assert match, key
    kind, dtype, key_size, value_size, num_slots, heads, rope, wide = match.groups()
    return kind, Case(
        int(key_size), int(value_size), int(num_slots), window=1024 if wide else 64, dtype=dtype,
        rope=bool(rope), group=GROUPS[heads],
    )  # fmt: skip


@pytest.mark.parametrize("shape", tune.SHAPES)
def test_keys_of_the_tuned_table_are_read_back(shape):
    """Those of every shape that is tuned, with rotation and without."""
    sizes = dataclasses.replace(tune.SHAPES[shape], batch=1, length=1024)
    specs = []
    jax.eval_shape(lambda: specs.append(tune._draw(sizes, False)[0]))
    for rope in (True, False):
        key = blocks.table_key("NVIDIA X1 80GB", dataclasses.replace(specs[0], rope=rope))
        kind, case = case_of(key)
        assert kind == "NVIDIA X1 80GB"
        assert (case.key_size, case.value_size, case.num_slots) == (sizes.size, sizes.size, 64)
        assert (case.dtype, case.rope, case.window) == ("bfloat16", rope, sizes.window)
        # Pairs of heads where the shape's group has them.
        group = sizes.num_heads // sizes.num_kv_heads
        assert (case.group == 1, case.group % 2) == (group == 1, group % 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", blocks.table())
def test_the_tuned_table(key, device, monkeypatch):
    """Forward and gradients with an entry's blocks, on the generations that the kernels are for."""
    kind, case = case_of(key)
    entry, device = blocks.table()[key], DEVICES[device]
    own_key = device.kind + key.removeprefix(kind)
    seen = []
    real = blocks.table_key
    monkeypatch.setattr(blocks, "table", lambda: {own_key: entry})
    monkeypatch.setattr(blocks, "table_key", lambda *args: seen.append(real(*args)) or seen[-1])
    check(case, device, monkeypatch)
    assert set(seen) == {own_key}
