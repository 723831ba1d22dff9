"""`python -m nha_jax.generate`: what it writes, and its errors of one line."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from saved_runs import clock, run_model, save_run

from nha_jax import generate as generate_command
from nha_jax.compilation_cache import DEFAULT_COMPILATION_CACHE
from nha_jax.inference import (
    SamplingConfig,
    generate,
    generation,
    load_state,
    prefill,
    save_state,
)
from nha_jax.models.checkpoint_files import write_manifest
from nha_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def expected_text(prompt, count, windows=None, stop_strings=(), **sampling):
    ids = [256, *prompt.encode()]
    return generate(
        run_model(),
        [ids],
        max_tokens=count,
        stop_tokens=[257],
        tokenizer=Tokenizer.bytes(),
        sampling=SamplingConfig(**sampling),
        windows=windows,
        stop_strings=stop_strings,
    )


def test_the_continuation_streams_and_the_speed_follows(command):
    shown = command("--prompt", "def ", "--max-tokens", "20", "--temperature", "0")
    assert shown.out == expected_text("def ", 20, temperature=0.0).text[0] + "\n"
    assert "5 tokens read" in shown.err and "tokens/s" in shown.err


@pytest.mark.parametrize(
    ("count", "times", "line", "speed"),
    [
        # The prompt from second 10 to 11; then a block of 16, another, and 8 tokens.
        (
            "40",
            (10, 11, 13.5, 13.7, 14.0),
            "40 written: first block of 16 after 2.5 s (compiling included), then 48.0 tokens/s",
            {"first_block_tokens": 16, "first_block_seconds": 2.5, "tokens_per_second": 48.0},
        ),
        (
            "7",
            (10, 11, 13.5),
            "7 written: first block of 7 after 2.5 s (compiling included)",
            {"first_block_tokens": 7, "first_block_seconds": 2.5, "tokens_per_second": None},
        ),
        (
            "0",
            (10, 11),
            "0 written",
            {"first_block_tokens": None, "first_block_seconds": None, "tokens_per_second": None},
        ),
    ],
)
def test_the_speed_is_that_of_blocks_that_wait_for_no_compilation(
    command, monkeypatch, count, times, line, speed
):
    options = ("--prompt", "def ", "--max-tokens", count, "--temperature", "0")
    monkeypatch.setattr(generate_command, "time", clock(*times))
    assert command(*options).err == f"5 tokens read in 1.0 s; {line}\n"
    monkeypatch.setattr(generate_command, "time", clock(*times))
    summary = json.loads(command(*options, "--json").out.splitlines()[-1])
    assert summary["prompt_seconds"] == 1.0
    assert summary | speed | {"tokens": int(count)} == summary


def test_the_speed_counts_the_tokens_of_all_rows(command, monkeypatch, tmp_path):
    model = run_model()
    save_state(tmp_path / "state", prefill(model, [[256], [256, 65]], max_length=64), model)
    monkeypatch.setattr(generate_command, "time", clock(0, 0, 2, 4))
    options = ("--load-state", str(tmp_path / "state"), "--max-tokens", "20", "--temperature", "0")
    summary = json.loads(command(*options, "--json").out.splitlines()[-1])
    assert (summary["tokens"], summary["first_block_tokens"]) == (40, 32)
    assert summary["tokens_per_second"] == 4.0


def test_compiled_programs_are_kept_for_the_next_time(run, tmp_path):
    command = [sys.executable, "-m", "nha_jax.generate", "--checkpoint", str(run)]
    command += ["--prompt", "def ", "--max-tokens", "1"]
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert list(tmp_path.glob(".cache/nha_jax/compilation/jit_*"))


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ((), {}, str(Path(DEFAULT_COMPILATION_CACHE).expanduser())),
        ((), {"JAX_COMPILATION_CACHE_DIR": "told"}, "told"),
        (("--compilation-cache", "given"), {"JAX_COMPILATION_CACHE_DIR": "told"}, "given"),
        (("--compilation-cache", ""), {}, None),
    ],
)
def test_the_folder_of_compiled_programs(monkeypatch, options, environment, expected):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told = {}
    monkeypatch.setattr("jax.config.update", told.__setitem__)
    command = ["--checkpoint", "nowhere", "--prompt", "a", *options]
    assert generate_command.main(command) == 2
    assert told["jax_compilation_cache_dir"] == expected


def test_prompts_come_from_files_and_standard_input(command, tmp_path, monkeypatch):
    options = ("--max-tokens", "20", "--top-k", "40", "--seed", "3")
    expected = expected_text("def ", 20, top_k=40, seed=3).text[0] + "\n"
    (tmp_path / "prompt").write_text("def ")
    assert command("--file", str(tmp_path / "prompt"), *options).out == expected
    monkeypatch.setattr("sys.stdin", standard_input(b"def "))
    assert command("--prompt", "-", *options).out == expected


def standard_input(content):
    return io.TextIOWrapper(io.BytesIO(content), encoding="latin-1")


def test_texts_are_read_as_they_are(command, tmp_path, monkeypatch):
    text = "a\r\nb\rc\n é"
    expected = expected_text(text, 8, temperature=0.0).text[0] + "\n"
    (tmp_path / "prompt").write_bytes(text.encode())
    for source in (("--file", str(tmp_path / "prompt")), ("--prompt", "-")):
        monkeypatch.setattr("sys.stdin", standard_input(text.encode()))
        shown = command(*source, "--max-tokens", "8", "--temperature", "0")
        assert shown.out == expected
        assert f"{1 + len(text.encode())} tokens read" in shown.err


def test_texts_that_are_not_utf8_are_one_line(command, tmp_path, monkeypatch):
    (tmp_path / "prompt").write_bytes(b"a\xff")
    for source in (("--file", str(tmp_path / "prompt")), ("--prompt", "-")):
        monkeypatch.setattr("sys.stdin", standard_input(b"a\xff"))
        shown = command(*source, status=2)
        assert f"{' '.join(source)}: not UTF-8 (" in shown.err and shown.err.count("\n") == 1
    monkeypatch.setattr("sys.stdin", None)
    for source in (("--prompt", "-"), ("--interactive",)):
        assert "standard input is closed" in command(*source, status=2).err


@pytest.mark.parametrize("text", ["# a comment", "null", "~", "[1]", "-foo"])
def test_prompts_are_texts_whatever_they_look_like(command, text, tmp_path):
    options = ("--max-tokens", "4", "--temperature", "0")
    shown = command(f"--prompt={text}", *options)
    assert shown.out == expected_text(text, 4, temperature=0.0).text[0] + "\n"
    if text.startswith("#"):
        saved = str(tmp_path / "state")
        command("--prompt", "x = 1 ", "--max-tokens", "0", "--save-state", saved)
        shown = command("--load-state", saved, "--prompt", text, *options)
        assert shown.out == expected_text("x = 1 " + text, 4, temperature=0.0).text[0] + "\n"


def test_a_saved_state_has_room_to_go_on(command, tmp_path):
    saved, windows = str(tmp_path / "state"), ("--windows", "full,16")
    command("--prompt", "def ", "--max-tokens", "0", "--save-state", saved, *windows)
    options = ("--max-tokens", "100", "--temperature", "0")
    shown = command("--load-state", saved, *windows, *options)
    assert shown.out == expected_text("def ", 100, ("full", 16), temperature=0.0).text[0] + "\n"


def test_json_has_a_line_per_block_and_a_summary(command):
    shown = command("--prompt", "def ", "--max-tokens", "20", "--temperature", "0", "--json")
    *blocks, summary = map(json.loads, shown.out.splitlines())
    expected = expected_text("def ", 20, temperature=0.0)
    assert [len(block["tokens"]) for block in blocks] == [16, 4]
    assert [token for block in blocks for token in block["tokens"]] == expected.tokens[0]
    assert "".join(block["text"] for block in blocks) == expected.text[0]
    log_probs = [value for block in blocks for value in block["log_probs"]]
    np.testing.assert_allclose(log_probs, expected.log_probs[0], rtol=0, atol=1e-4)
    assert summary["finish_reasons"] == ["length"]
    assert (summary["prompt_tokens"], summary["tokens"]) == (5, 20)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--seed", "3"), {"seed": 3}),
        (("--temperature", "0.5"), {"temperature": 0.5}),
        (("--top-k", "2"), {"top_k": 2}),
        (("--top-p", ".3"), {"top_p": 0.3}),
        (("--min-p", ".5"), {"min_p": 0.5}),
        (("--repetition-penalty", "1.5"), {"repetition_penalty": 1.5}),
        (("--stop", "nowhere", "IK"), {"stop_strings": ["nowhere", "IK"]}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_options_change_the_text(command, options, expected):
    text = expected_text("def ", 20, **expected).text[0]
    assert text != expected_text("def ", 20).text[0]
    assert command("--prompt", "def ", "--max-tokens", "20", *options).out == text + "\n"


def test_the_length_of_blocks_is_that_of_the_lines(command):
    shown = command("--prompt", "def ", "--max-tokens", "12", "--block", "5", "--json")
    *blocks, _ = map(json.loads, shown.out.splitlines())
    assert [len(block["tokens"]) for block in blocks] == [5, 5, 2]


def test_prompts_are_read_in_pieces(command, monkeypatch):
    read, lengths = generation.read_piece, []

    def watch(*arguments):
        lengths.append(arguments[4].shape[1])
        return read(*arguments)

    monkeypatch.setattr(generation, "read_piece", watch)
    for options, expected in (((), [32]), (("--piece", "16"), [16, 16])):
        lengths.clear()
        command("--prompt", "x" * 20, "--max-tokens", "0", *options)
        assert lengths == expected


def test_windows_are_changed_when_the_model_is_loaded(command):
    options = ("--max-tokens", "20", "--temperature", "0")
    shown = command("--prompt", "def main", *options, "--windows", "full,0x1")
    expected = expected_text("def main", 20, ("full", 0), temperature=0.0)
    assert shown.out == expected.text[0] + "\n"


def test_a_state_is_saved_and_continued(command, tmp_path):
    greedy = ("--temperature", "0")
    path = str(tmp_path / "state")
    room = ("--max-length", "64", "--save-state", path)
    first = command("--prompt", "def ", "--max-tokens", "12", *greedy, *room, "--json")
    rest = command("--load-state", path, "--max-tokens", "8", *greedy, "--json")
    tokens = [
        token
        for line in (first.out + rest.out).splitlines()
        if isinstance(record := json.loads(line), dict) and "text" in record
        for token in record["tokens"]
    ]
    assert tokens == expected_text("def ", 20, temperature=0.0).tokens[0]
    shown = command("--load-state", path, "--max-tokens", "60", status=2)
    assert "max_length=64 is too short" in shown.err
    shown = command("--load-state", path, "--windows", "4", status=2)
    assert "a state for the windows 16,full; this model has 4,4" in shown.err


def test_a_state_saved_at_the_end_of_a_text_begins_another(command, monkeypatch, tmp_path):
    stop = expected_text("def ", 3, temperature=0.0).tokens[0][2]
    load = generate_command.load

    def with_another_end(*arguments, **options):
        loaded = load(*arguments, **options)
        loaded.tokenizer.eos_id = stop
        return loaded

    monkeypatch.setattr(generate_command, "load", with_another_end)
    options = ("--max-tokens", "12", "--temperature", "0", "--json")
    for name, length in (("ended", 1 + 4 + 3 + 1), ("cut", 1 + 4 + 2)):
        path = str(tmp_path / name)
        count = ("--max-tokens", "2") if name == "cut" else ()
        command("--prompt", "def ", "--save-state", path, *options, *count)
        assert load_state(path, run_model()).position.tolist() == [length]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--prompt, --file or --load-state"),
        (("--prompt", "a", "--file", "b"), "--prompt and --file"),
        (("--file", "/nowhere"), "--file /nowhere: No such file or directory"),
        (("--file", "/"), "--file /: Is a directory"),
        (
            ("--prompt", "-foo"),
            "--prompt: expected one argument. What begins with '-' is written --prompt=-foo",
        ),
        (
            ("--prompt", "a", "--stop", "-foo"),
            "--stop: expected at least one argument. What begins with '-' is written --stop=-foo",
        ),
        (("--prompt", "a", "--windows", "x"), "windows has the entry 'x'"),
        (("--prompt", "a", "--windows", "1,2,3"), "model.windows has 3 entries"),
        (("--prompt", "a", "--top-p", "2"), "sampling.top_p=2.0"),
        (("--prompt", "a", "--top-k", "many"), "top"),
        (("--prompt", "a", "--unknown", "1"), "unknown"),
        (("--prompt", "a" * 99, "--max-length", "64"), "max_length=64 is too short"),
        (("--load-state", "/nowhere"), "/nowhere: no such file"),
        (("--prompt", "a\udcff"), "the text is not valid Unicode"),
        (("--prompt", "a", "--stop", "\udcff"), "stop_strings has '\\udcff': not valid Unicode"),
        (
            ("--prompt", "a", "--save-state", "/nowhere/state"),
            "--save-state /nowhere/state: no",
        ),
    ],
)
def test_errors_are_one_line(command, arguments, message):
    shown = command(*arguments, status=2)
    assert message in shown.err and shown.out == ""
    assert shown.err.startswith("nha_jax.generate: ") and shown.err.count("\n") == 1


def test_bad_checkpoints_and_tokenizers_are_one_line(command, run, tmp_path):
    shown = command("--prompt", "a", status=2, checkpoint=tmp_path / "nowhere")
    assert "neither a checkpoint nor a run" in shown.err
    damaged = tmp_path / "damaged"
    shutil.copytree(run / "checkpoints" / "7", damaged)
    (damaged / "manifest.json").write_text("{}")
    shown = command("--prompt", "a", status=2, checkpoint=damaged)
    assert "is damaged: manifest.json" in shown.err and shown.err.count("\n") == 1
    unknown = save_run(tmp_path / "unknown", json.dumps({"model": {"type": "Unheard"}}))
    shown = command("--prompt", "a", status=2, checkpoint=unknown)
    assert "tokenizer" in shown.err and "give another one" in shown.err
    assert shown.err.count("\n") == 1


def test_damaged_checkpoints_of_a_run_are_a_line_each(command, run, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints" / "7", checkpoints / "8")
    (checkpoints / "8" / "manifest.json").write_text("{}")
    damage = f"nha_jax.generate: checkpoint {checkpoints / '8'} is damaged: manifest.json "
    damage += "is truncated or has changed bytes"
    options = ("--prompt", "def ", "--max-tokens", "20", "--temperature", "0")
    shown = command(*options, status=2, checkpoint=tmp_path)
    assert (shown.out, shown.err) == ("", f"{damage}\n")
    shutil.copytree(run / "checkpoints" / "7", checkpoints / "7")
    shown = command(*options, checkpoint=tmp_path)
    assert shown.out == expected_text("def ", 20, temperature=0.0).text[0] + "\n"
    warning, speed = shown.err.splitlines()
    assert warning == f"{damage}; trying the one before" and "tokens read" in speed


def test_configurations_of_no_model_are_one_line(command, run, tmp_path):
    for change in ({}, {"model": {"vocab_size": 258, "runes": 3}}, {"model": 3}):
        checkpoint = tmp_path / str(len(str(change))) / "7"
        shutil.copytree(run / "checkpoints" / "7", checkpoint)
        files = [path for path in (checkpoint / "config").rglob("*") if path.is_file()]
        (path,) = (path for path in files if "vocab_size" in path.read_text())
        path.write_text(json.dumps(change))
        write_manifest(checkpoint)
        shown = command("--prompt", "a", status=2, checkpoint=checkpoint)
        assert "its configuration is none of a model" in shown.err
        assert shown.err.count("\n") == 1


def test_ctrl_c_ends_it_without_a_traceback(command, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("nha_jax.generate.load", interrupted)
    shown = command("--prompt", "a", status=130)
    assert shown.err == "\n"


def test_a_reader_that_went_away_is_no_traceback(command, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        shown = command("--prompt", "def ", "--max-tokens", "20", "--temperature", "0", status=1)
        out.write("into nothing")
    assert shown.err == ""


def without_tokenizer(run, directory):
    checkpoint = directory / "7"
    shutil.copytree(run / "checkpoints" / "7", checkpoint)
    shutil.rmtree(checkpoint / "tokenizer")
    write_manifest(checkpoint)
    return checkpoint


def test_another_tokenizer_serves_a_checkpoint_without_one(command, run, tmp_path):
    checkpoint = without_tokenizer(run, tmp_path)
    options = ("--prompt", "def ", "--max-tokens", "20", "--temperature", "0")
    shown = command(*options, status=2, checkpoint=checkpoint)
    assert "it has no tokenizer; give another one" in shown.err and shown.err.count("\n") == 1
    (tmp_path / "tokenizer.json").write_text(Tokenizer.bytes().to_json())
    expected = expected_text("def ", 20, temperature=0.0).text[0] + "\n"
    for name in ("bytes", str(tmp_path), str(tmp_path / "tokenizer.json")):
        shown = command(*options, "--tokenizer", name, checkpoint=checkpoint)
        assert shown.out == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"version": "1.0"}', "the JSON has no 'model'"),
        ('{"format": "nha-tokenizer-1", "kind": "runes"}', "of an unknown kind, 'runes'"),
        ('{"format": "nha-tokenizer-1", "kind": "tokenizers"}', "of an unknown kind, 'tokenizers'"),
        (Tokenizer.train_bpe(["a cat and a hat and"], 262), "it has 262 ids, the model has 258"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tokenizer_that_does_not_serve_is_one_line(command, tmp_path, content, message):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else content.to_json())
    shown = command("--prompt", "a", "--tokenizer", str(path), status=2)
    assert message in shown.err and "other.json" in shown.err
    assert shown.err.count("\n") == 1 and shown.out == ""
