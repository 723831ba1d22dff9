"""Rows of results, whether limits are met, the printed table and the JSON."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from pallas_kernels.benchmarks.attribution import Timing
from pallas_kernels.benchmarks.cases import Case, Limit
from pallas_kernels.benchmarks.floors import Floor, Machine

Pass = Literal["forward", "both"]
PASSES: dict[Pass, str] = {"forward": "forward", "both": "forward+backward"}
_FLOOR = [field.name for field in dataclasses.fields(Floor)]


@dataclasses.dataclass
class Outcome:
    """One program's time, or why there is none ("not installed: ...", "failed: ...")."""

    timing: Timing | None = None
    reason: str = ""

    @property
    def ms(self) -> float | None:
        return None if self.timing is None else self.timing.median


@dataclasses.dataclass
class Row:
    """A case's results.

    Attributes:
      case: the case.
      implementation: what ran: a name, or "automatic" for the operator's own choice.
      ours: by pass.
      peers: by peer, then by pass.
      floors: by pass.
    """

    case: Case
    implementation: str
    ours: dict[Pass, Outcome] = dataclasses.field(default_factory=dict)
    peers: dict[str, dict[Pass, Outcome]] = dataclasses.field(default_factory=dict)
    floors: dict[Pass, Floor] = dataclasses.field(default_factory=dict)

    def ms(self, which: Pass) -> float | None:
        outcome = self.ours.get(which)
        return None if outcome is None else outcome.ms

    def peer_ms(self, peer: str, which: Pass) -> float | None:
        outcome = self.peers.get(peer, {}).get(which)
        return None if outcome is None else outcome.ms

    def over_floor(self, which: Pass) -> float | None:
        """Time over the larger of the memory and the compute floor."""
        return _ratio(self.ms(which), self.floors[which].ms) if which in self.floors else None

    def over_memory_floor(self, which: Pass) -> float | None:
        if which not in self.floors:
            return None
        return _ratio(self.ms(which), self.floors[which].memory_ms)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A limit against what was measured; `figure` is None where something is missing."""

    which: Pass
    figure: float | None
    bound: float
    aim: float | None
    met: bool | None
    aim_met: bool | None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or b == 0 else a / b


def verdicts(row: Row, rows: Mapping[str, Row]) -> list[Verdict]:
    """The case's limit, for each pass that has a bound.

    Args:
      row: the case's results.
      rows: all results, by case: some limits compare with another case.
    """
    limit = row.case.limit
    found: list[Verdict] = []
    if limit is None:
        return found
    bounds: tuple[tuple[Pass, float | None, float | None], ...] = (
        ("forward", limit.forward, limit.aim_forward),
        ("both", limit.both, limit.aim_both),
    )
    for which, bound, aim in bounds:
        if bound is None or which not in row.ours:
            continue
        figure = _figure(row, rows, which)
        met = None if figure is None else limit.holds(figure, bound)
        aim_met = None if figure is None or aim is None else limit.holds(figure, aim)
        found.append(Verdict(which, figure, bound, aim, met, aim_met))
    return found


def _figure(row: Row, rows: Mapping[str, Row], which: Pass) -> float | None:
    limit, ms = row.case.limit, row.ms(which)
    assert limit is not None
    other = rows.get(limit.against)
    match limit.kind:
        case "milliseconds":
            return ms
        case "times_peer":
            return _ratio(ms, row.peer_ms(limit.against, which))
        case "speedup_over_peer":
            return _ratio(row.peer_ms(limit.against, which), ms)
        case "times_case" | "slower_than_case":
            return None if other is None else _ratio(ms, other.ms(which))
        case "memory_ratio_times_case":
            if other is None:
                return None
            return _ratio(row.over_memory_floor(which), other.over_memory_floor(which))
        case "copy_bandwidth":
            return _ratio(row.floors[which].memory_ms, ms) if which in row.floors else None


def _describe(row: Row, verdict: Verdict) -> str:
    limit = row.case.limit
    assert limit is not None
    unit = {
        "milliseconds": " ms",
        "times_peer": f" x {limit.against}",
        "times_case": f" x {limit.against}",
        "memory_ratio_times_case": f" x the memory ratio of {limit.against}",
        "speedup_over_peer": f" x faster than {limit.against}",
        "slower_than_case": f" x {limit.against}",
        "copy_bandwidth": " of copy bandwidth",
    }[limit.kind]
    sign = ">=" if limit.at_least else "<="
    if verdict.figure is None:
        missing = f"no time here or for {limit.against}" if limit.against else "no time here"
        state = f"unknown ({missing})"
    else:
        state = f"{verdict.figure:.3g}: {'met' if verdict.met else 'NOT MET'}"
        if verdict.aim is not None:
            state += f" (aim {verdict.aim:g} {'met' if verdict.aim_met else 'not met'})"
    return f"{PASSES[verdict.which]} {sign} {verdict.bound:g}{unit}: {state}"


def _cell(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def table(rows: Mapping[str, Row], machine: Machine, timer: str) -> Iterator[str]:
    """Lines of the table: a line for each case, its peers and its limits below it."""
    what = "wall clock of queued calls" if timer == "wall" else "kernel time from the profiler"
    yield (
        f"{what}, medians; device copy {machine.copy_bandwidth / 1e12:.2f} TB/s read + write, "
        f"bfloat16 products {machine.matmul_rate / 1e12:.0f} TFLOP/s"
    )
    yield (
        f"{'case':<20}{'forward':>10}{'fwd+bwd':>10} |{'floor fwd':>10}{'fwd+bwd':>10}"
        f"{'  bound':<16} |{'x floor':>8}{'fwd+bwd':>8} |{'x memory':>9}{'fwd+bwd':>8}"
    )
    for row in rows.values():
        yield from _row_lines(row, rows)


def _row_lines(row: Row, rows: Mapping[str, Row]) -> Iterator[str]:
    floors = [row.floors.get(which) for which in PASSES]
    bound = "/".join(floor.bound for floor in floors if floor is not None)
    yield (
        f"{row.case.name:<20}"
        + "".join(_cell(row.ms(which), ".4f", 10) for which in PASSES)
        + " |"
        + "".join(_cell(None if floor is None else floor.ms, ".4f", 10) for floor in floors)
        + f"  {bound:<14} |"
        + "".join(_cell(row.over_floor(which), ".2f", 8) for which in PASSES)
        + " |"
        + _cell(row.over_memory_floor("forward"), ".2f", 9)
        + _cell(row.over_memory_floor("both"), ".2f", 8)
        + f"  {row.implementation}"
    )
    for which, outcome in row.ours.items():
        if outcome.reason:
            yield f"    {PASSES[which]}: {outcome.reason}"
    for name, outcomes in row.peers.items():
        ratios = (_ratio(row.ms(which), row.peer_ms(name, which)) for which in PASSES)
        yield (
            f"  {name:<18}"
            + "".join(_cell(row.peer_ms(name, which), ".4f", 10) for which in PASSES)
            + " | ours/peer"
            + "".join(_cell(ratio, ".3f", 9) for ratio in ratios)
        )
        for reason in dict.fromkeys(o.reason for o in outcomes.values() if o.reason):
            yield f"    {reason}"
    for verdict in verdicts(row, rows):
        yield f"  required {_describe(row, verdict)}"


def breakdown(rows: Mapping[str, Row], shown: int = 12) -> Iterator[str]:
    """Lines of what each call of ours spends where: ms and launches a call, by kernel name."""
    for row in rows.values():
        for which, outcome in row.ours.items():
            if outcome.timing is None:
                continue
            timing = outcome.timing
            total = sum(timing.calls_ms) / len(timing.calls_ms)
            yield f"{row.case.name}, {PASSES[which]}: {total:.4f} ms a call on average"
            for share in timing.kernels[:shown]:
                yield (
                    f"  {share.ms:>9.4f} ms {100 * share.ms / total:>5.1f} % "
                    f"{share.launches:>6.4g} x {share.name[:100]}"
                )
            if len(timing.kernels) > shown:
                rest = sum(share.ms for share in timing.kernels[shown:])
                yield f"  {rest:>9.4f} ms in {len(timing.kernels) - shown} other kernels"


def as_json(rows: Mapping[str, Row]) -> list[dict]:
    """The rows for the JSON file: everything that the table shows, and each call's time."""

    def outcomes(by_pass: Mapping[Pass, Outcome]) -> dict:
        return {
            which: {"reason": outcome.reason}
            if outcome.timing is None
            else outcome.timing.as_json()
            for which, outcome in by_pass.items()
        }

    return [
        {
            "case": dataclasses.asdict(row.case),
            "implementation": row.implementation,
            "ours": outcomes(row.ours),
            "peers": {name: outcomes(by_pass) for name, by_pass in row.peers.items()},
            "floors": {
                which: dataclasses.asdict(floor) | {"ms": floor.ms, "bound": floor.bound}
                for which, floor in row.floors.items()
            },
            "over_floor": {which: row.over_floor(which) for which in row.floors},
            "over_memory_floor": {which: row.over_memory_floor(which) for which in row.floors},
            "required": [dataclasses.asdict(verdict) for verdict in verdicts(row, rows)],
        }
        for row in rows.values()
    ]


def from_json(data: Sequence[Mapping]) -> dict[str, Row]:
    """The rows of a JSON file, by case: what `as_json` wrote, less what follows from it."""

    def outcomes(by_pass: Mapping) -> dict[Pass, Outcome]:
        return {
            which: Outcome(reason=found["reason"])
            if "reason" in found
            else Outcome(Timing.from_json(found))
            for which, found in by_pass.items()
        }

    rows = {}
    for each in data:
        limit = each["case"]["limit"]
        case = Case(
            **each["case"]
            | {
                "peers": tuple(each["case"]["peers"]),
                "limit": None if limit is None else Limit(**limit),
            }
        )
        rows[case.name] = Row(
            case,
            each["implementation"],
            outcomes(each["ours"]),
            {name: outcomes(by_pass) for name, by_pass in each["peers"].items()},
            {
                which: Floor(**{name: found[name] for name in _FLOOR})
                for which, found in each["floors"].items()
            },
        )
    return rows
