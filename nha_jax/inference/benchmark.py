"""Cost of inference against the context: full attention, a hybrid, and NHA in all layers.

    python -m nha_jax.inference.benchmark
    python -m nha_jax.inference.benchmark --shape llama3_8b --contexts 2048 131072 \\
      --json llama.json --picture llama.png
    python -m nha_jax.inference.benchmark --from-json llama.json --picture llama.png

Weights and caches are random. For each context and architecture: time to the first token of a
prompt of one row; time per token, at batch 1, at the largest batch that fits and at the largest at
which full attention fits; the caches; the memory of each compiled program. Prints a table. The JSON
is written after every cell, and `--resume` goes on from it; each cell names the run that measured
it. Exit status 1 if a cell failed, 2 if nothing could be measured; a cell that does not fit into
memory is a result.
"""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from nha_jax.inference.benchmarks.cells import (
    ARCHITECTURES,
    LARGEST,
    Architecture,
    Cell,
    Origin,
    now,
)
from nha_jax.inference.benchmarks.picture import draw
from nha_jax.inference.benchmarks.processes import run_cells
from nha_jax.inference.benchmarks.report import Report, table
from nha_jax.inference.benchmarks.settings import Machine, Settings
from nha_jax.models.presets import PRESETS
from nha_jax.ops import IMPLEMENTATIONS

# Rows of decoding, besides numbers.
_LARGEST, _SAME = "largest", "same"


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line.

    Attributes:
      settings: of all cells.
      architectures: names.
      contexts: tokens.
      batches: of decoding: rows, `LARGEST`, or None for as many as fit with full attention.
      measures: "prefill", "decode".
      json: where to write the results; None: nowhere.
      resume: keep what the file has, and measure what it lacks.
      picture: where to draw; None: nowhere.
      from_json: results to show instead of measuring.
      compilation_cache: folder for compiled programs; None: one that is removed at the end.
      command_line: as it was given.
    """

    settings: Settings
    architectures: tuple[Architecture, ...]
    contexts: tuple[int, ...]
    batches: tuple[int | None, ...]
    measures: tuple[str, ...]
    json: Path | None
    resume: bool
    picture: Path | None
    from_json: Path | None
    compilation_cache: Path | None
    command_line: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = _parse(arguments)
    try:
        report = _begin(options)
        if options.from_json is None:
            _measure(options, report)
        print(*table(report), sep="\n")
        if options.picture is not None:
            draw(report, options.picture)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130  # what a shell says of a program that Ctrl-C ended
    except (OSError, ValueError, RuntimeError) as error:
        print(f"nha_jax.inference.benchmark: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 1 if any(result.status == "failed" for result in report.results.values()) else 0


def _parse(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=list(PRESETS), default="nano", help="preset whose sizes are taken")
    add("--architectures", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    add("--contexts", nargs="+", type=_positive, default=[256, 1024], help="tokens")
    add("--measure", nargs="+", choices=["prefill", "decode"], default=["prefill", "decode"])
    add(
        "--batches",
        nargs="+",
        type=_batch,
        default=["1", _LARGEST, _SAME],
        help=f"rows of decoding: numbers, {_LARGEST!r} that fits, {_SAME!r} as full's largest",
    )
    add("--window", type=_positive, default=64, help="W of NHA layers")
    add("--num-slots", type=_positive, default=64, help="M of NHA layers")
    add("--implementation", choices=list(IMPLEMENTATIONS), help="of the operator; None: fastest")
    add("--block", type=_positive, default=16, help="tokens between two looks of the host")
    add("--blocks", type=_positive, default=4, help="blocks that are timed")
    add("--piece", type=_positive, help="tokens of a prompt read at once; None: as many as fit")
    add("--runs", type=_positive, default=3, help="prompts that are timed; long ones: one")
    add("--max-batch", type=_positive, default=512, help="of the search for the largest batch")
    add("--memory-limit", type=float, help="GiB that programs may take; None: what there is")
    add("--json", type=Path, help="where to write the results")
    add("--resume", action="store_true", help="keep what --json has, measure what it lacks")
    add("--picture", type=Path, help="where to draw all curves")
    add("--from-json", type=Path, help="show these results and measure nothing")
    add("--compilation-cache", type=Path, help="folder for compiled programs; None: a temporary")
    args = vars(parser.parse_args(arguments))
    if args["resume"] and args["json"] is None:
        parser.error("--resume: expected --json with the file to go on from")
    for name in ("json", "picture"):  # before hours of measuring
        if args[name] is not None and not args[name].absolute().parent.is_dir():
            parser.error(f"--{name} {args[name]}: no such folder")
    words = {_LARGEST: LARGEST, _SAME: None}
    fields = {field.name for field in dataclasses.fields(Settings)}
    settings = {name: value for name, value in args.items() if name in fields}
    if args["memory_limit"] is not None:
        settings["memory_limit"] = int(args["memory_limit"] * 2**30)
    return Options(
        settings=Settings(**settings),
        # In this order whatever the command line's: the rest compares with full attention.
        architectures=tuple(name for name in ARCHITECTURES if name in args["architectures"]),
        contexts=tuple(sorted(set(args["contexts"]))),
        batches=tuple(words[b] if b in words else int(b) for b in args["batches"]),
        measures=tuple(args["measure"]),
        json=args["json"],
        resume=args["resume"],
        picture=args["picture"],
        from_json=args["from_json"],
        compilation_cache=args["compilation_cache"],
        command_line=tuple(sys.argv) if arguments is None else (sys.argv[0], *arguments),
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


def _batch(text: str) -> str:
    if text not in (_LARGEST, _SAME):
        try:
            _positive(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected a number, {_LARGEST!r} or {_SAME!r}"
            ) from None
    return text


def _begin(options: Options) -> Report:
    """The results to show or to add to."""
    if options.from_json is not None:
        return Report.read(options.from_json)
    report = Report(options.settings, command_line=options.command_line)
    if options.resume and options.json is not None and options.json.exists():
        old = Report.read(options.json)
        # What the file says of its settings has to be true of all its results.
        for name in (field.name for field in dataclasses.fields(Settings)):
            found, asked = getattr(old.settings, name), getattr(options.settings, name)
            if found != asked:
                raise ValueError(f"{options.json}: has {name}={found!r}, not {asked!r}")
        old.results = {c: r for c, r in old.results.items() if r.status != "failed"}
        if old.results:
            return old
    return report


def _measure(options: Options, report: Report) -> None:
    with _cache_folder(options) as cache:
        machine: Machine | None = None  # of this run: the report's may be another one's
        # Full attention first: its largest batch is one at which the others are measured.
        for name in options.architectures:
            cells = [c for c in _cells(options, report, name) if c not in report.results]
            for found in run_cells(
                options.settings, cells, cache, machine=bool(cells) and machine is None
            ):
                if isinstance(found, Machine):
                    _check_device(options, report, found)
                    machine = found
                    if report.machine is None:
                        report.machine = machine
                else:
                    assert machine is not None
                    run = (options.command_line, machine.copy_bandwidth, machine.versions)
                    found = dataclasses.replace(found, origin=Origin(now(), *run))
                    report.results[found.cell] = found
                    ms = found.milliseconds
                    text = f"{found.status} {found.reason}" if ms is None else f"{ms:.4g} ms"
                    rows = f" batch {found.batch}" if found.cell.batch == LARGEST else ""
                    print(f"{found.cell.label}:{rows} {text}", file=sys.stderr, flush=True)
                if options.json is not None:
                    report.write(options.json)


def _check_device(options: Options, report: Report, machine: Machine) -> None:
    if report.machine is not None and report.machine.device != machine.device:
        raise ValueError(
            f"{options.json}: has results of {report.machine.device}, this is {machine.device}"
        )


def _cells(options: Options, report: Report, name: Architecture) -> list[Cell]:
    cells = []
    for context in options.contexts:
        if "prefill" in options.measures:
            cells.append(Cell(name, "prefill", context))
        if "decode" not in options.measures:
            continue
        rows: list[int] = []
        for batch in options.batches:
            if batch is None:
                most = report.find("full", "decode", context, LARGEST)
                batch = None if most is None or name == "full" else most.batch
            if batch is not None and batch not in rows:
                rows.append(batch)
        cells += [Cell(name, "decode", context, batch) for batch in rows]
    return cells


@contextlib.contextmanager
def _cache_folder(options: Options) -> Iterator[str]:
    if options.compilation_cache is not None:
        yield str(options.compilation_cache)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder


if __name__ == "__main__":
    sys.exit(main())
