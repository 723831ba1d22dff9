"""Default block sizes of the decode kernels: they fit the device's shared memory."""

import dataclasses
import itertools

import jax.numpy as jnp
import pytest

from pallas_kernels.blocks import Device
from pallas_kernels.decode_blocks import DecodeBlocks, DecodeSpec, default_blocks

# Of compute capability 9.0, 8.0 and 8.9.
H100, A100, L4 = (
    Device("H100", 227 * 1024, 132),
    Device("A100", 163 * 1024, 108),
    Device("L4", 99 * 1024, 58),
)
BOUNDLESS = Device("", 2**40, 132)
SPEC = DecodeSpec(
    batch=2,
    kv_heads=2,
    heads=64,
    key_size=256,
    value_size=256,
    num_slots=64,
    capacity=64,
    pending=64,
    window=64,
    slot_lag=64,
    mask_empty=True,
    scale=1.0,
    rope=True,
    has_ids=True,
    dtype=jnp.dtype("bfloat16"),
    interpret=False,
)
# Of dtype, M, W and R, with K = V = 256 and documents: the bytes of shared memory that the compiler
# reports (JAX 0.11.2, for compute capability 8.9) by `heads`, where a product takes fewer than all
# of R, and `num_stages`.
MEASURED = {
    ("bfloat16", 256, 64, 64): {(64, 3): 147712, (64, 2): 114816, (64, 1): 81920},
    ("bfloat16", 64, 5000, 64): {(64, 3): 102912, (64, 2): 70144, (64, 1): 53760},
    ("bfloat16", 256, 64, 16): {(64, 3): 98560, (64, 2): 65664, (64, 1): 40960},
    ("bfloat16", 64, 5000, 16): {(64, 3): 75008, (64, 2): 42240, (64, 1): 25856},
    ("float32", 0, 64, 64): {(64, 1): 131072, (32, 1): 81920, (16, 1): 49152},
    ("float32", 64, 64, 64): {(64, 1): 131072, (32, 1): 81920, (16, 1): 49152},
    ("float32", 256, 64, 64): {(64, 1): 131072, (32, 1): 81920, (16, 1): 49152},
    ("float32", 64, 5000, 64): {(64, 1): 147456, (32, 1): 81920, (16, 1): 49152},
    ("float32", 256, 5000, 64): {(64, 1): 172032, (32, 1): 81920},
    ("float32", 256, 64, 16): {(64, 2): 84096},
    ("float32", 64, 5000, 8): {(64, 2): 83968},
}


@pytest.mark.parametrize("case", MEASURED)
@pytest.mark.parametrize("device", [H100, A100, L4], ids=lambda device: device.kind)
def test_measured_needs_fit(device, case):
    """With the most heads and stages that do."""
    dtype, num_slots, capacity, heads = case
    spec = dataclasses.replace(
        SPEC, dtype=jnp.dtype(dtype), num_slots=num_slots, capacity=capacity, heads=heads
    )
    chosen = default_blocks(spec, device)
    needs = MEASURED[case]
    assert needs[chosen.heads, chosen.num_stages] <= device.shared_memory
    if device is H100:
        assert (chosen.heads, chosen.num_stages) == max(needs)


def test_the_measured_need_of_smaller_keys_fits():
    """114,688 bytes with K = V = 128 and all 64 heads in a product: too many for an L4 alone."""
    spec = dataclasses.replace(
        SPEC,
        key_size=128,
        value_size=128,
        num_slots=256,
        capacity=5000,
        dtype=jnp.dtype("float32"),
    )
    assert default_blocks(spec, L4).heads == 32
    assert default_blocks(spec, A100).heads == default_blocks(spec, H100).heads == 64


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_an_h100_changes_nothing(dtype):
    """What was measured there stays: only devices of less memory take smaller blocks."""
    for heads, key, value, slots, rows, batch in itertools.product(
        (1, 3, 8, 16, 17, 64), (16, 80, 256), (64, 256), (0, 64, 256), (0, 64, 5000), (1, 64)
    ):
        spec = dataclasses.replace(
            SPEC,
            batch=batch,
            heads=heads,
            key_size=key,
            value_size=value,
            num_slots=slots,
            capacity=rows,
            dtype=jnp.dtype(dtype),
        )
        assert default_blocks(spec, H100) == default_blocks(spec, BOUNDLESS)


def test_blocks_of_an_h100():
    """The measured defaults, by value."""
    small = dataclasses.replace(SPEC, heads=4, key_size=128, value_size=128)
    assert default_blocks(small, H100) == DecodeBlocks(
        slots=16, window=64, splits=1, products="dot", narrow_loads=True
    )
    long = dataclasses.replace(small, capacity=5000, dtype=jnp.dtype("float32"))
    assert default_blocks(long, H100) == DecodeBlocks(
        slots=32, window=32, splits=39, products="sum", num_stages=2
    )
    assert default_blocks(SPEC, H100) == DecodeBlocks(
        slots=16, window=32, splits=1, products="dot", narrow_loads=True, num_warps=8
    )
