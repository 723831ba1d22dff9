"""Finds block sizes on the GPU at hand and writes them into the table that ships with the kernels.

    python -m pallas_kernels.tune                    # all shapes, into pallas_kernels/tuned.json
    python -m pallas_kernels.tune --shapes k128_mha  # one of them; the others' entries stay
    python -m pallas_kernels.tune --kernels window   # one kernel; the others stay as they are
    python -m pallas_kernels.tune --output new.json  # into a copy of the table

Kernels are tuned one after another: they share nothing but the chunk. Each is timed with what is
launched with it, its second launch for strong chunks or, of the adjoint and its scan, one another.
A candidate that does not compile (too much shared memory) or run is left out, and printed.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import blocks as choice
from pallas_kernels.adjoint import adjoint_states
from pallas_kernels.benchmarks.errors import in_one_line
from pallas_kernels.blocks import BackwardBlocks, Block, ForwardBlocks
from pallas_kernels.outputs import outputs
from pallas_kernels.queries import Cotangents, query_gradients
from pallas_kernels.slot_gates import gate_gradients
from pallas_kernels.slot_keys import slot_key_gradients
from pallas_kernels.spec import Operands, Spec, rotary_table
from pallas_kernels.states import chunk_states
from pallas_kernels.window_keys import window_key_gradients


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call to tune for, in bfloat16 with rotation; table entries do not depend on B, T and W."""

    batch: int
    length: int
    num_heads: int
    num_kv_heads: int
    size: int  # K = V
    num_slots: int = 64
    window: int = 64


SHAPES = {
    "k128_mha": Shape(8, 2048, 8, 8, 128),
    "k128_gqa": Shape(1, 8192, 32, 8, 128),
    "k128_odd": Shape(1, 8192, 24, 8, 128),
    "k64_mha": Shape(16, 4096, 16, 16, 64),
    "k64_gqa": Shape(4, 4096, 16, 4, 64),
    "k256_mha": Shape(8, 2048, 4, 4, 256),
    "k128_wide": Shape(1, 16384, 32, 8, 128, window=1024),
}
# What is tried, by kernel; the rest of a block stays as the heuristic has it.
CANDIDATES: dict[str, dict[str, tuple]] = {
    "states": {"num_warps": (4, 8), "num_stages": (2, 3, 4), "slots": (16, 32)},
    "outputs": {
        "num_warps": (4, 8),
        "walk": (32, 64, 128),
        "num_stages": (1, 2, 3),
        "heads": (1, 2),
    },
    "queries": {"num_warps": (4, 8), "walk": (32, 64), "num_stages": (1, 2, 3), "heads": (1, 2)},
    "adjoint": {"num_warps": (4, 8), "slots": (32, 64), "products": (True, False)},
    "scan": {"num_warps": (4, 8), "slots": (8, 16, 32)},
    "window": {
        "num_warps": (4, 8),
        "num_stages": (1, 2),
        "own": (32, 64, 128),
        "walk": (32, 64),
    },
    "slot_keys": {"num_warps": (4, 8), "slots": (32, 64), "products": (True, False)},
    "slot_gates": {"num_warps": (4, 8), "slots": (16, 32, 64)},
}

Candidate = tuple[Block, Callable[..., Any], tuple]
# From compiled calls to their kernel times in milliseconds; None: it failed.
Measure = Callable[[list[tuple[Callable[..., Any], tuple]]], list[float | None]]


def candidates(kernel: str, start: Block, group: int) -> Iterator[Block]:
    """The block sizes to try for a kernel, the one to start from first.

    Groups of `group` heads must make whole programs of several heads.
    """
    yield start
    options = CANDIDATES[kernel]
    for values in itertools.product(*options.values()):
        block = dataclasses.replace(start, **dict(zip(options, values, strict=True)))
        if block != start and group % block.heads == 0:
            yield block


def tune(
    shape: Shape,
    start: tuple[ForwardBlocks, BackwardBlocks],
    measure: Measure,
    interpret: bool,
    kernels: Collection[str] = tuple(CANDIDATES),
) -> tuple[ForwardBlocks, BackwardBlocks, dict[str, float]]:
    """The fastest blocks of each of the kernels for a shape, and their milliseconds.

    Kernels that are not asked for keep the blocks that they start with.

    Raises:
      RuntimeError: no candidate of a kernel ran.
    """
    spec, x, d_out = _draw(shape, interpret)
    forward, backward = start
    chunk, times = forward.chunk, {}

    def best(kernel: str, begin: Block, run: Callable[..., Any], *args: Any) -> Block:
        if kernel not in kernels:
            return begin
        tried = list(candidates(kernel, begin, spec.group))
        found = measure([(functools.partial(run, block), args) for block in tried])
        done = [(ms, i) for i, ms in enumerate(found) if ms is not None]
        if not done:
            raise RuntimeError(f"{kernel}: no candidate ran for {shape}")
        times[kernel], i = min(done)
        return tried[i]

    def with_states(block: Block, x: Operands):
        return chunk_states(spec, dataclasses.replace(forward, states=block), x)

    forward = dataclasses.replace(forward, states=best("states", forward.states, with_states, x))
    states = jax.jit(functools.partial(with_states, forward.states))(x)

    def with_outputs(block: Block, *args):
        return outputs(spec, dataclasses.replace(forward, outputs=block), *args)

    block = best("outputs", forward.outputs, with_outputs, x, states)
    forward = dataclasses.replace(forward, outputs=block)
    results = jax.jit(functools.partial(with_outputs, block))(x, states)
    cotangents = Cotangents(d_out, None)

    def with_queries(block: Block, *args):
        return query_gradients(spec, chunk, block, *args)

    args: tuple = (x, states, results, cotangents)
    backward = dataclasses.replace(
        backward, queries=best("queries", backward.queries, with_queries, *args)
    )
    queries = jax.jit(functools.partial(with_queries, backward.queries))(*args)
    args = (*args, queries)
    without_final = (*args, None)

    def with_adjoint(block: Block, *args: Any):
        return adjoint_states(spec, chunk, block, backward.scan, *args)

    backward = dataclasses.replace(
        backward, adjoint=best("adjoint", backward.adjoint, with_adjoint, *without_final)
    )

    def with_scan(block: Block, *args: Any):
        return adjoint_states(spec, chunk, backward.adjoint, block, *args)

    backward = dataclasses.replace(
        backward, scan=best("scan", backward.scan, with_scan, *without_final)
    )
    adjoint, _ = jax.jit(functools.partial(with_scan, backward.scan))(*without_final)

    def with_window(block: Block, *args):
        return window_key_gradients(spec, block, *args)

    window_args = (x, results, cotangents, queries)
    backward = dataclasses.replace(
        backward, window=best("window", backward.window, with_window, *window_args)
    )
    window = jax.jit(functools.partial(with_window, backward.window))(*window_args)
    args = (*args, adjoint)

    def with_slot_keys(block: Block, *args):
        return slot_key_gradients(spec, chunk, block, *args)

    def with_gates(block: Block, *args):
        return gate_gradients(spec, chunk, block, *args)

    backward = dataclasses.replace(
        backward,
        slot_keys=best("slot_keys", backward.slot_keys, with_slot_keys, *args, window),
        slot_gates=best("slot_gates", backward.slot_gates, with_gates, x, states, adjoint),
    )
    return forward, backward, times


def spec_of(shape: Shape, interpret: bool = False) -> Spec:
    """Sizes of a shape's call, which name its entry in the table."""
    return Spec(
        rows=shape.length,
        past=0,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        key_size=shape.size,
        value_size=shape.size,
        num_slots=shape.num_slots,
        window=shape.window,
        lag=shape.window,
        scale=shape.size**-0.5,
        sink=False,
        rope=True,
        tables=False,
        dtype=jnp.dtype(jnp.bfloat16),
        interpret=interpret,
    )


def _draw(shape: Shape, interpret: bool) -> tuple[Spec, Operands, jax.Array]:
    """Random operands of a shape: gates `logsigmoid(normal) / 8`, as at the start of training."""
    keys = jax.random.split(jax.random.key(0), 6)

    def normal(key, heads, size=shape.size, dtype=jnp.bfloat16):
        return jax.random.normal(key, (shape.batch, shape.length, heads, size), dtype)

    angles = jax.random.uniform(keys[4], (1, shape.length, shape.size // 2), maxval=6.28)
    rotation = rotary_table((jnp.cos(angles), jnp.sin(angles)), jnp.bfloat16)
    gates = normal(keys[3], shape.num_kv_heads, shape.num_slots, jnp.float32)
    fields = dict.fromkeys(Operands._fields) | {
        "q": normal(keys[0], shape.num_heads),
        "k": normal(keys[1], shape.num_kv_heads),
        "v": normal(keys[2], shape.num_kv_heads),
        "log_decay": jax.nn.log_sigmoid(gates) / 8,
        "rotation": rotation,
    }
    return spec_of(shape, interpret), Operands(**fields), normal(keys[5], shape.num_heads)


def _measure(runs: int, timer: str) -> Measure:
    from pallas_kernels.benchmarks.timing import measure

    def compiled(call):
        run, args = call
        try:
            return jax.jit(run).lower(*args).compile()
        except Exception as error:
            return error

    def all_of(calls):
        with ThreadPoolExecutor(8) as pool:
            programs = list(pool.map(compiled, calls))
        found: list[float | None] = []
        for (run, args), program in zip(calls, programs, strict=True):
            block = run.args[0]
            try:
                if isinstance(program, Exception):
                    raise program
                result = measure(lambda _, p=program, a=args: p(*a), runs=runs, timer=timer)
                found.append(result.median)
                print(f"  {found[-1]:8.4f} ms  {block}", flush=True)
            except Exception as error:
                found.append(None)
                print(f"  left out     {block}: {in_one_line(error, 120)}", flush=True)
        return found

    return all_of


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    args = _parse(arguments)
    if jax.default_backend() != "gpu":
        sys.exit("pallas_kernels.tune: JAX sees no GPU here; block sizes are found by running them")
    device = choice.device_at_hand()
    source = args.output if args.output.exists() else choice.TABLE
    report = json.loads(source.read_text()) if source.exists() else {"entries": {}}
    entries = report["entries"]
    for name in args.shapes:
        shape = SHAPES[name]
        spec = spec_of(shape)
        key = choice.table_key(device.kind, spec)
        start, known = choice.heuristic(spec, device), {}
        if len(args.kernels) < len(CANDIDATES):
            narrow = choice.table_key(device.kind, dataclasses.replace(spec, window=0))
            if key in entries or narrow in entries:
                start = choice.blocks_of_entry(entries.get(key) or entries[narrow])
            known = entries.get(key, {}).get("milliseconds", {})
        print(f"{name}: {shape}", flush=True)
        measure = _measure(args.runs, args.timer)
        forward, backward, times = tune(shape, start, measure, False, args.kernels)
        entries[key] = {
            "forward": dataclasses.asdict(forward),
            "backward": dataclasses.asdict(backward),
            "milliseconds": known | times,
            "jax": jax.__version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        for kernel, ms in times.items():
            print(f"  {kernel:12s} {ms:8.4f} ms", flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--kernels", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--timer", choices=("profiler", "wall"), default="profiler")
    parser.add_argument(
        "--output",
        type=Path,
        default=choice.TABLE,
        help="table to write; a new one begins as a copy of the kernels' own, which is the default",
    )
    args = parser.parse_args(arguments)
    # Before minutes of measuring.
    folder = args.output.absolute().parent
    if not folder.is_dir():
        parser.error(f"--output {args.output}: no such folder")
    if not os.access(args.output if args.output.exists() else folder, os.W_OK):
        parser.error(f"--output {args.output}: may not be written")
    return args


if __name__ == "__main__":
    main()
