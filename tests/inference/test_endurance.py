"""Memory stays as it is, however many tokens are generated."""

import pytest
from flax import nnx
from small_models import WINDOWS, Letters, make_model

from nha_jax.inference import endurance
from nha_jax.inference.endurance import HEADER, PARTS, Part, describe, endure
from nha_jax.models import LanguageModel, preset
from nha_jax.tokenizer import Tokenizer

MEBIBYTE = 2**20


def check_memory(model, tokens, tokenizer=None):
    print(f"\n{HEADER}")
    parts = []
    for part in endure(model, tokens, tokenizer=tokenizer):
        print(describe(part))
        parts.append(part)
    assert [part.tokens * PARTS // tokens for part in parts] == [*range(1, PARTS + 1)]
    # Not a byte of arrays more; the process keeps what its allocator wants, but does not grow.
    assert len({part.live_bytes for part in parts}) == 1
    assert parts[-1].resident_bytes - parts[0].resident_bytes < 16 * MEBIBYTE


@pytest.mark.wide
def test_memory_is_flat_over_100_000_tokens():
    model = LanguageModel(preset("nano"), rngs=nnx.Rngs(0))
    check_memory(model, 100_000, Tokenizer.bytes())


def test_memory_is_flat():
    tokenizer = Letters()
    tokenizer.bos_id = 0
    check_memory(make_model(WINDOWS["16"]), 320, tokenizer)


def test_the_command_prints_a_line_per_tenth(capsys, monkeypatch):
    parts = [Part(400 * part, part * MEBIBYTE, 123_456, 1e-3) for part in range(1, 3)]
    monkeypatch.setattr(endurance, "endure", lambda *arguments, **options: iter(parts))
    endurance.main(["--tokens", "4000", "--windows", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("windows 4,4,4,4")
    assert [line.split() for line in lines[2:]] == [
        ["400", "1.0", "123,456", "1.000"],
        ["800", "2.0", "123,456", "1.000"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "100"), "tokens=100: expected at least 10 blocks of 16"),
        (("--windows", "x"), "windows has the entry 'x'"),
        (("--checkpoint", "/nowhere"), "/nowhere"),
    ],
)
def test_bad_options_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        endurance.main(list(arguments))
    assert message in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(tmp_path, capsys):
    (tmp_path / "7").mkdir()
    with pytest.raises(SystemExit):
        endurance.main(["--checkpoint", str(tmp_path / "7")])
    assert "checkpoint" in capsys.readouterr().err
