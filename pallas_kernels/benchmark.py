"""Time of the operator's kernels on one NVIDIA GPU, beside its floors and others' kernels.

    python -m pallas_kernels.benchmark --json kernels.json --breakdown
    python -m pallas_kernels.benchmark --cases b8_t2048 t8192 --forward-only --peers none

Prints a table and writes JSON with the hardware, the versions and the date. A time is the sum over
all device kernels of one call, XLA's copies and reductions included, as the profiler saw them; the
median of several calls on inputs that rotate over more memory than twice the L2. Exit status 1 if
a case of the operator failed; a limit that is not met does not change it.
"""

import argparse
import ctypes
import dataclasses
import datetime
import gc
import json
import logging
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from pallas_kernels.benchmarks.attribution import Timing, TraceError
from pallas_kernels.benchmarks.cases import CASES, Case
from pallas_kernels.benchmarks.errors import in_one_line
from pallas_kernels.benchmarks.floors import Machine, floor
from pallas_kernels.benchmarks.inputs import operator_program
from pallas_kernels.benchmarks.peers import PEERS, NotInstalled, measure_peer
from pallas_kernels.benchmarks.report import Outcome, Pass, Row, as_json, breakdown, table
from pallas_kernels.benchmarks.timing import measure, measure_machine, usable_timer
from pallas_kernels.benchmarks.versions import versions

logger = logging.getLogger(__name__)

# cuDeviceGetAttribute's number for the size of the L2.
_CU_L2_CACHE_SIZE = 38
_PACKAGES = (
    "nha-jax",
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "torch",
    "triton",
    "flash-linear-attention",
    "fla-core",
    "jax-linear-attention",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line.

    Attributes:
      cases: names of the cases to run.
      peers: names of the peers to run beside them, where a case lists them.
      implementation: of the operator, for cases that do not name their own.
      forward_only: no backward pass.
      runs: calls per median.
      timer: "profiler", "wall" or "auto" (the profiler where it works).
      breakdown: also print what each call spends in which kernel.
      json: where to write the results; None: nowhere.
    """

    cases: tuple[str, ...]
    peers: tuple[str, ...]
    implementation: str
    forward_only: bool
    runs: int
    timer: str
    breakdown: bool
    json: Path | None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = _parse(arguments)
    # A peer runs in a process of its own and needs memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    logging.basicConfig(level=logging.WARNING)
    device = _gpu()
    l2_bytes = _l2_bytes()
    try:
        timer = usable_timer(options.timer)
    except TraceError as error:
        raise SystemExit(f"pallas_kernels.benchmark: {error}") from error
    machine, machine_timings = measure_machine(runs=options.runs, timer=timer)
    rows: dict[str, Row] = {}
    for name in options.cases:
        rows[name] = _run(CASES[name], options, timer, machine, l2_bytes)
        # After each case, so that an interrupted run leaves what it has.
        _write(options, device, timer, l2_bytes, machine, machine_timings, rows)
    if options.breakdown:
        print(*breakdown(rows), sep="\n", end="\n\n")
    print(*table(rows, machine, timer), sep="\n")
    failed = [
        name for name, row in rows.items() if any(o.timing is None for o in row.ours.values())
    ]
    return 1 if failed else 0


def _parse(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--peers", nargs="+", choices=[*PEERS, "none"], default=list(PEERS))
    parser.add_argument("--implementation", default="pallas_triton", help="of the operator")
    parser.add_argument("--forward-only", action="store_true", help="no backward pass")
    parser.add_argument("--runs", type=int, default=20, help="calls per median")
    parser.add_argument(
        "--timer",
        choices=["profiler", "wall", "auto"],
        default="profiler",
        help="profiler: kernel time; wall: wall clock of queued calls; auto: the first that works",
    )
    parser.add_argument("--breakdown", action="store_true", help="print times by kernel")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = vars(parser.parse_args(arguments))
    if args["runs"] < 1:
        parser.error(f"--runs {args['runs']}: expected at least 1")
    if args["json"] is not None and not args["json"].absolute().parent.is_dir():
        parser.error(f"--json {args['json']}: no such folder")
    # In the table's order whatever the command line's: some limits compare with earlier cases.
    args["cases"] = tuple(name for name in CASES if name in args["cases"])
    args["peers"] = tuple(name for name in args["peers"] if name != "none")
    return Options(**args)


def _gpu() -> jax.Device:
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        raise SystemExit(f"pallas_kernels.benchmark: JAX finds no device: {error}") from error
    if device.platform != "gpu":
        raise SystemExit(
            "pallas_kernels.benchmark: needs an NVIDIA GPU that JAX sees; "
            f"JAX runs on {device.platform}"
        )
    return device


def _l2_bytes() -> int:
    """Size of the first device's L2, by the driver; JAX does not tell."""
    value, ordinal = ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SystemExit(f"pallas_kernels.benchmark: no CUDA driver: {error}") from error
    for status in (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(ordinal), 0),
        driver.cuDeviceGetAttribute(ctypes.byref(value), _CU_L2_CACHE_SIZE, ordinal),
    ):
        if status:
            raise SystemExit(f"pallas_kernels.benchmark: the CUDA driver answers error {status}")
    return value.value


def _run(case: Case, options: Options, timer: str, machine: Machine, l2_bytes: int) -> Row:
    """All measurements of one case."""
    asked = options.implementation if case.implementation == "asked" else case.implementation
    row = Row(case, asked)
    implementation = None if asked == "automatic" else asked
    passes: list[Pass] = ["forward"]
    if case.backward and not options.forward_only:
        passes.append("both")

    def ours(backward: bool) -> Timing:
        program, sets = operator_program(case, implementation, l2_bytes, backward=backward)
        return measure(program, runs=options.runs, timer=timer, warm_up=max(3, sets))

    for which in passes:
        row.floors[which] = floor(case, machine, backward=which == "both")
        row.ours[which] = _attempt(f"{case.name} {which}", ours, which == "both")
    for name in case.peers:
        if name not in options.peers:
            continue

        def theirs(backward: bool, name: str = name) -> Timing:
            return measure_peer(
                name, case, backward=backward, runs=options.runs, timer=timer, l2_bytes=l2_bytes
            )

        row.peers[name] = {
            which: _attempt(f"{case.name} {which} {name}", theirs, which == "both")
            for which in passes
        }
    return row


def _attempt(label: str, measured: Callable[[bool], Timing], backward: bool) -> Outcome:
    """A time, or the reason why there is none: one program's failure ends no run."""
    try:
        outcome = Outcome(measured(backward))
        print(f"{label}: {outcome.ms:.4f} ms", file=sys.stderr, flush=True)
    except NotInstalled as error:
        outcome = Outcome(reason=f"not installed: {error}")
    except Exception as error:
        logger.debug("%s", label, exc_info=True)
        outcome = Outcome(reason=f"failed: {in_one_line(error)}")
    if outcome.reason:
        print(f"{label}: {outcome.reason}", file=sys.stderr, flush=True)
    # The buffers of a program that is done with are the next one's memory.
    gc.collect()
    return outcome


def _write(
    options: Options,
    device: jax.Device,
    timer: str,
    l2_bytes: int,
    machine: Machine,
    machine_timings: dict[str, Timing],
    rows: dict[str, Row],
) -> None:
    if options.json is None:
        return
    report = {
        "device": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "l2_bytes": l2_bytes,
        "machine": dataclasses.asdict(machine)
        | {name: timing.as_json() for name, timing in machine_timings.items()},
        "timer": timer,
        "versions": versions(_PACKAGES),
        "processor": platform.processor() or platform.machine(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command_line": sys.argv,
        "rows": as_json(rows),
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
