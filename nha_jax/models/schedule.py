"""How a sequence of layers becomes loops: compile each distinct layer once, at any depth.

Two plans. If the layers are a period of distinct ones (`[64]`, `[64, "full"]`), the plan is a loop
over periods: no branch at run time. Any other arrangement becomes one loop over all layers that
switches between the distinct ways of reading memory; projections and feed-forward layers are
common.

With caches a switch would have to carry all of them past every layer. There the first plan also
serves a period of runs of equal layers (`[64, 64, 64, "full"]`), as a loop over periods of loops
over runs. Without caches it does not: a loop in a loop stacks what the backward pass needs twice,
and compiling that takes a third longer than the switch.
"""

from typing import NamedTuple

from nha_jax.models.config import LayerSpec


class Run(NamedTuple):
    """Consecutive equal layers within a period."""

    spec: LayerSpec
    start: int  # index of the first among the period's layers of its kind
    length: int


class PeriodicPlan(NamedTuple):
    """`periods` repetitions of `runs`, each of a different spec."""

    periods: int
    runs: tuple[Run, ...]


class SwitchPlan(NamedTuple):
    """One loop over all layers; layer i is `specs[branch[i]]`, the `place[i]`-th of that spec."""

    specs: tuple[LayerSpec, ...]
    branch: tuple[int, ...]
    place: tuple[int, ...]


def distinct(layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """The distinct layers in order of first appearance."""
    return tuple(dict.fromkeys(layers))


def plan(layers: tuple[LayerSpec, ...], *, with_caches: bool) -> PeriodicPlan | SwitchPlan:
    """Chooses the plan of a sequence of layers."""
    depth = len(layers)
    period = next(
        p for p in range(1, depth + 1) if depth % p == 0 and layers == layers[:p] * (depth // p)
    )
    runs = _runs(layers[:period])
    specs = distinct(layers)
    if len(runs) == len(specs) and (with_caches or period == len(specs)):
        return PeriodicPlan(depth // period, runs)
    counts = dict.fromkeys(specs, 0)
    place = []
    for layer in layers:
        place.append(counts[layer])
        counts[layer] += 1
    return SwitchPlan(specs, tuple(map(specs.index, layers)), tuple(place))


def _runs(layers: tuple[LayerSpec, ...]) -> tuple[Run, ...]:
    runs: list[Run] = []
    seen: dict[str, int] = {}
    for layer in layers:
        start = seen.get(layer.kind, 0)
        seen[layer.kind] = start + 1
        if runs and runs[-1].spec == layer:
            runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
        else:
            runs.append(Run(layer, start, 1))
    return tuple(runs)
