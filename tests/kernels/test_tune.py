"""The search for block sizes, with interpreted kernels and times that are made up."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import blocks, tune
from pallas_kernels.blocks import BackwardBlocks, Block, ForwardBlocks

DEVICE = blocks.Device("some GPU", 232448, 132)
SHAPE = tune.Shape(batch=1, length=40, num_heads=2, num_kv_heads=1, size=16, num_slots=4, window=8)


def test_every_kernel_gets_its_fastest_block(monkeypatch):
    """Eight warps are made out to be fastest wherever they are tried; some candidates fail."""
    monkeypatch.setattr(
        tune, "CANDIDATES", {kernel: {"num_warps": (4, 8, 16)} for kernel in tune.CANDIDATES}
    )
    seen = []

    def measure(calls):
        times = []
        for run, args in calls:
            block: Block = run.args[0]
            jax.eval_shape(run, *args)  # every candidate can be traced
            seen.append(block)
            times.append({4: 2.0, 8: 1.0, 16: None}[block.num_warps])
        return times

    start = ForwardBlocks(chunk=64), BackwardBlocks()
    forward, backward, times = tune.tune(SHAPE, start, measure, interpret=True)
    chosen = {
        field.name: getattr(result, field.name)
        for result in (forward, backward)
        for field in dataclasses.fields(result)
        if isinstance(getattr(result, field.name), Block)
    }
    assert chosen.keys() == times.keys() == tune.CANDIDATES.keys()
    assert {block.num_warps for block in chosen.values()} == {8}
    assert set(times.values()) == {1.0}
    assert len(seen) == 3 * len(chosen)


def test_candidates_begin_with_the_heuristic_and_do_not_repeat():
    for kernel in tune.CANDIDATES:
        for group in (1, 4):
            tried = list(tune.candidates(kernel, Block(), group))
            assert tried[0] == Block()
            assert len(set(tried)) == len(tried) > 1
            assert all(group % block.heads == 0 for block in tried)


def test_the_table_is_read_back(tmp_path, monkeypatch):
    forward, backward = ForwardBlocks(chunk=32), BackwardBlocks(window=Block(num_warps=8))
    spec = tune.spec_of(SHAPE)
    key = blocks.table_key("some GPU", spec)
    entry = {"forward": dataclasses.asdict(forward), "backward": dataclasses.asdict(backward)}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"entries": {key: entry}}))
    monkeypatch.setattr(blocks, "TABLE", path)
    blocks.table.cache_clear()
    try:
        found = blocks.choose(spec, DEVICE)
        assert found == (forward, backward)
        assert blocks.choose(spec, dataclasses.replace(DEVICE, kind="another")) != found
    finally:
        blocks.table.cache_clear()


def test_candidates_that_fail_are_printed_and_left_out(capsys):
    """By the wall clock, on functions that stand in for kernels."""

    def failing(error):
        def run(block, x):
            raise error

        return run

    runs = (
        lambda block, x: 2 * x,
        failing(ValueError("too much\nshared memory")),
        failing(RuntimeError()),
        lambda block, x: 3 * x,
    )
    calls = [
        (functools.partial(run, Block(num_warps=i)), (jnp.ones(3),)) for i, run in enumerate(runs)
    ]
    found = tune._measure(1, "wall")(calls)
    assert [ms is not None and ms > 0 for ms in found] == [True, False, False, True]
    lines = capsys.readouterr().out.splitlines()
    assert ["left out" in line for line in lines] == [False, True, True, False]
    assert "num_warps=1" in lines[1] and lines[1].endswith(": ValueError: too much")
    assert "num_warps=2" in lines[2] and lines[2].rstrip().endswith(": RuntimeError:")


# The command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command with a GPU and times that are made up; returns what was tuned from what.

    The blocks found have 11 stages after the first call of `tune`, 12 after the second.
    """
    shapes = {"small": SHAPE, "wide": dataclasses.replace(SHAPE, length=300, window=256)}
    monkeypatch.setattr(tune, "SHAPES", shapes)
    monkeypatch.setattr(blocks, "TABLE", tmp_path / "tuned.json")
    monkeypatch.setattr(blocks, "device_at_hand", lambda: DEVICE)
    tuned = []

    def fake_tune(shape, start, measure, interpret, kernels):
        assert not interpret and measure == ("measure", 3, "wall")
        tuned.append((shape, start, tuple(kernels)))
        changed = dataclasses.replace(start[0].outputs, num_stages=10 + len(tuned))
        times = dict.fromkeys(kernels, float(len(tuned)))
        return dataclasses.replace(start[0], outputs=changed), start[1], times

    monkeypatch.setattr(tune, "tune", fake_tune)
    monkeypatch.setattr(tune, "_measure", lambda runs, timer: ("measure", runs, timer))

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: "gpu")
            tune.main(["--runs", "3", "--timer", "wall", *arguments])
        blocks.table.cache_clear()
        return tuned

    yield run
    blocks.table.cache_clear()


def looked_up(shape, kind=DEVICE.kind):
    spec = tune.spec_of(shape)
    return blocks.choose(spec, dataclasses.replace(DEVICE, kind=kind))


def test_the_command_writes_what_kernels_look_up(command):
    other = {"forward": dataclasses.asdict(ForwardBlocks(chunk=16)), "backward": {}, "jax": "0"}
    blocks.TABLE.write_text(json.dumps({"entries": {"another GPU": other}}))
    small, wide = tune.SHAPES.values()
    before = looked_up(small)
    tuned = command("--shapes", "small")
    assert tuned == [(small, before, tuple(tune.CANDIDATES))]
    assert looked_up(small)[0].outputs.num_stages == 11
    assert looked_up(small, "another kind") == before
    command("--shapes", "wide")
    assert [looked_up(shape)[0].outputs.num_stages for shape in (small, wide)] == [11, 12]
    entries = json.loads(blocks.TABLE.read_text())["entries"]
    assert len(entries) == 3 and entries.pop("another GPU") == other
    for entry in entries.values():
        assert entry["jax"] == jax.__version__
        assert entry["milliseconds"].keys() == tune.CANDIDATES.keys()


def test_kernels_that_are_not_asked_for_stay(command):
    small = tune.SHAPES["small"]
    command("--shapes", "small")
    first = looked_up(small)
    tuned = command("--shapes", "small", "wide", "--kernels", "window", "scan")
    assert [kernels for _, _, kernels in tuned[1:]] == 2 * [("window", "scan")]
    # A wide window without an entry begins with that of the same sizes.
    second = looked_up(small)
    assert [start for _, start, _ in tuned[1:]] == [first, second]
    entry = json.loads(blocks.TABLE.read_text())["entries"][
        blocks.table_key(DEVICE.kind, tune.spec_of(small))
    ]
    expected = dict.fromkeys(tune.CANDIDATES, 1.0) | {"window": 2.0, "scan": 2.0}
    assert entry["milliseconds"] == expected


def test_the_command_writes_elsewhere(command, tmp_path, monkeypatch):
    small, wide = tune.SHAPES.values()
    command("--shapes", "small")
    before, path = blocks.TABLE.read_text(), tmp_path / "new.json"
    command("--shapes", "wide", "--output", str(path))
    assert blocks.TABLE.read_text() == before
    stages = []
    for again in (False, True):
        if again:
            command("--shapes", "small", "--output", str(path))
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "TABLE", path)
            blocks.table.cache_clear()
            stages.append([looked_up(shape)[0].outputs.num_stages for shape in (small, wide)])
    # It can take the place of the kernels' own, and what it has stays.
    assert stages == [[11, 12], [13, 12]]


def test_output_that_cannot_be_written_is_refused(command, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command("--output", str(tmp_path / "none" / "a.json"))
    assert capsys.readouterr().err.endswith("a.json: no such folder\n")
    asked = []
    monkeypatch.setattr(tune.os, "access", lambda path, mode: asked.append(path))
    for path in (blocks.TABLE, tmp_path / "there.json"):
        with pytest.raises(SystemExit):
            command("--output", str(path))
        assert capsys.readouterr().err.endswith(f"{path}: may not be written\n")
        path.write_text("{}")
    with pytest.raises(SystemExit):
        command()
    assert asked == [tmp_path, tmp_path, blocks.TABLE]


def test_the_command_needs_a_gpu():
    with pytest.raises(SystemExit, match="JAX sees no GPU here"):
        tune.main(["--shapes", "k128_mha"])


# The table that ships with the kernels


def test_the_table_has_all_shapes():
    entries = json.loads(blocks.TABLE.read_text())["entries"]
    keys = {blocks.table_key("", tune.spec_of(shape)): name for name, shape in tune.SHAPES.items()}
    assert len(keys) == len(tune.SHAPES), "shapes do not share an entry"
    found: dict[str, set] = {}
    for entry in entries:
        kind, dtype, sizes = entry.partition(" bfloat16 ")
        found.setdefault(kind, set()).add(keys[dtype + sizes])
    assert found == {"NVIDIA H100 80GB HBM3": set(tune.SHAPES)}
