"""The search for block sizes, with interpreted kernels and times that are made up."""

import dataclasses
import json

import jax

from pallas_kernels import blocks, tune
from pallas_kernels.blocks import BackwardBlocks, Block, ForwardBlocks

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
    spec = tune._draw(SHAPE, False)[0]
    key = blocks.table_key("some GPU", spec)
    entry = {"forward": dataclasses.asdict(forward), "backward": dataclasses.asdict(backward)}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"entries": {key: entry}}))
    monkeypatch.setattr(blocks, "TABLE", path)
    blocks.table.cache_clear()
    try:
        device = blocks.Device("some GPU", 232448, 132)
        found = blocks.choose(spec, device)
        assert found == (forward, backward)
        assert blocks.choose(spec, dataclasses.replace(device, kind="another")) != found
    finally:
        blocks.table.cache_clear()
