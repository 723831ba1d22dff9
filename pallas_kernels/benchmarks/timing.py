"""Times programs on a GPU: kernel time from a profile, or the wall clock of queued calls.

A program is a function of the call's number: it *enqueues* one call, on inputs that rotate with the
number, and returns the call's outputs.
"""

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from pallas_kernels.benchmarks.attribution import (
    Kernel,
    Timing,
    TraceError,
    split_by_gaps,
    split_by_name,
    timing,
)
from pallas_kernels.benchmarks.floors import Machine

logger = logging.getLogger(__name__)

Program = Callable[[int], Any]

# The device idles this long between calls that cannot be told apart by their kernels' names; a
# program's own pauses (a loop whose condition the host reads) are far shorter than half of it.
PAUSE_S = 4e-3
# On a stream's line, but no work of the device.
_NO_WORK = ("MemoryAlloc", "MemoryFree", "Overhead", "HostRegister", "HostUnregister")
# Spans the kernels of a CUDA graph, which have events of their own unless it is traced as a whole.
_GRAPH = "CudaGraph"
# Of one sample of the wall clock: long against the queue's start and end.
_WALL_BATCH_S = 20e-3


def measure(program: Program, *, runs: int, timer: str, warm_up: int = 3) -> Timing:
    """Times `runs` calls after `warm_up` calls.

    Args:
      program: enqueues call i.
      runs: calls measured (wall: batches of calls).
      timer: "profiler" or "wall".
      warm_up: calls before, at least 1; use the number of input sets to touch each.

    Raises:
      TraceError: the profiler's trace does not show the calls.
    """
    for i in range(warm_up):
        jax.block_until_ready(program(i))
    if timer == "wall":
        return _measure_wall(program, runs)
    try:
        calls = split_by_name(_trace(program, runs, pause=0.0), runs)
        note = "queued calls, told apart by kernel names"
    except TraceError as error:
        logger.info("%s: tracing again with pauses between calls", error)
        calls = split_by_gaps(_trace(program, runs, pause=PAUSE_S), runs, 1e9 * PAUSE_S / 2)
        note = "calls with pauses between them, told apart by those"
    return timing(calls, note)


def _trace(program: Program, runs: int, pause: float) -> list[Kernel]:
    options = jax.profiler.ProfileOptions()
    # Host events are not read, and recording them slows the queueing of calls down.
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    options.enable_hlo_proto = False
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            for i in range(runs):
                out = program(i)
                if pause:
                    jax.block_until_ready(out)
                    time.sleep(pause)
            jax.block_until_ready(out)
        files = sorted(Path(directory).rglob("*.xplane.pb"), key=os.path.getmtime)
        if not files:
            raise TraceError("the profiler wrote no trace")
        return device_kernels(ProfileData.from_serialized_xspace(files[-1].read_bytes()))


def device_kernels(profile: ProfileData) -> list[Kernel]:
    """Everything the GPU ran.

    A GPU's plane has one line per CUDA stream; its other lines (modules, operations, steps) are
    derived from the same kernels and would count them twice.

    Raises:
      TraceError: no stream shows any work; the message lists the lines there are. Or a CUDA graph
        ran none of the kernels shown.
    """
    kernels: list[Kernel] = []
    lines = []
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            lines.append(plane.name)
            continue
        of_plane: list[Kernel] = []
        graphs: list[Kernel] = []
        for line in plane.lines:
            lines.append(f"{plane.name} {line.name}")
            if not line.name.lower().startswith("stream"):
                continue
            for event in line.events:
                if event.name.startswith(_NO_WORK):
                    continue
                found = graphs if event.name.startswith(_GRAPH) else of_plane
                found.append(Kernel(event.name, event.start_ns, event.duration_ns))
        for graph in graphs:
            if not any(_overlap(graph, kernel) for kernel in of_plane):
                raise TraceError(f"{graph.name} was traced as a whole, without its kernels")
        kernels += of_plane
    if not kernels:
        raise TraceError(f"no GPU stream in the trace; it holds: {', '.join(lines) or 'nothing'}")
    return kernels


def _overlap(a: Kernel, b: Kernel) -> bool:
    ends = a.start_ns + a.duration_ns, b.start_ns + b.duration_ns
    return max(a.start_ns, b.start_ns) < min(ends)


def _measure_wall(program: Program, runs: int) -> Timing:
    def batch(calls: int) -> float:
        start = time.perf_counter()
        for i in range(calls):
            out = program(i)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    calls = min(100, max(3, math.ceil(_WALL_BATCH_S / batch(3))))
    samples = tuple(1e3 * batch(calls) for _ in range(runs))
    return Timing(samples, "wall", note=f"wall clock of {calls} queued calls, divided by {calls}")


def usable_timer(timer: str) -> str:
    """Checks the profiler before anything long runs; "auto" becomes "profiler" or "wall".

    Raises:
      TraceError: the profiler was asked for and shows no kernels.
    """
    if timer == "wall":
        return timer
    x = jnp.ones((512, 512), jnp.bfloat16)
    square = jax.jit(lambda x: x @ x)
    try:
        # Twice: the first trace of a process may still be setting itself up when the work is done.
        for _ in range(2):
            measured = measure(lambda i: square(x), runs=3, timer="profiler")
    except Exception as error:
        if timer == "auto":
            logger.warning("the profiler does not work here (%s): --timer wall", error)
            return "wall"
        raise TraceError(f"the profiler does not work here: {error}; try --timer wall") from error
    assert measured.median > 0
    return "profiler"


def measure_machine(*, runs: int, timer: str) -> tuple[Machine, dict[str, Timing]]:
    """Copy bandwidth and matrix product rate of the device at hand."""
    size = 2**30
    sources = [jax.random.bits(jax.random.key(i), (size,), jnp.uint8) for i in range(2)]
    copy = jax.jit(jnp.copy)
    copying = measure(lambda i: copy(sources[i % 2]), runs=runs, timer=timer)
    side = 8192
    # Random values: products of zeros draw less power and run faster than any real ones.
    a, b = (
        jax.random.normal(jax.random.key(i), (side, side), jnp.float32).astype(jnp.bfloat16)
        for i in range(2)
    )
    product = jax.jit(lambda a, b: a @ b)
    multiplying = measure(lambda i: product(a, b), runs=runs, timer=timer)
    machine = Machine(
        copy_bandwidth=2 * size / (1e-3 * copying.median),
        matmul_rate=2 * side**3 / (1e-3 * multiplying.median),
    )
    return machine, {"copy_1GiB": copying, "matmul_8192": multiplying}
