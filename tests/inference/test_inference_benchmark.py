"""The benchmark of inference: what it measures, what does not fit, what it requires."""

import dataclasses
import datetime
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nha_jax.inference import benchmark, cache_bytes
from nha_jax.inference.benchmarks import processes, programs, worker
from nha_jax.inference.benchmarks.cells import (
    LARGEST,
    MORE_MAY_FIT,
    Cell,
    Origin,
    Result,
    architecture,
    described,
    token_weight_bytes,
    weight_bytes,
)
from nha_jax.inference.benchmarks.noise import abstract_state, noise, noise_model, noise_state
from nha_jax.inference.benchmarks.picture import draw
from nha_jax.inference.benchmarks.programs import cache_size
from nha_jax.inference.benchmarks.report import LIMITS, LIMITS_CONTEXT, Report, table
from nha_jax.inference.benchmarks.settings import Machine, Settings
from nha_jax.models import preset

MACHINE = Machine("a device", "gpu", 75 * 2**30, 3e12, {"jax": "0"})


def ok(name, measure, context, batch, ms, rows=None) -> Result:
    return Result(Cell(name, measure, context, batch), "ok", batch=rows or batch, milliseconds=ms)


# What is measured


@pytest.mark.parametrize(("shape", "depth"), [("llama3_8b", 32), ("qwen2_5_7b", 28)])
def test_architectures_of_the_shapes(shape, depth):
    full, hybrid, nha = (architecture(preset(shape), name) for name in ("full", "hybrid", "nha"))
    assert {layer for layer in full.layers()} == {("full", "full")}
    at = [i for i, layer in enumerate(hybrid.layers()) if layer.window == "full"]
    assert at == [i * depth // 4 + depth // 4 - 1 for i in range(4)]
    assert described(hybrid) == "4 full layers, the rest NHA"
    assert {layer.window for layer in nha.layers()} == {64} and nha.num_slots == 64
    # The baseline has no gates, and its table of embeddings is not read.
    gates = 2 * depth * full.width * full.num_kv_heads * 64
    assert weight_bytes(nha) - weight_bytes(full) == gates
    assert token_weight_bytes(nha) - token_weight_bytes(full) == gates
    assert token_weight_bytes(full) < weight_bytes(full) - 2 * full.vocab_size * full.width
    ratio = cache_bytes(hybrid, 1, LIMITS_CONTEXT) / cache_bytes(full, 1, LIMITS_CONTEXT)
    assert 4 / depth < ratio <= 0.16


def test_models_and_caches_of_noise():
    config = dataclasses.replace(architecture(preset("nano"), "hybrid"), compute_dtype="bfloat16")
    _, parameters = noise_model(config)
    leaves = jax.tree.leaves(parameters)
    assert sum(leaf.nbytes for leaf in leaves) == weight_bytes(config)
    matrix = np.asarray(parameters["blocks"]["nha"][0]["mlp"]["up"][...])
    assert (
        abs(matrix.mean()) < 1e-3 and abs(matrix.std() / (2 / 5 / config.width) ** 0.5 - 1) < 0.01
    )
    assert float(parameters["final_norm"]["scale"][...].min()) == 1
    state = noise_state(abstract_state(config, 3, 100), 40)
    assert cache_size(state) == cache_bytes(config, 3, 100)
    assert state.position.tolist() == [40] * 3 and state.cache.segment_id.tolist() == [1] * 3
    slots, full = state.cache.stacks
    assert float(slots.pending_log_decay.max()) <= 0 and not bool(slots.slots_empty.any())
    values = np.asarray(full.window_k, np.float32)
    assert values.std() == pytest.approx(3**-0.5, rel=0.02)
    assert np.unique(noise((4, 4096), jnp.float32, 1.0, 0)).size > 16_000, "no row repeats another"


@pytest.mark.parametrize("piece", [64, 32])
def test_a_prompt_is_read_from_the_beginning(piece):
    config = architecture(preset("nano"), "hybrid")
    graph, parameters = noise_model(config)
    prefill = programs.Prefill(config, graph, parameters, context=64, piece=piece)
    samples, size, _ = prefill.run(parameters, 1)
    assert len(samples) == 1 and size == cache_bytes(config, 1, 64)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, parameters)
    with pytest.raises(FloatingPointError, match="logits"):
        prefill.run(broken, 1)


def test_batches_that_are_tried():
    assert [worker.round_batch(n) for n in (1, 5, 16, 17, 31, 37, 500)] == [
        1,
        5,
        16,
        16,
        30,
        36,
        480,
    ]
    settings = Settings("nano", memory_limit=24 * 2**20)
    cell = Cell("full", "decode", 1024, LARGEST)
    found = worker.Worker(dataclasses.replace(settings, blocks=1), [cell]).measure(cell)
    assert found.status == "ok" and found.batch >= 1
    assert found.program_bytes <= settings.memory_limit
    # Half as many again would not have fitted, even if nothing but caches grew.
    least = weight_bytes(settings.config("full"))
    assert least + cache_bytes(settings.config("full"), 8 * found.batch, 1024) > 24 * 2**20
    assert found.tokens_per_second == pytest.approx(1e3 * found.batch / found.milliseconds)


def test_what_does_not_fit_or_fails_is_a_result():
    cell = Cell("full", "decode", 1024)
    small = worker.Worker(Settings("nano", memory_limit=2**20), [cell]).measure(cell)
    assert small.status == "does not fit" and "limit 0.0 GiB" in small.reason
    short = Cell("nha", "decode", 64)
    failed = worker.Worker(Settings("nano"), [short]).measure(short)
    assert failed.status == "failed" and "context=64: expected more than" in failed.reason


def test_a_process_that_dies_costs_one_cell(monkeypatch):
    cells = [Cell("full", "decode", 1024, batch) for batch in (1, 2, 3)]
    started = []

    def start(settings, cells, cache, machine):
        started.append(cells)
        events = [{"event": "begin", "number": 0}]
        if cells[0].batch != 2:
            events.append(
                {"event": "result"} | ok("full", "decode", 1024, cells[0].batch, 1.0).as_json()
            )
            events.append({"event": "begin", "number": 1})
        lines = "".join(f"print({json.dumps(event)!r}, flush=True);" for event in events[:3])
        code = f"import sys;print('noise');{lines}sys.exit({9 if len(cells) > 1 else 0})"
        if len(cells) == 1:
            code = code.replace(json.dumps(events[-1]), "{}")
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(processes, "_start", start)
    found = list(processes.run_cells(Settings("nano"), cells, "", machine=False))
    assert [result.status for result in found] == ["ok", "failed", "ok"]
    assert found[1].reason == "its process ended with status 9"
    assert [len(each) for each in started] == [3, 1]


# The command


def test_command_end_to_end(tmp_path, capsys, monkeypatch):
    path, picture = tmp_path / "out.json", tmp_path / "out.png"
    command = ["--shape", "nano", "--architectures", "full", "--contexts", "128"]
    command += ["--blocks", "1", "--runs", "1", "--batches", "1", "1000000000"]
    command += ["--json", str(path), "--picture", str(picture)]
    assert benchmark.main(command) == 0
    values = json.loads(path.read_text())
    assert values["machine"]["platform"] == "cpu" and values["machine"]["copy_bandwidth"] > 0
    found = [(r["cell"]["measure"], r["status"]) for r in values["results"]]
    assert found == [("prefill", "ok"), ("decode", "ok"), ("decode", "does not fit")]
    for result in values["results"][:2]:
        assert result["cache_bytes"] == cache_bytes(Settings("nano").config("full"), 1, 128)
        assert result["program_bytes"] > result["cache_bytes"] and result["milliseconds"] > 0
    printed = capsys.readouterr().out
    assert "full decode context 128 batch 1000000000: does not fit (weights and cache" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(processes, "_start", lambda *_: pytest.fail("everything is there"))
    assert benchmark.main([*command, "--resume"]) == 0
    assert benchmark.main(["--from-json", str(path)]) == 0
    assert capsys.readouterr().out == 2 * printed
    assert benchmark.main([*command, "--resume", "--window", "32"]) == 2
    assert "has window=64, not 32" in capsys.readouterr().err
    assert benchmark.main([*command, "--resume", "--implementation", "xla"]) == 2
    assert "has implementation=None, not 'xla'" in capsys.readouterr().err


def test_results_of_another_device_are_not_mixed_in(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    device = MACHINE

    def run(settings, cells, cache, *, machine):
        yield device
        yield from (Result(cell, "ok", batch=1, milliseconds=1.0) for cell in cells)

    monkeypatch.setattr(benchmark, "run_cells", run)
    command = ["--architectures", "nha", "--measure", "prefill", "--json", str(path), "--resume"]
    assert benchmark.main([*command, "--contexts", "256"]) == 0
    before = path.read_text()
    device = dataclasses.replace(MACHINE, device="another card")
    assert benchmark.main([*command, "--contexts", "512"]) == 2
    assert f"has results of {MACHINE.device}, this is another card" in capsys.readouterr().err
    assert path.read_text() == before


def test_each_cell_keeps_the_run_that_measured_it(tmp_path, monkeypatch):
    # A file from before results had origins: its cells are of the run that it names.
    path = tmp_path / "out.json"
    first = json.loads(json.dumps(ok("nha", "prefill", 256, 1, 2.0).as_json()))
    del first["origin"]
    before = {
        "settings": dataclasses.asdict(Settings("nano")),
        "machine": dataclasses.asdict(MACHINE),
        "date": "a day",
        "command_line": ["the", "command"],
        "results": [first],
        "required": [],
    }
    path.write_text(json.dumps(before))
    bandwidth = 4e12

    def run(settings, cells, cache, *, machine):
        yield dataclasses.replace(MACHINE, copy_bandwidth=bandwidth, versions={"jax": "1"})
        yield from (Result(cell, "ok", batch=1, milliseconds=1.0) for cell in cells)

    monkeypatch.setattr(benchmark, "run_cells", run)
    command = ["--architectures", "nha", "--measure", "prefill", "--json", str(path), "--resume"]
    assert benchmark.main([*command, "--contexts", "256", "512"]) == 0
    bandwidth = 5e12
    assert benchmark.main([*command, "--contexts", "1024"]) == 0
    after = json.loads(path.read_text())
    old, *new = after.pop("results")
    assert old == first | {"origin": None}
    assert after == {name: value for name, value in before.items() if name != "results"}
    origins = [result["origin"] for result in new]
    assert [origin["copy_bandwidth"] for origin in origins] == [4e12, 5e12]
    assert [origin["command_line"][-1] for origin in origins] == ["512", "1024"]
    for origin in origins:
        assert origin["versions"] == {"jax": "1"}
        assert datetime.datetime.fromisoformat(origin["date"]).tzinfo is not None
    report = Report.read(path)
    expected = Origin("a day", ("the", "command"), MACHINE.copy_bandwidth, MACHINE.versions)
    assert report.origin(report.results[Cell("nha", "prefill", 256)]) == expected


@pytest.mark.parametrize("name", ["llama3_8b", "qwen2_5_7b"])
def test_committed_results_can_be_read(name):
    path = Path(__file__).parents[2] / "docs" / "benchmarks" / f"h100_{name}_inference.json"
    values, report = json.loads(path.read_text()), Report.read(path)
    required = values["required"]
    assert report.as_json()["required"] == required
    assert len(required) == len(LIMITS) + 1 and all(each["met"] for each in required)
    (line, *_) = table(report)
    assert f"copy bandwidth {report.machine.copy_bandwidth / 1e12:.3g} TB/s" in line


def test_json_is_written_after_every_cell(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    seen = []

    def run(settings, cells, cache, *, machine):
        if machine:
            yield MACHINE
        for cell in cells:
            seen.append((cell, len(json.loads(path.read_text())["results"])))
            rows = 3 if cell.batch == LARGEST else cell.batch
            yield Result(cell, "ok", batch=rows, milliseconds=1.0)

    monkeypatch.setattr(benchmark, "run_cells", run)
    command = ["--contexts", "256", "--architectures", "nha", "full", "--json", str(path)]
    assert benchmark.main(command) == 0
    assert [count for _, count in seen] == list(range(7))
    batches = [(c.architecture, c.batch) for c, _ in seen if c.measure == "decode"]
    # Full attention first; the others also at the batch that it reached.
    assert batches == [("full", 1), ("full", 0), ("nha", 1), ("nha", 0), ("nha", 3)]


def test_bad_command_lines(tmp_path, capsys):
    for bad, message in (
        (["--batches", "many"], "'many': expected a number, 'largest' or 'same'"),
        (["--contexts", "0"], "expected at least 1"),
        (["--resume"], "--resume: expected --json"),
        (["--picture", str(tmp_path / "none" / "a.png")], "a.png: no such folder"),
        (["--json", str(tmp_path / "none" / "a.json")], "a.json: no such folder"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(bad)
        assert message in capsys.readouterr().err
    path = tmp_path / "other.json"
    path.write_text("[]")
    assert benchmark.main(["--from-json", str(path)]) == 2
    assert "no results of this benchmark" in capsys.readouterr().err
    full_report(15.0, 400.0, 30.0).write(path)
    assert benchmark.main(["--from-json", str(path), "--picture", str(tmp_path / "a.odd")]) == 2
    assert "'odd' is not supported" in capsys.readouterr().err


# Report


def full_report(token: float, first: float, speed_ms: float, base_ms: float = 30.0) -> Report:
    context = LIMITS_CONTEXT
    results = [
        ok("full", "prefill", context, 1, 1000.0),
        ok("full", "decode", context, 1, 20.0),
        ok("full", "decode", context, LARGEST, base_ms, rows=3),
        ok("hybrid", "prefill", context, 1, first),
        ok("hybrid", "decode", context, 3, token),
        ok("hybrid", "decode", context, LARGEST, speed_ms, rows=24),
        Result(Cell("full", "decode", 2 * context), "does not fit", "too large", batch=1),
    ]
    return Report(Settings("llama3_8b"), MACHINE, {result.cell: result for result in results})


def test_limits():
    met = [
        value is not None and limit.holds(value)
        for limit, value in full_report(13.0, 400.0, 50.0).verdicts()
    ]
    assert met == [True] * 5
    worse = full_report(14.0, 501.0, 61.0, base_ms=60.0).verdicts()
    assert [limit.holds(value) for limit, value in worse] == [True, False, True, True, False]
    slow = full_report(14.0, 501.0, 61.0).verdicts()
    assert [limit.holds(value) for limit, value in slow] == [True, False, False, False, True]
    # 14.0 GiB of weights and three caches of 16 GiB at 3 TB/s.
    report = full_report(13.0, 400.0, 50.0)
    largest = Cell("full", "decode", LIMITS_CONTEXT, LARGEST)
    assert report.floor_ms(report.results[largest]) == pytest.approx(22.18, abs=0.01)
    # At the bandwidth of the run that measured it.
    origin = Origin("a day", ("a", "command"), 6e12, {"jax": "1"})
    report.results[largest] = dataclasses.replace(report.results[largest], origin=origin)
    assert report.floor_ms(report.results[largest]) == pytest.approx(11.09, abs=0.01)
    (*_, (_, fair)) = report.verdicts()
    assert fair == pytest.approx(11.09 / 30, abs=0.001)
    assert next(table(report)).endswith("copy bandwidth 3 to 6 TB/s, 75.0 GiB for programs")


def test_table_says_what_is_met_and_what_is_missing():
    text = "\n".join(table(full_report(14.0, 400.0, 50.0)))
    assert "llama3_8b on a device: copy bandwidth 3 TB/s, 75.0 GiB for programs" in text
    assert "first token <= 0.5: 0.4: met" in text
    assert "token at the same batch <= 0.45: 0.467: NOT MET" in text
    assert "tokens/s at each one's largest batch >= 4: 4.8: met" in text
    assert "full decode context 262144 batch 1: does not fit (too large)" in text
    report = full_report(14.0, 400.0, 50.0)
    del report.results[Cell("hybrid", "prefill", LIMITS_CONTEXT)]
    assert "first token <= 0.5: unknown" in "\n".join(table(report))
    again = Report.from_json(json.loads(json.dumps(report.as_json())))
    assert again == report and again.as_json()["required"][1]["met"] is None


def test_the_picture_tells_points_of_which_more_may_fit(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, *a, **k: drawn.append(self)
    )
    report = full_report(14.0, 400.0, 50.0)
    largest = Cell("hybrid", "decode", LIMITS_CONTEXT, LARGEST)
    for note, hollow in (("", []), (MORE_MAY_FIT, [LIMITS_CONTEXT])):
        report.results[largest] = dataclasses.replace(report.results[largest], note=note)
        draw(report, tmp_path / "picture.png")
        *_, speeds = drawn[-1].axes
        lines = [line for line in speeds.lines if line.get_markerfacecolor() == "white"]
        assert [x for line in lines for x in line.get_xdata()] == hollow


def test_importing_generation_does_not_import_the_benchmark():
    code = "import sys, nha_jax.inference; print([m for m in sys.modules if 'benchmark' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
