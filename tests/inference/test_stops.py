"""Stop tokens and stop strings: what is emitted, and the state that is left."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from saved_runs import run_model
from small_models import WINDOWS, Letters, assert_same_state, make_model, prompts

from nha_jax.inference import (
    SamplingConfig,
    TokenStream,
    generate,
    load_state,
    prefill,
    save_state,
)
from nha_jax.inference.text import TextDecoder, prompt_ids
from nha_jax.tokenizer import Tokenizer

SAMPLING = SamplingConfig(seed=1)


@pytest.fixture(scope="module")
def model():
    return make_model(WINDOWS["mixed"])


def run(model, rows, count, **options):
    return generate(model, rows, max_tokens=count, sampling=SAMPLING, max_length=64, **options)


def test_a_stop_token_freezes_its_row_alone(model):
    rows = prompts(5, 8)
    free = run(model, rows, 40)
    (place,) = [i for i in range(5, 15) if free.tokens[0][i] not in free.tokens[0][:i]][:1]
    stop = free.tokens[0][place]
    expected = [tokens[: (*tokens, stop).index(stop) + 1] for tokens in free.tokens]
    stopped = run(model, rows, 40, stop_tokens=[stop])
    assert stopped.tokens == expected
    assert stopped.finish_reasons[0] == "stop_token"
    for row, tokens in enumerate(expected):
        assert len(stopped.log_probs[row]) == len(tokens)
        np.testing.assert_array_equal(stopped.log_probs[row], free.log_probs[row][: len(tokens)])
    # The state of the first row is the one after its stop token.
    short = run(model, rows, len(expected[0]))
    np.testing.assert_array_equal(stopped.state.logits[0], short.state.logits[0])
    assert stopped.state.position[0] == 5 + len(expected[0])


def test_the_state_after_a_stop_string_is_the_one_after_its_last_token(model):
    rows = prompts(5, 8)
    free = run(model, rows, 40, tokenizer=Letters())
    stop = Letters().decode(free.tokens[0][20:23])  # inside the second block of 16
    place = free.text[0].index(stop)
    emitted = place + 3
    assert stop not in free.text[1] and emitted % 16
    stopped = run(model, rows, 40, tokenizer=Letters(), stop_strings=[stop, "no such text"])
    assert stopped.finish_reasons == ["stop_string", "length"]
    assert stopped.tokens == [free.tokens[0][:emitted], free.tokens[1]]
    assert stopped.text == [free.text[0][:place], free.text[1]]
    short = run(model, rows, emitted)
    whole = run(model, rows, 40)
    for found, first, second in zip(
        map(np.asarray, (stopped.state.logits, stopped.state.counts, stopped.state.position)),
        map(np.asarray, (short.state.logits, short.state.counts, short.state.position)),
        map(np.asarray, (whole.state.logits, whole.state.counts, whole.state.position)),
        strict=True,
    ):
        np.testing.assert_array_equal(found[0], first[0])
        np.testing.assert_array_equal(found[1], second[1])
    # And it goes on from there as the text did that nobody stopped.
    rest = generate(model, state=stopped.state, max_tokens=6, sampling=SamplingConfig())
    assert rest.tokens[0] == free.tokens[0][emitted : emitted + 6]


def test_a_stop_string_at_the_end_of_a_block_needs_no_replay(model):
    (prompt,) = prompts(5)
    free = run(model, [prompt], 16)
    stop = Letters().decode(free.tokens[0][-4:])
    stopped = run(model, [prompt], 40, tokenizer=Letters(), stop_strings=[stop])
    assert stopped.tokens == free.tokens
    assert_same_state(stopped.state, free.state)


def test_what_may_begin_a_stop_string_is_not_streamed(model):
    (prompt,) = prompts(5)
    free = run(model, [prompt], 40, tokenizer=Letters())
    stop = free.text[0][14:19]  # across the first and the second block
    stream = TokenStream(
        model,
        [prompt],
        max_tokens=40,
        sampling=SAMPLING,
        max_length=64,
        tokenizer=Letters(),
        stop_strings=[stop],
    )
    texts = [new.text[0] for new in stream]
    assert texts[0] == free.text[0][:14]
    assert "".join(texts) == free.text[0][:14]


def pushed(decoder, tokens):
    pieces = []
    for token in tokens:
        decoder.push(token)
        pieces.append(decoder.release())
    return [*pieces, decoder.finish()]


def test_text_comes_in_whole_characters():
    tokenizer = Tokenizer.bytes()
    pieces = pushed(TextDecoder(tokenizer), [*"aé€😀b".encode(), 0xC3])
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", "", "\ufffd"]
    assert pushed(TextDecoder(tokenizer), [0xC3, 0x41]) == ["", "\ufffdA", ""]


def test_text_of_tokens_is_the_text_of_the_whole():
    text = "a naïve test of the decoder, 😀 with words and words and words" * 3
    tokenizer = Tokenizer.train_bpe([text], 280)
    ids = tokenizer.encode(text)
    for cut in (0, 5, 40):
        pieces = pushed(TextDecoder(tokenizer, ids[:cut]), ids[cut:])
        assert tokenizer.decode(ids[:cut]) + "".join(pieces) == text


def test_the_earliest_of_the_stop_strings_ends_the_text():
    decoder = TextDecoder(Tokenizer.bytes(), (), ["wxyz", "xy", "y"])
    assert pushed(decoder, b"abwx") == ["a", "b", "", "", "wx"]
    decoder = TextDecoder(Tokenizer.bytes(), (), ["wxyz", "xy", "q"])
    pieces = []
    for token in b"abwxy":
        stopped = decoder.push(token)
        pieces.append(decoder.release())
    assert stopped
    assert pieces == ["a", "b", "", "", "w"]


def test_a_stop_string_is_found_in_front_of_half_a_character():
    # One id for "x" and the first byte of "é".
    byte_level = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: i for i, letter in enumerate([*sorted(byte_level), "xÃ", "<s>", "</s>"])}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("x", "Ã")]))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = Tokenizer(words)
    ids = tokenizer.encode("axé")
    assert len(ids) == 3
    decoder = TextDecoder(tokenizer, (), ["ax"])
    assert [decoder.push(token) for token in ids[:2]] == [False, True]
    assert pushed(TextDecoder(tokenizer), ids) == ["a", "x", "é", ""]


def test_bytes_that_are_no_text_are_not_waited_for():
    decoder = TextDecoder(Tokenizer.bytes())
    pieces = pushed(decoder, [0x80] * 100)
    assert "".join(pieces) == "\ufffd" * 100
    assert len("".join(pieces[:50])) > 40
    assert sum(map(len, (*decoder._groups, decoder._pending))) < 40


def test_what_a_decoder_keeps_does_not_grow():
    decoder = TextDecoder(Tokenizer.bytes(), (), ["stop here"])
    pieces = pushed(decoder, b"a text of some length, and so on" * 100)
    assert "".join(pieces) == "a text of some length, and so on" * 100
    kept = [value for value in vars(decoder).values() if isinstance(value, list | str)]
    assert max(map(len, kept)) < 40


def test_long_stop_strings_are_held_back_and_found():
    stop = "ab" * 5_000 + "c"
    decoder = TextDecoder(Tokenizer.bytes(), (), [stop])
    pieces = pushed(decoder, ("x" + "ab" + stop).encode())
    assert decoder.stopped and "".join(pieces) == "xab"


def test_a_character_that_the_prompt_began_is_text():
    first, *rest = "é".encode()
    assert pushed(TextDecoder(Tokenizer.bytes(), [65, first]), rest) == ["é", ""]
    # But it is the prompt's where it stays incomplete, or was a U+FFFD.
    assert pushed(TextDecoder(Tokenizer.bytes(), [65, first]), b"") == [""]
    assert pushed(TextDecoder(Tokenizer.bytes(), [65, first]), b"b") == ["b", ""]
    assert pushed(TextDecoder(Tokenizer.bytes(), "\ufffd".encode()), b"b") == ["b", ""]


def bytes_of_unknown_characters() -> Tokenizer:
    """Characters outside of the vocabulary are bytes, a run of which is text as a whole or not."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 259, "a": 260, "▁a": 261}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = [("▁", "a")]
    words = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    words.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Tokenizer(words)


@pytest.mark.parametrize("tokenizer", [Tokenizer.bytes(), bytes_of_unknown_characters()])
def test_characters_in_a_row_that_are_bytes_are_text(tokenizer):
    text = "a 😀é日本 a😀" * 4
    ids = tokenizer.encode(text)
    starts = [len(tokenizer.encode(text[:count])) for count in range(len(text))]
    for cut in range(len(ids)):
        pieces = pushed(TextDecoder(tokenizer, ids[:cut]), ids[cut:])
        # A character that the prompt began comes with the first piece.
        begun = max((count for count, start in enumerate(starts) if start <= cut), default=0)
        assert "".join(pieces).lstrip() == text[begun:].lstrip()
        assert all("\ufffd" not in piece for piece in pieces)


def words_with_spaces() -> Tokenizer:
    vocabulary = {"<s>": 0, "</s>": 1, ".": 2} | {f"▁w{i}": i for i in range(3, 61)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="."))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    words.decoder = tokenizers.decoders.Metaspace()
    return Tokenizer(words)


def test_a_text_that_goes_on_keeps_its_first_space(model):
    tokenizer = words_with_spaces()
    (prompt,) = prompts(5)
    first = run(model, [prompt], 16, tokenizer=tokenizer)
    whole = run(model, [prompt], 32, tokenizer=tokenizer)
    rest = generate(model, state=first.state, max_tokens=16, sampling=SAMPLING, tokenizer=tokenizer)
    assert " w" in whole.text[0]
    assert first.text[0] + rest.text[0] == whole.text[0]


def test_a_text_that_goes_on_within_a_character_completes_it(tmp_path):
    model, tokenizer = run_model(), Tokenizer.bytes()
    first, second = "é".encode()
    save_state(tmp_path / "state", prefill(model, [[256, 65, first], [256, 65]]), model)
    state = load_state(tmp_path / "state", model)
    found = {}
    for token in (second, first):  # whatever the model would write
        logits = jnp.zeros_like(state.logits).at[:, token].set(9)
        found[token] = generate(
            model,
            state=dataclasses.replace(state, logits=logits),
            max_tokens=1,
            sampling=SamplingConfig(temperature=0.0),
            tokenizer=tokenizer,
        )
    assert found[second].text == ["é", "\ufffd"]
    assert found[first].text[1] == "\ufffd"
    # Tokens that were written count as well as those that were read.
    state = dataclasses.replace(found[first].state, logits=logits.at[:, second].set(99))
    more = generate(model, state=state, max_tokens=1, tokenizer=tokenizer)
    assert more.text == ["é", "é"]


def test_an_interrupted_block_comes_with_the_next_call(model, monkeypatch):
    (prompt,) = prompts(5)
    expected = run(model, [prompt], 40)
    stream = TokenStream(model, [prompt], max_tokens=40, sampling=SAMPLING, max_length=64)
    tokens = next(stream).tokens[0]

    def interrupted(arrays):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(jax, "device_get", interrupted)
    before = stream.state
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert before.logits.is_deleted()
    for new in stream:
        tokens += new.tokens[0]
    assert tokens == expected.tokens[0]
    assert_same_state(stream.state, expected.state)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(model, poison, temperature):
    state = prefill(model, prompts(5, 8), max_length=64)
    logits = state.logits.at[1, 7].set(poison)
    broken = dataclasses.replace(state, logits=logits)
    sampling = SamplingConfig(temperature=temperature, seed=1)
    with pytest.raises(FloatingPointError, match=r"row 1: .*logits.* not finite at new token 1"):
        generate(model, state=broken, max_tokens=8, sampling=sampling)


def test_spaces_at_the_end_of_a_prompt_are_left_to_a_tokenizer_with_words():
    words = Tokenizer.train_bpe(["The quick brown fox"], 270)
    assert prompt_ids(words, "The  ") == words.encode("The")
    assert prompt_ids(Tokenizer.bytes(), "The ") == list(b"The ")
