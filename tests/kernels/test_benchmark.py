"""The kernels' benchmark: what can be checked without a GPU."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from nha_jax.ops import native_hybrid_attention
from pallas_kernels import benchmark
from pallas_kernels.benchmarks import inputs, peers, report, timing
from pallas_kernels.benchmarks.attribution import (
    Kernel,
    Timing,
    TraceError,
    split_by_gaps,
    split_by_name,
)
from pallas_kernels.benchmarks.attribution import timing as timing_of_calls
from pallas_kernels.benchmarks.cases import CASES, Case, Limit
from pallas_kernels.benchmarks.floors import (
    Machine,
    decode_bytes,
    floor,
    minimal_bytes,
    minimal_flops,
    window_pairs,
)

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"
MACHINE = Machine(copy_bandwidth=3e12, matmul_rate=8e14)
TINY = Case(
    "tiny", batch=2, length=12, num_heads=4, num_kv_heads=2, head_size=16, num_slots=16, window=4
)
# (batch, length, query heads, key/value heads, head size, slots, window)
SHAPES = {
    "b8_t2048": (8, 2048, 8, 8, 128, 64, 64),
    "t8192": (1, 8192, 32, 8, 128, 64, 64),
    "t32768": (1, 32768, 32, 8, 128, 64, 64),
    "t131072": (1, 131072, 32, 8, 128, 64, 64),
    "k64": (16, 4096, 16, 16, 64, 64, 64),
    "k256": (8, 2048, 4, 4, 256, 64, 64),
    "w1024": (1, 32768, 32, 8, 128, 64, 1024),
    "full": (1, 8192, 32, 8, 128, 64, None),
    "packed16": (1, 8192, 32, 8, 128, 64, 64),
    "full_packed16": (1, 8192, 32, 8, 128, 64, None),
    "w0": (8, 2048, 8, 8, 128, 64, 0),
    "strong": (8, 2048, 8, 8, 128, 64, 64),
    "float32_b8_t2048": (8, 2048, 8, 8, 128, 64, 64),
    "float32_t8192": (1, 8192, 32, 8, 128, 64, 64),
    "float32_k64": (16, 4096, 16, 16, 64, 64, 64),
    "float32_k256": (8, 2048, 4, 4, 256, 64, 64),
    "float32_t8192_w1024": (1, 8192, 32, 8, 128, 64, 1024),
    "decode_w64": (64, 4096, 32, 8, 128, 64, 64),
    "decode_full_b1": (1, 131072, 32, 8, 128, 0, None),
    "decode_full_b3": (3, 131072, 32, 8, 128, 0, None),
    "xla_b8_t2048": (8, 2048, 8, 8, 128, 64, 64),
    "xla_t8192": (1, 8192, 32, 8, 128, 64, 64),
    "xla_t32768": (1, 32768, 32, 8, 128, 64, 64),
    "xla_float32_b8_t2048": (8, 2048, 8, 8, 128, 64, 64),
    "xla_float32_t8192": (1, 8192, 32, 8, 128, 64, 64),
    "xla_float32_k64": (16, 4096, 16, 16, 64, 64, 64),
    "xla_float32_k256": (8, 2048, 4, 4, 256, 64, 64),
    "xla_float32_t8192_w1024": (1, 8192, 32, 8, 128, 64, 1024),
}
# (kind, against, required forward, required forward + backward, aims of both)
LIMITS = {
    "b8_t2048": ("milliseconds", "", 0.24, 1.1, 0.13, 0.70),
    "t8192": ("milliseconds", "", 0.5, 2.4, 0.25, 1.3),
    "t32768": ("speedup_over_peer", "cudnn_causal", 8, 6, 15, 10),
    "t131072": ("milliseconds", "", 6.5, None, 3.5, None),
    "k64": ("memory_ratio_times_case", "b8_t2048", 1.5, 1.5, 1.0, 1.0),
    "k256": ("memory_ratio_times_case", "b8_t2048", 1.5, 2.5, 1.0, 1.0),
    "w1024": ("times_peer", "cudnn_window", 3, 2.5, 2, 1.7),
    "full": ("times_peer", "cudnn_causal_rope", 1.05, 1.05, 1.0, 1.0),
    "packed16": ("times_case", "t8192", 1.15, 1.15, 1.0, 1.0),
    "decode_w64": ("copy_bandwidth", "", 0.5, None, 0.8, None),
    "decode_full_b1": ("copy_bandwidth", "", 0.5, None, 0.85, None),
    "decode_full_b3": ("copy_bandwidth", "", 0.5, None, 0.85, None),
    "xla_b8_t2048": ("slower_than_case", "b8_t2048", 3, 3, None, None),
    "xla_t8192": ("slower_than_case", "t8192", 3, 3, None, None),
    "xla_t32768": ("slower_than_case", "t32768", 3, 3, None, None),
}


# Cases


def test_case_table():
    def shape(case):
        heads = (case.num_heads, case.num_kv_heads)
        return (case.batch, case.length, *heads, case.head_size, case.num_slots, case.window)

    assert {name: shape(case) for name, case in CASES.items()} == SHAPES
    assert all(case.rope for case in CASES.values())
    dtypes = {name: case.dtype for name, case in CASES.items()}
    assert dtypes == {n: "float32" if "float32" in n else "bfloat16" for n in SHAPES}
    limits = {name: case.limit for name, case in CASES.items() if case.limit is not None}
    assert {name: dataclasses.astuple(limit) for name, limit in limits.items()} == LIMITS
    assert {name: case.implementation for name, case in CASES.items()} == {
        name: "xla" if name.startswith("xla_") else "automatic" if name == "full" else "asked"
        for name in SHAPES
    }
    assert {name: case.log_decay for name, case in CASES.items() if case.log_decay} == {
        "strong": -2.0
    }
    without_backward = {name for name, case in CASES.items() if not case.backward}
    assert without_backward == {"t131072", "decode_w64", "decode_full_b1", "decode_full_b3"}


def test_limits_refer_to_what_is_measured():
    for case in (case for case in CASES.values() if case.limit is not None):
        against = case.limit.against
        if case.limit.kind in ("times_peer", "speedup_over_peer"):
            assert against in case.peers, case.name
        elif against:
            # Earlier in the table, so that it has run.
            names = list(CASES)
            assert names.index(against) < names.index(case.name)
        assert set(case.peers) <= set(peers.PEERS)


def test_documents_fill_a_row():
    lengths = CASES["packed16"].document_lengths
    assert len(lengths) == 16 and sum(lengths) == 8192 and min(lengths) >= 1
    assert any(length % 64 for length in lengths), "aligned documents would be an easier case"
    assert CASES["t8192"].document_lengths == (8192,)


# Floors


def test_bytes_by_hand():
    case = CASES["b8_t2048"]
    array, gates = 8 * 2048 * 8 * 128 * 2, 8 * 2048 * 8 * 64 * 4
    tables = 2 * 2048 * 64 * 4
    assert minimal_bytes(case, backward=False) == 4 * array + gates + tables
    # Also the cotangent, and the gradients of q, k, v and the gates.
    assert minimal_bytes(case, backward=True) == 8 * array + 2 * gates + tables
    wide = CASES["float32_b8_t2048"]
    assert minimal_bytes(wide, backward=True) == 16 * array + 2 * gates + tables
    packed, plain = CASES["packed16"], CASES["t8192"]
    extra = minimal_bytes(packed, backward=False) - minimal_bytes(plain, backward=False)
    assert extra == 8192 * 4


def test_gates_of_full_attention_are_not_read():
    case = CASES["full"]
    q, k = 8192 * 32 * 128 * 2, 8192 * 8 * 128 * 2
    assert minimal_bytes(case, backward=False) == 2 * q + 2 * k + 2 * 8192 * 64 * 4


def test_flops_by_hand():
    # 2080 pairs while the window fills, then 1984 tokens that read 64 keys and 64 slots each; as
    # many retirements. Every read and write costs 2 (K + V) = 512 FLOPs.
    pairs, with_slots = 2080 + 1984 * 64, 1984
    expected = 8 * 8 * 512 * (pairs + 2 * 64 * with_slots)
    assert minimal_flops(CASES["b8_t2048"], backward=False) == expected == 12_550_406_144
    assert minimal_flops(CASES["b8_t2048"], backward=True) == 3 * expected
    # Full attention: T (T + 1) / 2 pairs a head, and no slots.
    assert minimal_flops(CASES["full"], backward=False) == 32 * 512 * 8192 * 8193 // 2


@pytest.mark.parametrize(("length", "window"), [(5, 3), (3, 5), (4, 4), (1, 1), (7, 0)])
def test_window_pairs_against_counting(length, window):
    counted = sum(1 for t in range(length) for j in range(t + 1) if t - j < window)
    assert window_pairs(length, window) == counted


def test_decode_bytes_by_hand():
    slots, window = 8 * 64 * 256 * 4, 8 * 64 * 256 * 2
    token = (32 + 8 + 8) * 128 * 2 + 8 * 64 * 4 + 32 * 128 * 2
    assert decode_bytes(CASES["decode_w64"]) == 64 * (2 * slots + window + token)
    token = (32 + 8 + 8) * 128 * 2 + 32 * 128 * 2
    assert decode_bytes(CASES["decode_full_b3"]) == 3 * (131072 * 8 * 256 * 2 + token)
    wide = dataclasses.replace(CASES["decode_full_b3"], dtype="float32")
    assert decode_bytes(wide) == 2 * decode_bytes(CASES["decode_full_b3"])


def test_floor_is_the_larger_of_two_times():
    memory = floor(CASES["b8_t2048"], MACHINE, backward=False)
    assert memory.ms == memory.memory_ms == pytest.approx(1e3 * memory.bytes / 3e12)
    assert memory.bound == "memory"
    compute = floor(CASES["full"], MACHINE, backward=True)
    assert compute.ms == compute.compute_ms == pytest.approx(1e3 * compute.flops / 8e14)
    assert compute.bound == "compute"


# Traces


def kernel(name: str, start: float, duration: float) -> Kernel:
    return Kernel(name, float(start), float(duration))


def synthetic_trace(lines: dict[str, list[tuple[str, int, int]]], plane: str = "/device:GPU:0"):
    """A profile of one plane: by line the events (name, start ns, duration ns)."""
    names = sorted({name for events in lines.values() for name, _, _ in events})
    ids = {name: i + 1 for i, name in enumerate(names)}
    text = f'planes {{ id: 1 name: "/host:CPU" }} planes {{ id: 2 name: "{plane}" '
    for i, (line, events) in enumerate(lines.items()):
        text += f'lines {{ id: {i + 1} name: "{line}" timestamp_ns: 1000 '
        text += "".join(
            f"events {{ metadata_id: {ids[name]} offset_ps: {start * 1000} "
            f"duration_ps: {duration * 1000} }} "
            for name, start, duration in events
        )
        text += "} "
    text += "".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }} '
        for name, i in ids.items()
    )
    return ProfileData.from_text_proto(text + "}")


def test_device_kernels_counts_streams_alone():
    profile = synthetic_trace(
        {
            "Stream #7(Compute)": [("states", 0, 10), ("Memset 0", 12, 3), ("outputs", 20, 30)],
            "Stream #8(MemcpyD2D)": [("MemcpyD2D", 5, 7), ("MemoryFree", 6, 1)],
            "XLA Modules": [("jit_forward", 0, 50)],
            "XLA Ops": [("states", 0, 10), ("outputs", 20, 30)],
            "Steps": [("1", 0, 50)],
        }
    )
    kernels = timing.device_kernels(profile)
    assert sorted((each.name, each.duration_ns) for each in kernels) == [
        ("MemcpyD2D", 7),
        ("Memset 0", 3),
        ("outputs", 30),
        ("states", 10),
    ]


def test_a_trace_without_streams_says_what_it_holds():
    with pytest.raises(TraceError, match=r"/host:CPU.*XLA Modules"):
        timing.device_kernels(synthetic_trace({"XLA Modules": [("jit_forward", 0, 50)]}))
    with pytest.raises(TraceError, match="no GPU stream"):
        timing.device_kernels(synthetic_trace({"Stream #1": [("x", 0, 1)]}, plane="/device:TPU:0"))


def test_a_graph_without_its_kernels_is_refused():
    graphs = [("CudaGraphExec:5", 0, 20), ("CudaGraphExec:5", 30, 20)]
    kernels = [("states", 1, 9), ("outputs", 10, 9), ("states", 31, 9)]
    # On whichever stream: those of a graph have their own.
    found = timing.device_kernels(synthetic_trace({"Stream #1": graphs, "Stream #2": kernels}))
    assert [each.name for each in found] == ["states", "outputs", "states"]
    for missing in (kernels[:2], [*kernels[:2], ("states", 20, 10), ("states", 50, 9)], []):
        with pytest.raises(TraceError, match="CudaGraphExec:5 was traced as a whole"):
            timing.device_kernels(synthetic_trace({"Stream #1": graphs, "Stream #2": missing}))


def test_split_by_name():
    # Two calls of (a, b, b) queued back to back; b's second launch of the first call overlaps a's
    # of the second call on another stream.
    kernels = [
        kernel("b", 10, 1),
        kernel("a", 0, 100),
        kernel("b", 160, 4),
        kernel("b", 150, 2),
        kernel("a", 140, 200),
        kernel("b", 180, 8),
    ]
    calls = split_by_name(kernels, 2)
    assert [sum(each.duration_ns for each in call) for call in calls] == [103, 212]
    measured = timing_of_calls(calls, "note")
    assert measured.calls_ms == pytest.approx((103e-6, 212e-6))
    shares = {share.name: (share.ms, share.launches) for share in measured.kernels}
    assert shares["a"] == (pytest.approx(150e-6), 1)
    assert shares["b"] == (pytest.approx(7.5e-6), 2)
    assert [share.name for share in measured.kernels] == ["a", "b"], "largest first"


@pytest.mark.parametrize("count", [3, 5])
def test_split_by_name_refuses_another_number_of_calls(count):
    kernels = [kernel("a", 10 * i, 1) for i in range(count)]
    with pytest.raises(TraceError, match=f"{count} launches of a for 4 calls"):
        split_by_name(kernels, 4)
    with pytest.raises(TraceError, match="no device work"):
        split_by_name([], 4)


def test_split_by_gaps():
    # The second call takes another branch. A long kernel bridges what would be a gap.
    kernels = [
        kernel("a", 0, 5000),
        kernel("b", 100, 1),
        kernel("c", 5100, 1),
        kernel("a", 8000, 10),
        kernel("d", 8020, 10),
    ]
    calls = split_by_gaps(kernels, 2, least_gap_ns=1000.0)
    assert [[each.name for each in call] for call in calls] == [["a", "b", "c"], ["a", "d"]]
    with pytest.raises(TraceError, match="shows 2 calls where 3 were made"):
        split_by_gaps(kernels, 3, least_gap_ns=1000.0)


def test_a_trace_of_a_cpu_is_refused(caplog):
    with pytest.raises(TraceError, match="try --timer wall"):
        timing.usable_timer("profiler")
    assert timing.usable_timer("auto") == "wall"
    assert "--timer wall" in caplog.text
    assert timing.usable_timer("wall") == "wall"


def test_the_median_of_calls_counts():
    measured = Timing((5.0, 1.0, 2.0), "profiler")
    assert measured.median == measured.as_json()["median_ms"] == 2.0
    assert report.Outcome(measured).ms == 2.0


def test_timing_survives_json():
    measured = timing_of_calls([[kernel("a", 0, 1.5)], [kernel("a", 2, 2.5)]], "note")
    assert Timing.from_json(json.loads(json.dumps(measured.as_json()))) == measured


# Programs


def test_enough_buffers_to_leave_the_cache():
    l2 = 50 * 2**20
    for size in (1, 2**20, l2, 2 * l2, 3 * l2):
        count = inputs.num_sets(size, l2)
        assert count >= 2 and count * size > 2 * l2


@pytest.mark.parametrize(
    "changes",
    [{"documents": 3}, {"window": None}],
    ids=["documents", "full"],
)
def test_program_runs_the_operator(changes):
    case = dataclasses.replace(TINY, **changes)
    program, sets = inputs.operator_program(case, "reference", l2_bytes=20_000, backward=True)
    assert sets > 2
    out, gradients = program(sets + 1)
    drawn = inputs.draw_inputs(case, 1)
    expected = native_hybrid_attention(
        drawn.q,
        drawn.k,
        drawn.v,
        drawn.log_decay,
        window=case.static_window,
        rope=drawn.rope,
        segment_ids=drawn.segment_ids,
        implementation="reference",
    )
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), atol=0.03)
    shapes = [(g.shape, g.dtype) for g in gradients]
    assert shapes == [(x.shape, x.dtype) for x in (drawn.q, drawn.k, drawn.v, drawn.log_decay)]
    assert drawn.q.dtype == jnp.bfloat16 and drawn.log_decay.dtype == jnp.float32
    wide = inputs.draw_inputs(dataclasses.replace(case, dtype="float32"), 1)
    assert {x.dtype for x in (wide.q, wide.k, wide.v, wide.cotangent)} == {jnp.dtype("float32")}
    assert float(drawn.log_decay.max()) <= 0
    strong = inputs.draw_inputs(dataclasses.replace(case, log_decay=-2.0), 1).log_decay
    assert strong.shape == drawn.log_decay.shape and set(np.unique(strong)) == {-2.0}
    assert all(bool(jnp.isfinite(g.astype(jnp.float32)).all()) for g in gradients)


def test_forward_program_has_no_gradients():
    program, _ = inputs.operator_program(TINY, "reference", l2_bytes=1, backward=False)
    assert program(0).shape == (2, 12, 4, 16)


@pytest.mark.parametrize(
    "changes",
    [{}, {"window": None, "num_slots": 0}],
    ids=["window", "full"],
)
def test_decode_program_steps_its_caches(changes):
    case = dataclasses.replace(TINY, decode=True, backward=False, **changes)
    program, sets = inputs.operator_program(case, "reference", l2_bytes=20_000, backward=False)
    outs = [np.asarray(program(i), np.float32) for i in range(2 * sets)]
    assert outs[0].shape == (2, 1, 4, 16) and all(np.isfinite(out).all() for out in outs)
    # The same token again, but one step later.
    assert np.abs(outs[0] - outs[sets]).max() > 0
    cache = inputs.draw_cache(case, 0)
    assert int(cache.length.max()) <= case.length
    assert bool(cache.slots_empty.all()) == case.is_full
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache) if leaf.size]
    assert len(set(buffers)) == len(buffers), "a donated cache shares no buffers"


def test_decode_program_donates_caches_that_do_not_stay_in_the_l2(monkeypatch):
    case = dataclasses.replace(TINY, decode=True, backward=False)
    caches, real, l2_bytes = [], inputs.draw_cache, 100_000

    def draw(*args):
        caches.append(real(*args))
        return caches[-1]

    monkeypatch.setattr(inputs, "draw_cache", draw)
    program, sets = inputs.operator_program(case, "reference", l2_bytes, backward=False)
    assert sets == len(caches) > 2
    assert sum(inputs.tree_bytes(cache) for cache in caches) > 2 * l2_bytes
    program(1)
    leaves = [[leaf for leaf in jax.tree.leaves(cache) if leaf.size] for cache in caches]
    assert all(leaf.is_deleted() for leaf in leaves[1])
    assert not any(leaf.is_deleted() for leaf in leaves[0])


def test_wall_clock_of_a_program():
    program, sets = inputs.operator_program(TINY, "reference", l2_bytes=1, backward=False)
    measured = timing.measure(program, runs=3, timer="wall", warm_up=sets)
    assert measured.timer == "wall" and len(measured.calls_ms) == 3 and measured.median > 0


@pytest.mark.parametrize("rope", [False, True], ids=["plain", "rope"])
@pytest.mark.parametrize("name", ["cudnn_causal", "cudnn_window"])
def test_peers_of_cudnn(name, rope, monkeypatch):
    """The window, the mask and the rotation that cuDNN is asked for, on XLA's attention."""
    real = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *x, implementation, **options: real(*x, implementation="xla", **options),
    )
    captured = {}

    def run_once(program, **options):
        captured.update(options, first=program(0), second=program(1))
        return Timing((1.0,), "wall")

    monkeypatch.setattr(peers, "measure", run_once)
    peers.measure_peer(
        name + "_rope" * rope, TINY, backward=True, runs=7, timer="wall", l2_bytes=20_000
    )
    for seed, call in enumerate(("first", "second")):
        out, gradients = captured[call]
        drawn = inputs.draw_inputs(dataclasses.replace(TINY, num_slots=0), seed)
        expected = native_hybrid_attention(
            drawn.q,
            drawn.k,
            drawn.v,
            None,
            window=TINY.window if name == "cudnn_window" else TINY.length,
            rope=drawn.rope if rope else None,
            implementation="reference",
        )
        np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), atol=0.03)
        assert len(gradients) == 3
    # Every set of buffers is touched before, and together they do not stay in the L2.
    assert captured["warm_up"] * inputs.tree_bytes(drawn) > 2 * 20_000
    assert captured["warm_up"] > 3 and captured["runs"] == 7 and captured["timer"] == "wall"


def test_missing_peer_is_named(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(peers.NotInstalled, match="'jla'"):
        peers.measure_peer("jla_gla", TINY, backward=False, runs=1, timer="wall", l2_bytes=1)


# The command


def test_defaults_of_the_command():
    assert benchmark._parse([]) == benchmark.Options(
        cases=tuple(SHAPES),
        peers=tuple(peers.PEERS),
        implementation="pallas_triton",
        forward_only=False,
        runs=20,
        timer="profiler",
        breakdown=False,
        json=None,
    )


@pytest.mark.parametrize("option", ["--json none/a.json", "--runs 0"])
def test_bad_command_lines(option, tmp_path, monkeypatch, capsys):
    """Told before anything is measured, or a GPU looked for."""
    monkeypatch.chdir(tmp_path)
    message = {"--json none/a.json": "no such folder", "--runs 0": "expected at least 1"}[option]
    with pytest.raises(SystemExit) as ended:
        benchmark.main(option.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {option}: {message}\n")
    assert benchmark._parse(["--json", "a.json"]).json.name == "a.json"


@pytest.mark.parametrize(
    ("of_case", "runs_as", "shown"),
    [("asked", "cudnn", "cudnn"), ("automatic", None, "automatic"), ("xla", "xla", "xla")],
)
def test_a_case_is_measured_as_it_asks(of_case, runs_as, shown, monkeypatch):
    case = dataclasses.replace(TINY, implementation=of_case, peers=("cudnn_causal", "fla_gsa"))
    seen = {"operator": [], "measure": [], "peer": []}

    def operator_program(*args, **options):
        seen["operator"].append((args, options["backward"]))
        return "program", 5

    def measure(program, **options):
        seen["measure"].append((program, options))
        return Timing((1.0,), "wall")

    def measure_peer(name, case, **options):
        seen["peer"].append((name, options))
        return Timing((2.0,), "wall")

    monkeypatch.setattr(benchmark, "operator_program", operator_program)
    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "measure_peer", measure_peer)
    command = ["--runs", "9", "--implementation", "cudnn", "--peers", "cudnn_causal"]
    found = benchmark._run(case, benchmark._parse(command), "wall", MACHINE, 1000)
    assert found.implementation == shown
    assert seen["operator"] == [((case, runs_as, 1000), backward) for backward in (False, True)]
    # Every set of inputs is touched before.
    assert seen["measure"] == 2 * [("program", {"runs": 9, "timer": "wall", "warm_up": 5})]
    options = {"runs": 9, "timer": "wall", "l2_bytes": 1000}
    assert seen["peer"] == [
        ("cudnn_causal", options | {"backward": backward}) for backward in (False, True)
    ]


def test_command_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    """With a CPU for a GPU: one case that runs, one that fails, a peer that is not there."""
    tiny = dataclasses.replace(TINY, backward=False, peers=("cudnn_causal", "jla_gla"))
    cases = {
        "tiny": dataclasses.replace(tiny, limit=Limit("milliseconds", forward=1e9)),
        "bad": dataclasses.replace(tiny, name="bad", peers=(), window=-1),
    }
    monkeypatch.setattr(benchmark, "CASES", cases)
    monkeypatch.setattr(benchmark, "_gpu", lambda: jax.devices()[0])
    monkeypatch.setattr(benchmark, "_l2_bytes", lambda: 1)
    monkeypatch.setattr(benchmark, "measure_machine", lambda **options: (MACHINE, {}))
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "out.json"
    command = ["--timer", "wall", "--runs", "2", "--implementation", "reference", "--json"]
    assert benchmark.main([*command, str(path), "--cases", "tiny"]) == 0
    found = json.loads(path.read_text())
    assert found["timer"] == "wall" and found["versions"]["jax"] == jax.__version__
    [only] = found["rows"]
    assert len(only["ours"]["forward"]["calls_ms"]) == 2 and only["required"][0]["met"]
    assert only["peers"]["cudnn_causal"]["forward"]["reason"].startswith("failed: ")
    assert only["peers"]["jla_gla"]["forward"]["reason"].startswith("not installed: ")
    printed = capsys.readouterr().out
    assert "wall clock" in printed and "not installed: no module 'jla'" in printed
    assert benchmark.main([*command, str(path), "--peers", "none"]) == 1, "a case failed"
    rows = json.loads(path.read_text())["rows"]
    assert [each["case"]["name"] for each in rows] == ["tiny", "bad"]
    assert "window=-1" in rows[1]["ours"]["forward"]["reason"]
    assert rows[0]["peers"] == {}


# Report


def row(case: Case, forward: float, both: float | None = None, **by_peer: float) -> report.Row:
    def outcome(ms):
        return report.Outcome(Timing((float(ms),) * 3, "profiler"))

    found = report.Row(case, "pallas_triton")
    for which, ms in (("forward", forward), ("both", both)):
        if ms is None:
            continue
        found.ours[which] = outcome(ms)
        found.floors[which] = floor(case, MACHINE, backward=which == "both")
        for peer, peer_ms in by_peer.items():
            found.peers.setdefault(peer, {})[which] = outcome(peer_ms)
    return found


def met(found: report.Row, *others: report.Row) -> list[bool | None]:
    rows = {each.case.name: each for each in (found, *others)}
    return [verdict.met for verdict in report.verdicts(found, rows)]


def test_limits():
    first = row(CASES["b8_t2048"], 0.24, 1.11)
    assert met(first) == [True, False]
    t32768 = CASES["t32768"]
    assert met(row(t32768, 1.0, 1.5, cudnn_causal=8.5)) == [True, False]
    assert met(row(t32768, 1.0, 1.0)) == [None, None], "the peer is missing"
    assert met(row(CASES["w1024"], 2.9, 2.9, cudnn_window=1.0)) == [True, False]
    assert met(row(CASES["packed16"], 1.1, 1.2), row(CASES["t8192"], 1.0, 1.0)) == [True, False]
    assert met(row(CASES["packed16"], 1.1, 1.2)) == [None, None], "the other case did not run"
    assert met(row(CASES["xla_b8_t2048"], 0.9, 3.0), first) == [True, False]
    # decode_full_b1: 0.179 ms at the full bandwidth.
    assert met(row(CASES["decode_full_b1"], 0.35)) == [True]
    assert met(row(CASES["decode_full_b1"], 0.37)) == [False]


def test_memory_ratio_is_relative_to_the_first_case():
    first, k256 = CASES["b8_t2048"], CASES["k256"]

    def at(case, ratio_forward, ratio_both):
        floors = [floor(case, MACHINE, backward=backward).memory_ms for backward in (False, True)]
        return row(case, ratio_forward * floors[0], ratio_both * floors[1])

    assert met(at(k256, 4.4, 7.4), at(first, 3, 3)) == [True, True]
    assert met(at(k256, 4.6, 7.6), at(first, 3, 3)) == [False, False]


def test_limit_kinds_have_a_direction():
    assert Limit("milliseconds", forward=1.0).holds(0.9, 1.0)
    assert not Limit("milliseconds", forward=1.0).holds(1.1, 1.0)
    assert Limit("copy_bandwidth", forward=0.5).holds(0.6, 0.5)
    assert not Limit("copy_bandwidth", forward=0.5).holds(0.4, 0.5)


def test_table_and_json_name_what_is_missing():
    found = row(CASES["b8_t2048"], 0.2, 1.0, cudnn_causal=0.17)
    found.peers["jla_gla"] = {"forward": report.Outcome(reason="not installed: no module 'jla'")}
    found.ours["both"] = report.Outcome(reason="failed: ValueError: too large")
    rows = {"b8_t2048": found}
    text = "\n".join(report.table(rows, MACHINE, "wall"))
    for part in ("wall clock", "not installed: no module 'jla'", "failed: ValueError", "0.2000"):
        assert part in text
    assert "required forward <= 0.24 ms: 0.2: met" in text
    data = json.loads(json.dumps(report.as_json(rows)))[0]
    assert data["ours"]["both"] == {"reason": "failed: ValueError: too large"}
    assert data["ours"]["forward"]["median_ms"] == 0.2
    assert data["required"][0]["met"] and data["required"][1]["met"] is None
    assert report.from_json([data]) == rows


def _committed(name: str) -> dict[str, report.Row]:
    """The rows of a committed file, which says of itself what is so."""
    data = json.loads((RESULTS / f"{name}.json").read_text())
    rows = report.from_json(data["rows"])
    machine = Machine(data["machine"]["copy_bandwidth"], data["machine"]["matmul_rate"])
    for name, found in rows.items():
        passes = ("forward", "both") if found.case.backward else ("forward",)
        assert tuple(found.ours) == tuple(found.floors) == passes, name
        for which in passes:
            assert found.floors[which] == floor(found.case, machine, backward=which == "both"), name
        assert all(outcome.timing is not None for outcome in found.ours.values()), name
        for outcomes in (found.ours, *found.peers.values()):
            for measured in (each.timing for each in outcomes.values() if each.timing is not None):
                assert len(measured.calls_ms) >= 20 and measured.timer == "profiler", name
    # The file's own figures and verdicts follow from its times.
    assert json.loads(json.dumps(report.as_json(rows))) == data["rows"]
    assert data["device"].startswith("NVIDIA H100")
    assert not any(word.startswith("/") for word in data["command_line"]), "a path of someone's own"
    assert _cases(rows).items() <= CASES.items(), "measured as they are now"
    return rows


def _cases(rows: dict[str, report.Row]) -> dict[str, Case]:
    return {name: row.case for name, row in rows.items()}


def test_committed_results_meet_every_limit():
    rows = _committed("h100_kernels")
    assert _cases(rows) == CASES
    verdicts = [verdict for row in rows.values() for verdict in report.verdicts(row, rows)]
    assert all(verdict.met for verdict in verdicts), verdicts
    bounds = [bound for limit in LIMITS.values() for bound in limit[2:4]]
    assert len(verdicts) == sum(bound is not None for bound in bounds)


def test_committed_results_have_every_peer():
    # One peer's search for block sizes takes as long as all cases, so it has a run of its own.
    files = [_committed(path.stem) for path in RESULTS.glob("h100_kernels*.json")]
    timed = {
        name
        for row in itertools.chain(*(rows.values() for rows in files))
        for name, outcomes in row.peers.items()
        if all(outcome.timing is not None for outcome in outcomes.values())
    }
    assert timed == set(peers.PEERS)


def test_command_without_a_gpu_says_so_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.benchmark"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().splitlines() == [
        "pallas_kernels.benchmark: needs an NVIDIA GPU that JAX sees; JAX runs on cpu"
    ]
