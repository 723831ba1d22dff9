"""One picture of all curves against the context."""

from collections.abc import Callable
from pathlib import Path

from nha_jax.inference.benchmarks.cells import LARGEST, MORE_MAY_FIT, Architecture, described
from nha_jax.inference.benchmarks.report import Report

# Told apart by colour-blind readers, and by shape in black and white.
_STYLES: dict[Architecture, tuple[str, str]] = {
    "full": ("#d55e00", "o"),
    "hybrid": ("#0072b2", "s"),
    "nha": ("#009e73", "^"),
}


def draw(report: Report, path: Path) -> None:
    """Writes cache, time to the first token, time of a token and tokens/s as a picture."""
    # Here, so that measuring needs no picture library.
    from matplotlib.figure import Figure

    def cache(name: Architecture, context: int) -> float | None:
        return report.cache_bytes(name, context) / 2**30

    def first(name: Architecture, context: int) -> float | None:
        return _scaled(report.milliseconds(name, "prefill", context), 1e-3)

    def token(name: Architecture, context: int) -> float | None:
        return report.milliseconds(name, "decode", context, 1)

    def speed(name: Architecture, context: int) -> float | None:
        found = report.find(name, "decode", context, LARGEST)
        return None if found is None else found.tokens_per_second

    panels: tuple[tuple[str, Callable[[Architecture, int], float | None]], ...] = (
        ("Cache of one row (GiB)", cache),
        ("Time to the first token, one row (s)", first),
        ("Time per token, one row (ms)", token),
        ("Tokens/s at the largest batch that fits (hollow: more may fit)", speed),
    )
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for axis, (title, value) in zip(axes, panels, strict=True):
        for name in report.architectures():
            points = [(c, y) for c in report.contexts() if (y := value(name, c)) is not None]
            colour, marker = _STYLES[name]
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker) if points else None
            if value is speed:
                # In front of the others' markers, of which they are the hollow kind.
                capped = [point for point in points if _is_capped(report, name, point[0])]
                hollow = dict(color=colour, marker=marker, markerfacecolor="white", linestyle="")
                axis.plot(*zip(*capped, strict=True), **hollow) if capped else None
        axis.set_title(title, fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(report.contexts(), [_short(c) for c in report.contexts()])
        axis.set_xlabel("context (tokens)")
        axis.grid(alpha=0.3)
    figure.legend(
        [_line(name) for name in report.architectures()],
        [described(report.settings.config(name)) for name in report.architectures()],
        loc="outside upper center",
        ncols=3,
        frameon=False,
    )
    where = "" if report.machine is None else f" on one {report.machine.device}"
    figure.supxlabel(f"{report.settings.shape}{where}", fontsize=9)
    figure.savefig(path, dpi=120)


def _is_capped(report: Report, name: Architecture, context: int) -> bool:
    found = report.find(name, "decode", context, LARGEST)
    return found is not None and found.note == MORE_MAY_FIT


def _line(name: Architecture):
    from matplotlib.lines import Line2D

    colour, marker = _STYLES[name]
    return Line2D([], [], color=colour, marker=marker)


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _short(context: int) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if context % size == 0:
            return f"{context // size}{unit}"
    return str(context)
