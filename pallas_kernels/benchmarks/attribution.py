"""From the kernels of a trace to the time of each call. Knows no framework.

A trace holds what the device ran for several calls of one program. A call's time is the *sum* of
its kernels' durations, copies and memsets included.
"""

import dataclasses
import statistics
from collections.abc import Sequence


class TraceError(RuntimeError):
    """A trace that cannot be read as the calls that were made."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One piece of device work: a kernel, a copy or a memset. Times in ns."""

    name: str
    start_ns: float
    duration_ns: float


@dataclasses.dataclass(frozen=True)
class KernelShare:
    """What one kernel, by name, costs an average call."""

    name: str
    ms: float
    launches: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time of one program.

    Attributes:
      calls_ms: ms of each call (wall timer: of each batch of calls, divided by its calls).
      timer: "profiler" or "wall".
      kernels: what an average call spends where, the largest first; empty for the wall timer.
      note: how calls were told apart, or what else a reader should know.
    """

    calls_ms: tuple[float, ...]
    timer: str
    kernels: tuple[KernelShare, ...] = ()
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.calls_ms)

    def as_json(self) -> dict:
        return {
            "median_ms": self.median,
            "min_ms": min(self.calls_ms),
            "max_ms": max(self.calls_ms),
            "calls_ms": list(self.calls_ms),
            "timer": self.timer,
            "note": self.note,
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels],
        }

    @classmethod
    def from_json(cls, data: dict) -> "Timing":
        kernels = tuple(KernelShare(**kernel) for kernel in data["kernels"])
        return cls(tuple(data["calls_ms"]), data["timer"], kernels, data["note"])


def split_by_name(kernels: Sequence[Kernel], calls: int) -> list[list[Kernel]]:
    """The kernels of each of `calls` calls that were queued back to back.

    Every call launches the same kernels, so the launches of each name, in order of time, fall into
    `calls` equal parts. Kernels of different names may overlap on several streams.

    Raises:
      TraceError: some name was not launched equally often by every call, as when the trace lost
        events or holds other calls too.
    """
    by_name: dict[str, list[Kernel]] = {}
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_ns):
        by_name.setdefault(kernel.name, []).append(kernel)
    if not by_name:
        raise TraceError("the trace holds no device work")
    parts: list[list[Kernel]] = [[] for _ in range(calls)]
    for name, launches in by_name.items():
        if len(launches) % calls:
            raise TraceError(f"{len(launches)} launches of {name} for {calls} calls")
        each = len(launches) // calls
        for i, part in enumerate(parts):
            part += launches[i * each : (i + 1) * each]
    return parts


def split_by_gaps(kernels: Sequence[Kernel], calls: int, least_gap_ns: float) -> list[list[Kernel]]:
    """The kernels of each of `calls` calls between which the device idled for `least_gap_ns`.

    Calls may launch different kernels (a branch taken on the device's data).

    Raises:
      TraceError: the trace does not hold `calls` groups.
    """
    groups: list[list[Kernel]] = []
    end = float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_ns):
        if kernel.start_ns - end >= least_gap_ns:
            groups.append([])
        groups[-1].append(kernel)
        end = max(end, kernel.start_ns + kernel.duration_ns)
    if len(groups) != calls:
        raise TraceError(f"the trace shows {len(groups)} calls where {calls} were made")
    return groups


def timing(calls: Sequence[Sequence[Kernel]], note: str) -> Timing:
    """Sums each call's kernels."""
    totals: dict[str, list[float]] = {}
    for call in calls:
        for kernel in call:
            entry = totals.setdefault(kernel.name, [0.0, 0.0])
            entry[0] += kernel.duration_ns
            entry[1] += 1
    shares = [
        KernelShare(name, 1e-6 * duration / len(calls), launches / len(calls))
        for name, (duration, launches) in totals.items()
    ]
    return Timing(
        calls_ms=tuple(1e-6 * sum(kernel.duration_ns for kernel in call) for call in calls),
        timer="profiler",
        kernels=tuple(sorted(shares, key=lambda share: -share.ms)),
        note=note,
    )
