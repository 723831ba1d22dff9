"""The tokenizer: round trips, document boundaries, bytes per token."""

import json
import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from nha_jax.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "",
    "plain",
    "tabs\tand\r\nline ends\n",
    "naïve — 日本語 🙂\u0000",
    "<|bos|> <s> is text",
    "  two  spaces ",
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe(["the cat sat on the mat. " * 20, "naïve 日本語 " * 20], 275)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab += ["\u2581", "a", "b", "\u2581a", "\u2581ab", "é"]
    model = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocab)},
            [("\u2581", "a"), ("\u2581a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Tokenizer.from_json(model.to_str())


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_bytes(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer.bytes() if kind == "bytes" else request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes(ids) == len(text.encode("utf-8"))
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    (document,) = tokenizer.encode_documents([text])
    assert document.tolist() == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert tokenizer.decode(document) == text
    assert tokenizer.token_bytes(document) == len(text.encode("utf-8"))


def test_bytes_are_their_own_ids() -> None:
    tokenizer = Tokenizer.bytes()
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258)
    assert tokenizer.decode([0xC3]) == "\ufffd"
    np.testing.assert_array_equal(tokenizer.byte_lengths(), [1] * 256 + [0, 0])


def test_bpe_merges_and_fits_its_size(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 275
    assert len(bpe.encode("the cat sat")) < len("the cat sat") / 2
    assert max(bpe.encode("the cat sat")) < 275


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
def test_json_and_pickle_restore_it(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer.bytes() if kind == "bytes" else request.getfixturevalue(kind)
    for restored in (
        Tokenizer.from_json(tokenizer.to_json()),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert restored == tokenizer
        assert restored.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
        assert (restored.bos_id, restored.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer != Tokenizer.train_bpe(["other"], 258)


def test_training_bpe_is_deterministic() -> None:
    texts = ["some words and some more words " * 10]
    assert Tokenizer.train_bpe(texts, 280).to_json() == Tokenizer.train_bpe(texts, 280).to_json()


def test_library_file_with_one_boundary_token(tmp_path) -> None:
    model = tokenizers.Tokenizer(models.BPE({"a": 0, "<|endoftext|>": 1}, []))
    model.decoder = decoders.ByteLevel()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == tokenizer.eos_id == 1
    tokenizer = load_tokenizer(tmp_path, bos_token="a")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_wide_vocabularies_need_wide_ids() -> None:
    vocab = {f"t{i}": i for i in range(70_000)} | {"<s>": 70_000, "</s>": 70_001}
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="t0")))
    assert tokenizer.dtype == np.uint32
    assert tokenizer.encode_documents(["t69999"])[0].tolist() == [70_000, 69_999, 70_001]


def test_errors_say_what_would_be_right(tmp_path) -> None:
    with pytest.raises(ValueError, match="at least 258"):
        Tokenizer.train_bpe(["x"], 100)
    with pytest.raises(ValueError, match="not JSON"):
        Tokenizer.from_json("{")
    with pytest.raises(ValueError, match="no 'model'"):
        Tokenizer.from_json(json.dumps({"vocab": 3}))
    with pytest.raises(ValueError, match=r"cannot read .*absent"):
        load_tokenizer(tmp_path / "absent.json")
    model = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(ValueError, match="--bos_token"):
        Tokenizer(model)
    with pytest.raises(ValueError, match="'nope' is not in its vocabulary"):
        Tokenizer(model, bos_token="a", eos_token="nope")
    with pytest.raises(ValueError, match="decodes with nothing"):
        Tokenizer(model, bos_token="a", eos_token="a").byte_lengths()
