"""Block sizes: what the heuristic chooses fits the device, and splits fill it."""

import dataclasses
import itertools
import json

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
SIZES = (1, 16, 17, 80, 128, 130, 256)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_heuristic_fits_shared_memory(device, dtype):
    """For every size that the kernels take: powers of two, within its own estimate."""
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
        row = max(key, value) * spec.dtype.itemsize
        tiles = blocks._TILES[spec.dtype.itemsize]
        assert forward.chunk == 16 or tiles * forward.chunk * row <= device.shared_memory
        assert 16 <= forward.chunk <= 64
        for part in (forward, backward):
            for field in dataclasses.fields(part):
                block = getattr(part, field.name)
                if isinstance(block, Block):
                    for size in (block.slots, block.walk, block.own, forward.chunk):
                        assert 16 <= size <= 64
                        assert size & (size - 1) == 0


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
        count = blocks.splits(spec, batch, forward, device.multiprocessors)
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
