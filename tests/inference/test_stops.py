"""Stop tokens and stop strings: what is emitted, and the state that is left."""

import numpy as np
import pytest
from small_models import WINDOWS, Letters, assert_same_state, make_model, prompts

from nha_jax.inference import SamplingConfig, TokenStream, generate
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
    assert stopped and decoder.text == "abw"
    assert pieces == ["a", "b", "", "", "w"]


def test_spaces_at_the_end_of_a_prompt_are_left_to_a_tokenizer_with_words():
    words = Tokenizer.train_bpe(["The quick brown fox"], 270)
    assert prompt_ids(words, "The  ") == words.encode("The")
    assert prompt_ids(Tokenizer.bytes(), "The ") == list(b"The ")
