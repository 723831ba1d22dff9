"""Block sizes: what the heuristic chooses fits the device, and splits fill it."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import blocks
from pallas_kernels.blocks import BackwardBlocks, Block, Device, ForwardBlocks
from pallas_kernels.spec import Spec

SPEC = Spec(
    rows=4096,
    past=0,
    num_heads=8,
    num_kv_heads=8,
    key_size=128,
    value_size=128,
    num_slots=64,
    window=64,
    lag=64,
    scale=1.0,
    sink=False,
    rope=True,
    tables=False,
    dtype=jnp.dtype("bfloat16"),
)
# Of compute capability 9.0, 8.0, 8.6 and 7.5.
DEVICES = [
    Device("a", 227 * 1024, 132),
    Device("b", 163 * 1024, 108),
    Device("c", 99 * 1024, 84),
    Device("d", 64 * 1024, 40),
]
# For calls with K = V, M = W = 64, rotation and groups of four heads, by chunk and `reload`: the
# most bytes of shared memory that the compiler reports for a kernel (JAX 0.11.2); where they do not
# fit, those of some kernel. Of float32, whose operands go through registers, the chunks that these
# have room for.
MEASURED = {
    "sm_80": {
        ("bfloat16", 64): {(64, False): 57344},
        ("bfloat16", 128): {(32, False): 57344, (64, False): 102400},
        ("bfloat16", 256): {(16, False): 51200, (32, False): 106496, (64, False): 184320},
        ("float32", 64): {(32, False): 67584},
        ("float32", 128): {(16, False): 53760},
        ("float32", 256): {(16, True): 100352, (16, False): 102912},
    },
    "sm_90": {
        ("bfloat16", 64): {(64, False): 65536},
        ("bfloat16", 256): {(64, False): 212992},
        ("float32", 256): {(16, False): 102912},
    },
}
L4, A100, H100 = 99 * 1024, 163 * 1024, 227 * 1024
SIZES = (1, 16, 17, 80, 128, 130, 256)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_every_size_gets_tiles(device, dtype):
    """For every size that the kernels take: powers of two."""
    for key, value, slots, rope in itertools.product(SIZES, SIZES, (0, 1, 100, 256), (0, 1)):
        spec = dataclasses.replace(
            SPEC,
            key_size=2 * key if rope and key % 2 else key,
            value_size=value,
            num_slots=slots,
            rope=bool(rope),
            dtype=jnp.dtype(dtype),
        )
        forward, backward = blocks.choose(spec, device)
        assert 16 <= forward.chunk <= 64
        for part in (forward, backward):
            for field in dataclasses.fields(part):
                block = getattr(part, field.name)
                if isinstance(block, Block):
                    for size in (block.slots, block.walk, block.own, forward.chunk):
                        assert 16 <= size <= 64
                        assert size & (size - 1) == 0


@pytest.mark.parametrize(
    ("shared_memory", "generation", "dtype", "size"),
    [
        (memory, generation, *case)
        for memory, generation in ((L4, "sm_80"), (A100, "sm_80"), (H100, "sm_90"))
        for case in MEASURED[generation]
    ],
)
def test_the_largest_chunk_whose_kernels_fit(shared_memory, generation, dtype, size):
    """By what the compiler reported, not by the estimate; of float32 what registers hold, too."""
    spec = dataclasses.replace(
        SPEC, num_heads=32, key_size=size, value_size=size, dtype=jnp.dtype(dtype)
    )
    forward, backward = blocks.choose(spec, Device("", shared_memory, 108))
    needs = MEASURED[generation][dtype, size]
    chosen = forward.chunk, backward.adjoint.reload
    assert backward.slot_keys.reload == backward.adjoint.reload
    fitting = [key for key, need in needs.items() if need <= shared_memory]
    # Nothing is loaded again where it need not be.
    assert chosen == max(fitting, key=lambda key: (key[0], not key[1]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("size", "chunks"), [(16, (32, 32)), (64, (32, 16)), (128, (16, 16))])
def test_wide_operands_fit_registers(dtype, size, chunks):
    """With larger tiles exact products spill: calls took up to seven times as long (H100)."""
    for key, value in ((size, 16), (16, size)):
        spec = dataclasses.replace(
            SPEC, key_size=key, value_size=value, dtype=jnp.dtype(dtype), rope=False
        )
        forward, _ = blocks.choose(spec, DEVICES[0])
        assert forward.chunk == chunks[dtype == "float64"]
    # Tests on a CPU see the chunks that 16-bit calls have on a GPU.
    interpreted = dataclasses.replace(spec, interpret=True)
    narrow = dataclasses.replace(interpreted, dtype=jnp.dtype("bfloat16"))
    if dtype == "float32":
        assert blocks.choose(interpreted, DEVICES[0]) == blocks.choose(narrow, DEVICES[0])


def test_the_device_at_hand(monkeypatch):
    """What a GPU says of itself; without one, or if it says nothing, what an A100 has at least."""
    assert blocks.device_at_hand().shared_memory == 166912
    gpu = SimpleNamespace(
        device_kind="some GPU", shared_memory_per_block_optin=101376, core_count=58
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert blocks.device_at_hand() == Device("some GPU", 101376, 58)
    del gpu.shared_memory_per_block_optin, gpu.core_count
    assert blocks.device_at_hand() == Device("some GPU", 166912, 132)


def test_heuristic_keeps_its_sizes_where_they_fit():
    """The measured defaults at the sizes of the published models."""
    assert blocks.heuristic(SPEC, DEVICES[0]) == (ForwardBlocks(), BackwardBlocks())
    wide = dataclasses.replace(SPEC, key_size=256, value_size=256, dtype=jnp.dtype("float32"))
    assert blocks.heuristic(wide, DEVICES[0])[0].chunk < ForwardBlocks().chunk


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 15, 64, 1000, 8192, 131072])
@pytest.mark.parametrize("batch", [1, 8, 1000])
def test_splits_fill_the_device(device, rows, batch):
    """No more splits than fill it twice, each long enough to be worth its summary."""
    for slots, heads, lag in itertools.product((0, 1, 64, 256), (1, 8), (0, 64, 10**6)):
        spec = dataclasses.replace(
            SPEC, rows=rows, num_slots=slots, num_kv_heads=heads, lag=lag, window=lag
        )
        forward, _ = blocks.choose(spec, device)
        count = blocks.enough_splits(spec, batch, forward, device.multiprocessors)
        chunks = spec.chunks(forward.chunk)
        assert forward.chunk < 2 * max(rows, 16)
        assert 1 <= count <= max(1, chunks // 8)
        programs = batch * heads * max(1, -(-slots // forward.states.slots))
        if count > 1:
            assert count > 2
            assert programs * count <= 2 * device.multiprocessors
        elif chunks >= 24:
            assert programs * 3 > 2 * device.multiprocessors


def test_a_tuned_table_is_read_back(tmp_path, monkeypatch):
    tuned = (
        ForwardBlocks(chunk=32, outputs=Block(num_warps=8)),
        BackwardBlocks(window=Block(walk=16)),
    )
    key = blocks.table_key("a", SPEC)
    path = tmp_path / "tuned.json"
    names = ("forward", "backward")
    entry = {name: dataclasses.asdict(part) for name, part in zip(names, tuned, strict=True)}
    path.write_text(json.dumps({"entries": {key: entry}}))
    monkeypatch.setattr(blocks, "TABLE", path)
    blocks.table.cache_clear()
    try:
        forward, backward = blocks.choose(SPEC, DEVICES[0])
        other, _ = blocks.choose(SPEC, DEVICES[1])
    finally:
        blocks.table.cache_clear()
    assert (forward, backward) == tuned
    assert other.chunk == ForwardBlocks().chunk
