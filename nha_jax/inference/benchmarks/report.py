"""All results of a shape: what they say together, the required limits, the table, the JSON."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nha_jax.inference.benchmarks.cells import (
    ARCHITECTURES,
    LARGEST,
    Architecture,
    Cell,
    Measure,
    Origin,
    Result,
    now,
    token_weight_bytes,
)
from nha_jax.inference.benchmarks.settings import Machine, Settings
from nha_jax.inference.state import cache_bytes


@dataclasses.dataclass(frozen=True)
class Limit:
    """What one figure of the hybrid over that of full attention has to be, at one context."""

    figure: str
    bound: float
    at_least: bool = False

    def holds(self, value: float) -> bool:
        """Whether a figure is within the limit, the bound included."""
        return value >= self.bound if self.at_least else value <= self.bound


LIMITS_CONTEXT = 2**17
LIMITS = (
    Limit("cache", 0.16),
    Limit("first token", 0.5),
    Limit("token at the same batch", 0.45),
    Limit("tokens/s at each one's largest batch", 4.0, at_least=True),
)
# The baseline has to be a fair one: of copy bandwidth, at its largest batch.
FAIR = Limit("bandwidth of full attention's decoding / copy", 0.5, at_least=True)


@dataclasses.dataclass
class Report:
    """The results so far.

    Attributes:
      settings: of all cells.
      machine: where they were measured, as the run found it that began the report; None: nothing
        was yet.
      results: by cell; those without an origin of their own are of the run that is named here.
      date: when that run began, UTC, ISO 8601; in files whose results have no origins, when the
        last one wrote them, whose machine and command line these then are as well.
      command_line: of that run.
    """

    settings: Settings
    machine: Machine | None = None
    results: dict[Cell, Result] = dataclasses.field(default_factory=dict)
    date: str = dataclasses.field(default_factory=now)
    command_line: tuple[str, ...] = dataclasses.field(default_factory=lambda: tuple(sys.argv))

    def find(
        self, name: Architecture, measure: Measure, context: int, batch: int = 1
    ) -> Result | None:
        """An "ok" result of these rows, whether they were asked for or are the most that fit."""
        for cell, result in self.results.items():
            same = (cell.architecture, cell.measure, cell.context) == (name, measure, context)
            rows = cell.batch if batch == LARGEST else result.batch
            if same and rows == batch and result.status == "ok":
                return result
        return None

    def milliseconds(
        self, name: Architecture, measure: Measure, context: int, batch: int = 1
    ) -> float | None:
        """Those of the result that `find` finds."""
        found = self.find(name, measure, context, batch)
        return None if found is None else found.milliseconds

    def contexts(self) -> list[int]:
        """Tokens, ascending."""
        return sorted({cell.context for cell in self.results})

    def architectures(self) -> list[Architecture]:
        """Those that have results, full attention first."""
        names = {cell.architecture for cell in self.results}
        return [name for name in ARCHITECTURES if name in names]

    def cache_bytes(self, name: Architecture, context: int) -> int:
        """Of one row."""
        return cache_bytes(self.settings.config(name), 1, context)

    def origin(self, result: Result) -> Origin | None:
        """The run that measured a result; None: the report names none."""
        if result.origin is not None or self.machine is None:
            return result.origin
        machine = self.machine
        return Origin(self.date, self.command_line, machine.copy_bandwidth, machine.versions)

    def floor_ms(self, result: Result) -> float | None:
        """Weights that a step reads and the rows' caches, over the copy bandwidth of its run."""
        origin = self.origin(result)
        if origin is None:
            return None
        config = self.settings.config(result.cell.architecture)
        size = token_weight_bytes(config) + cache_bytes(config, result.batch, result.cell.context)
        return 1e3 * size / origin.copy_bandwidth

    def bandwidth(self, name: Architecture, context: int, batch: int) -> float | None:
        """Bytes per second of the floor's bytes in the measured time, over those of a copy."""
        found = self.find(name, "decode", context, batch)
        if found is None:
            return None
        return _ratio(self.floor_ms(found), found.milliseconds)

    def ratios(
        self, context: int, name: Architecture = "hybrid", to: Architecture = "full"
    ) -> dict[str, float | None]:
        """The figures of `LIMITS`, for one architecture over another."""
        most = {n: self.find(n, "decode", context, LARGEST) for n in (name, to)}
        base = most[to]
        rows = 1 if base is None else base.batch
        speeds = [None if r is None else r.tokens_per_second for r in (most[name], base)]
        return {
            "cache": self.cache_bytes(name, context) / self.cache_bytes(to, context),
            "first token": _ratio(*(self.milliseconds(n, "prefill", context) for n in (name, to))),
            "token at the same batch": _ratio(
                *(self.milliseconds(n, "decode", context, rows) for n in (name, to))
            ),
            "tokens/s at each one's largest batch": _ratio(*speeds),
        }

    def verdicts(self) -> list[tuple[Limit, float | None]]:
        """Each limit with what was measured at its context; None: something is missing."""
        ratios = self.ratios(LIMITS_CONTEXT)
        found = [(limit, ratios[limit.figure]) for limit in LIMITS]
        return [*found, (FAIR, self.bandwidth("full", LIMITS_CONTEXT, LARGEST))]

    def as_json(self) -> dict[str, Any]:
        """What a file holds."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "machine": None if self.machine is None else dataclasses.asdict(self.machine),
            "date": self.date,
            "command_line": self.command_line,
            "results": [result.as_json() for result in self.results.values()],
            "required": [
                dataclasses.asdict(limit)
                | {"measured": value, "met": None if value is None else limit.holds(value)}
                for limit, value in self.verdicts()
            ]
            if LIMITS_CONTEXT in self.contexts()
            else [],
        }

    def write(self, path: Path) -> None:
        """Replaces the file in one go: an interruption leaves the old one or the new one."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Raises ValueError where the file is not one of these."""
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: no results of this benchmark ({error!r})") from None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Report":
        """The inverse of `as_json`."""
        machine = values["machine"]
        results = [Result.from_json(result) for result in values["results"]]
        return cls(
            Settings(**values["settings"]),
            None if machine is None else Machine(**machine),
            {result.cell: result for result in results},
            values["date"],
            tuple(values["command_line"]),
        )


def _ratio(a: float | int | None, b: float | int | None) -> float | None:
    return None if a is None or b is None or b == 0 else a / b


def _text(value: float | int | None, form: str, width: int, scale: float = 1.0) -> str:
    return f"{'-' if value is None else format(value * scale, form):>{width}}"


def table(report: Report) -> Iterator[str]:
    """Lines of the table, then what is required, then what has no numbers and why."""
    machine = report.machine
    if machine is not None:
        yield (
            f"{report.settings.shape} on {machine.device}: copy bandwidth "
            f"{_bandwidths(report)} TB/s, "
            f"{machine.memory_limit / 2**30:.1f} GiB for programs"
        )
    yield (f"{'':<18}| {'batch 1':<40} | {'largest batch that fits':<30} | peak GiB of programs")
    yield (
        f"{'context':>9} {'layers':<8}| {'first s':>10} {'token ms':>10} {'/floor':>7} "
        f"{'cache GiB':>10} | {'rows':>8} {'token ms':>10} {'tokens/s':>10} | "
        f"{'prefill':>9} {'batch 1':>9} {'largest':>9}"
    )
    for context in report.contexts():
        for name in report.architectures():
            yield _line(report, name, context)
        for name in report.architectures():
            if name != "full" and "full" in report.architectures():
                yield _comparison(report, name, context)
    if LIMITS_CONTEXT in report.contexts():
        yield f"required of hybrid/full at context {LIMITS_CONTEXT}:"
        for limit, value in report.verdicts():
            sign = ">=" if limit.at_least else "<="
            state = "unknown" if value is None else f"{value:.3g}"
            if value is not None:
                state += ": met" if limit.holds(value) else ": NOT MET"
            yield f"  {limit.figure} {sign} {limit.bound:g}: {state}"
    for cell, result in report.results.items():
        if result.status != "ok":
            yield f"{cell.label}: {result.status} ({result.reason})"
        elif result.note:
            yield f"{cell.label}: {result.note}"


def _bandwidths(report: Report) -> str:
    """What the runs found, from the lowest to the highest."""
    origins = [report.origin(result) for result in report.results.values()]
    found = [origin.copy_bandwidth for origin in origins if origin is not None]
    if not found and report.machine is not None:
        found = [report.machine.copy_bandwidth]
    ends = dict.fromkeys(f"{bandwidth / 1e12:.3g}" for bandwidth in (min(found), max(found)))
    return " to ".join(ends)


def _line(report: Report, name: Architecture, context: int) -> str:
    prefill = report.find(name, "prefill", context)
    one = report.find(name, "decode", context, 1)
    most = report.find(name, "decode", context, LARGEST)
    ms, floor = (None, None) if one is None else (one.milliseconds, report.floor_ms(one))
    most_ms = None if most is None else most.milliseconds
    speed = None if most is None else most.tokens_per_second
    rows = None if most is None else most.batch
    peaks = [None if r is None else r.program_bytes for r in (prefill, one, most)]
    first = None if prefill is None else prefill.milliseconds
    return (
        f"{context:>9} {name:<8}| {_text(first, '.4g', 10, 1e-3)} {_text(ms, '.4g', 10)} "
        f"{_text(_ratio(ms, floor), '.2f', 7)} "
        f"{_text(report.cache_bytes(name, context), '.3g', 10, 2**-30)} | "
        f"{_text(rows, '.0f', 8)} {_text(most_ms, '.4g', 10)} {_text(speed, '.4g', 10)} | "
        + " ".join(_text(peak, ".3g", 9, 2**-30) for peak in peaks)
    )


def _comparison(report: Report, name: Architecture, context: int) -> str:
    ratios = report.ratios(context, name)
    parts = (f"{figure} {_text(value, '.3g', 0)}" for figure, value in ratios.items())
    return f"{'':>9} {name}/full: " + ", ".join(parts)
