"""What a memory checker watches: forward and backward, with and without documents; decode steps.

    XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool memcheck \\
        python tests/kernels/memory_check.py

Sizes are those of the first case of the benchmark, 512 tokens; no number of tokens of a document is
a multiple of a block. The allocator of the platform gives every array an allocation of its own.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case, call, draw, outputs_and_gradients

CASE = Case(
    window=64, batch=1, length=500, num_heads=8, num_kv_heads=8, key_size=128, value_size=128,
    num_slots=64,
)  # fmt: skip
LENGTHS = (5, 290, 4, 168, 33)  # of documents; the second and fourth of the ids are padding
IDS = (1, 0, 2, 0, 3)


def main() -> None:
    inputs = draw(CASE, seed=1, dtype="bfloat16")
    out = inputs["q"][:, ::-1], jnp.ones(inputs["q"].shape[:3], jnp.float32)
    ids = jnp.asarray(np.repeat(np.array(IDS, np.int32), LENGTHS)[None])
    for name, segment_ids in (("documents", ids), ("one document", None)):
        both = jax.jit(
            lambda x, ids: outputs_and_gradients(CASE, "pallas_triton", x, out, segment_ids=ids)
        )
        jax.block_until_ready(both(inputs, segment_ids))
        print(f"forward and backward, {name}: done", flush=True)
    token = {name: x[:, :1] for name, x in inputs.items()}
    for max_length in (64, 8192):
        window = 64 if max_length == 64 else max_length
        case = dataclasses.replace(CASE, length=1, window=window)
        cache = case.cache("bfloat16", max_length=max_length)
        step = jax.jit(
            lambda x, cache, case=case: call(
                case, "pallas_triton", x, cache=cache, return_cache=True
            )
        )
        jax.block_until_ready(step(token, cache))
        print(f"decode step, window {window}: done", flush=True)


if __name__ == "__main__":
    main()
