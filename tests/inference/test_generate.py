"""Generation equals what full passes over the text say, in pieces, in batches, up to stops."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small_models import WINDOWS, assert_same_state, full_logits, make_model, prompts

from nha_jax.inference import SamplingConfig, TokenStream, generate, generation, prefill, save_state

GREEDY = SamplingConfig(temperature=0.0)
# One room, and pieces of one length: tests share their compiled programs, within this file and with
# the other files.
SHARED = dict(max_length=64, piece=16)
TOLERANCE = dict(rtol=2e-5, atol=2e-5)


def check_greedy(windows, count, **options):
    model = make_model(WINDOWS[windows])
    (prompt,) = prompts(21)
    found = generate(model, [prompt], max_tokens=count, sampling=GREEDY, **options)
    (tokens,) = found.tokens
    assert len(tokens) == count
    logits = full_logits(model, prompt + tokens, -(-(21 + count) // 64) * 64)
    np.testing.assert_array_equal(tokens, logits[20:-1].argmax(-1))
    assert len(set(tokens)) > 3  # not a fixed point that anything would reach
    np.testing.assert_allclose(found.state.logits[0], logits[-1], **TOLERANCE)
    log_probs = jax.nn.log_softmax(logits[20:-1])
    expected = log_probs[np.arange(count), np.asarray(tokens)]
    np.testing.assert_allclose(found.log_probs[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("windows", WINDOWS)
def test_greedy_tokens_are_those_of_full_passes(windows):
    check_greedy(windows, 43, **SHARED)


@pytest.mark.wide
@pytest.mark.parametrize("windows", WINDOWS)
def test_256_greedy_tokens_are_those_of_full_passes(windows):
    check_greedy(windows, 256)


def test_prompts_in_pieces_are_read_as_whole_and_token_by_token():
    model = make_model(WINDOWS["mixed"])
    rows = prompts(33, 9)
    whole = prefill(model, rows, piece=64, max_length=64)
    for piece in (1, 16):
        pieces = prefill(model, rows, piece=piece, max_length=64)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), pieces, whole)
    # The same in two calls, of which the second has nothing for the second row.
    first = prefill(model, [rows[0][:20], rows[1]], **SHARED)
    second = prefill(model, [rows[0][20:], []], piece=16, state=first)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), second, whole)
    assert np.asarray(first.position).tolist() == [20, 9]  # what was continued is still there


def test_a_state_keeps_the_last_tokens_of_each_row():
    model = make_model(WINDOWS["mixed"])
    rows = prompts(20, 3)
    found = generate(model, rows, max_tokens=20, sampling=GREEDY, **SHARED)
    texts = [prompt + tokens for prompt, tokens in zip(rows, found.tokens, strict=True)]
    assert found.state.recent.tolist() == [text[-11:] for text in texts]
    read = prefill(model, rows, **SHARED)
    assert read.recent.tolist() == [rows[0][-11:], [-1] * 8 + rows[1]]
    more = prefill(model, [[], [1, 2]], state=read, piece=16)
    assert more.recent.tolist() == [rows[0][-11:], [-1] * 6 + rows[1] + [1, 2]]


def test_many_pieces_without_padding_are_read_without_document_ids(monkeypatch):
    model = make_model(WINDOWS["mixed"])
    read, padded = generation.read_piece, []

    def watch(*arguments):
        padded.append(arguments[-1] is not None)
        return read(*arguments)

    monkeypatch.setattr(generation, "read_piece", watch)
    for lengths, expected in (
        ((33,), [False] * 4 + [True]),
        ((32,), [False] * 4),
        ((31,), [True] * 4),
        ((41, 37), [False] * 4 + [True] * 2),
    ):
        padded.clear()
        rows = prompts(*lengths)
        state = prefill(model, rows, piece=8, max_length=64)
        assert padded == expected
        whole = prefill(model, rows, piece=64, max_length=64)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), state, whole)


def test_logits_after_a_prompt_are_those_of_a_full_pass():
    model = make_model(WINDOWS["mixed"])
    rows = prompts(33, 1)
    state = prefill(model, rows, **SHARED)
    for row, prompt in enumerate(rows):
        expected = full_logits(model, prompt, 64)[-1]
        np.testing.assert_allclose(state.logits[row], expected, **TOLERANCE)
        np.testing.assert_array_equal(
            state.counts[row], np.bincount(prompt, minlength=state.counts.shape[1])
        )


@pytest.mark.parametrize("windows", [pytest.param("16", marks=pytest.mark.wide), "mixed"])
def test_rows_of_a_batch_are_generated_as_if_alone(windows):
    model = make_model(WINDOWS[windows])
    rows = prompts(40, 3)
    together = generate(model, rows, max_tokens=24, sampling=GREEDY, **SHARED)
    for row, prompt in enumerate(rows):
        alone = generate(model, [prompt], max_tokens=24, sampling=GREEDY, **SHARED)
        best = np.sort(full_logits(model, prompt + alone.tokens[0], 64)[len(prompt) - 1 :], -1)
        close = np.flatnonzero(best[:-1, -1] - best[:-1, -2] <= 1e-3)
        until = close[0] if close.size else 24
        assert until > 8
        assert together.tokens[row][:until] == alone.tokens[0][:until]
        if until == 24:
            np.testing.assert_allclose(
                together.state.logits[row], alone.state.logits[0], **TOLERANCE
            )


def test_draws_depend_on_seed_row_and_position_only():
    model = make_model(WINDOWS["mixed"])
    (prompt,) = prompts(5)

    def draw(rows, **options):
        seed = options.pop("seed", 3)
        return generate(
            model, rows, max_tokens=20, sampling=SamplingConfig(seed=seed), **SHARED, **options
        ).tokens

    reference = draw([prompt, prompt])
    assert reference[0] != reference[1]
    assert draw([prompt])[0] == reference[0]
    assert draw([prompt, prompt], block=7) == reference
    assert draw([prompt, prompt], seed=4)[0] != reference[0]


def test_a_stream_yields_the_same_in_blocks_of_any_size():
    model = make_model(WINDOWS["mixed"])
    rows = prompts(5, 8)
    expected = generate(model, rows, max_tokens=21, sampling=GREEDY, max_length=64)
    stream = TokenStream(model, rows, max_tokens=21, sampling=GREEDY, max_length=64, block=8)
    blocks = list(stream)
    assert [len(block.tokens[0]) for block in blocks] == [8, 8, 5]
    assert [block.finish_reasons[1] for block in blocks] == [None, None, "length"]
    for row in range(2):
        assert [t for block in blocks for t in block.tokens[row]] == expected.tokens[row]
    # Blocks of another length are another program: equal to rounding.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), stream.state, expected.state
    )


def test_states_are_updated_where_they_lie_in_blocks_of_16(monkeypatch):
    model = make_model(WINDOWS["mixed"])
    kept = {"read_piece": [], "decode_block": []}

    def large(state):  # slots, windows and what waits to retire
        return [leaf for leaf in jax.tree.leaves(state.cache) if leaf.ndim > 2 and leaf.size]

    def watch(name, place):
        run = getattr(generation, name)

        def watched(*arguments):
            before = [leaf.unsafe_buffer_pointer() for leaf in large(arguments[place])]
            result = run(*arguments)
            after = large(result.state if name == "decode_block" else result)
            kept[name].append([leaf.unsafe_buffer_pointer() for leaf in after] == before)
            return result

        monkeypatch.setattr(generation, name, watched)

    watch("read_piece", 3)
    watch("decode_block", 5)
    generate(model, prompts(32), max_tokens=32, sampling=GREEDY, **SHARED)
    assert kept == {"read_piece": [True] * 2, "decode_block": [True] * 2}


def test_a_state_goes_on_where_it_was_left_and_stays_valid():
    model = make_model(WINDOWS["mixed"])
    rows = prompts(5, 8)
    sampling = SamplingConfig(repetition_penalty=1.2, top_k=30)
    whole = generate(model, rows, max_tokens=30, sampling=sampling, max_length=64)
    first = generate(model, rows, max_tokens=13, sampling=sampling, max_length=64)
    for _ in range(2):
        rest = generate(model, state=first.state, max_tokens=17, sampling=sampling)
        for row in range(2):
            assert first.tokens[row] + rest.tokens[row] == whole.tokens[row]
        assert_same_state(rest.state, whole.state)


def test_no_tokens_are_wanted():
    model = make_model(WINDOWS["mixed"])
    none = generate(model, prompts(5), max_tokens=0)
    assert (none.tokens, none.finish_reasons) == ([[]], ["length"])
    assert np.asarray(none.state.position).tolist() == [5]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "tokens has no rows"),
        ([[1], []], {}, r"tokens\[1\] is empty"),
        ([[1, 61]], {}, r"tokens\[0\] has ids from 1 to 61"),
        ([[1, -1]], {}, r"tokens\[0\] has ids from -1"),
        (np.array([[0.5]]), {}, r"tokens\[0\]: expected a list of integers"),
        ([[1]], {"max_tokens": -1}, "max_tokens=-1"),
        ([[1]], {"max_tokens": 2**31}, "max_tokens=2147483648"),
        ([[1]], {"block": 0}, "block=0"),
        ([[1]], {"piece": 0}, "piece=0"),
        ([[1]], {"stop_tokens": [61]}, "stop_tokens has 61"),
        ([[1]], {"stop_strings": [""]}, "stop_strings has an empty string"),
        ([[1]], {"stop_strings": ["a"]}, "stop_strings: a tokenizer is needed"),
        ([[1]], {"windows": "64y7"}, "windows has the entry '64y7'"),
        ([[1] * 10], {"max_length": 9}, "max_length=9 is too short: row 0 has 10 tokens"),
        ([[1] * 10], {"max_length": 13}, "max_length=13 is too short: row 0 has 10 tokens and 4"),
    ],
)
def test_bad_arguments_are_named(rows, options, message):
    model = make_model(WINDOWS["mixed"])
    with pytest.raises(ValueError, match=message):
        generate(model, rows, **{"max_tokens": 4, **options})


@pytest.mark.parametrize("changes", [{"seed": -1}, {"seed": 2**32}, {"reserve": -1}])
def test_bad_arguments_of_prefill_are_named(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}="):
        prefill(make_model(WINDOWS["mixed"]), [[1]], **changes)


ARGUMENTS_OF_OTHER_TYPES = """
import numpy as np
from small_models import Letters, make_model
from nha_jax.inference import SamplingConfig, cache_bytes, generate, prefill

model = make_model((16,), num_layers=1)
for row, options, message in (
    ([1], {"piece": 1.5}, "piece=1.5: expected an integer"),
    ([1], {"max_length": "64"}, "max_length='64': expected an integer"),
    ([1], {"stop_tokens": [1.5]}, "stop_tokens has 1.5: expected integers"),
    ([1], {"stop_tokens": 5}, "stop_tokens=5: expected a list of ids"),
    ([1], {"stop_strings": [b"a"], "tokenizer": Letters()}, "expected a list of strings"),
    ([1], {"windows": 1.5}, "windows=1.5: expected 'full' or an int of at least 0"),
    ([1], {"sampling": {"temperature": 0}}, "sampling={'temperature': 0}: expected a Sampl"),
    ([1], {"tokenizer": "bytes"}, "tokenizer='bytes': expected a Tokenizer"),
    ([1], {"state": "x"}, "state='x': expected a GenerationState"),
    ([[1], [1, 2]], {}, "tokens: expected [B,T], or a list of lists of integers"),
):
    try:
        generate(model, [row], **{"max_tokens": 4, **options})
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
for field, value in (("temperature", None), ("top_p", "0.5"), ("min_p", np.ones(1))):
    try:
        SamplingConfig(**{field: value})
    except ValueError as error:
        assert f"sampling.{field}={value!r}: expected a number" in str(error), error
    else:
        raise AssertionError(field)
try:
    cache_bytes(model.config, "1", 10)
except ValueError as error:
    assert "batch='1': expected an integer of at least 1" in str(error), error
else:
    raise AssertionError("batch")
assert cache_bytes(model.config, np.int64(2), np.int64(9)) == cache_bytes(model.config, 2, 9)
try:
    prefill(model, [[1]], state="x")
except ValueError as error:
    assert "state='x': expected a GenerationState" in str(error), error
else:
    raise AssertionError("state")
options = {"sampling": SamplingConfig(top_k=5, seed=3), "stop_tokens": np.asarray([7])}
expected = generate(model, [[1]], max_tokens=4, **options).tokens
options["sampling"] = SamplingConfig(top_k=np.int64(5), seed=np.int64(3))
options |= {"max_tokens": np.int64(4), "block": np.int64(16), "stop_strings": None}
assert generate(model, [[1]], **options).tokens == expected
none, empty = ({"stop_tokens": tokens} for tokens in (None, ()))
assert (
    generate(model, [[1]], **options | none).tokens
    == generate(model, [[1]], **options | empty).tokens
)
"""


def test_arguments_of_other_types_are_named_or_serve():
    # Where nobody checks annotations.
    folder = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{folder}:{folder.parents[1]}"}
    command = [sys.executable, "-c", ARGUMENTS_OF_OTHER_TYPES]
    subprocess.run(command, env=environment, check=True)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"vocab_size": 62}, "counts"),
        ({"num_slots": 6}, r"cache.stacks.0"),
        ({"num_layers": 8}, r"cache.stacks.0.length"),
        ({"num_layers": 6, "windows": (0, 16, "full")}, "model.windows has 4 entries"),
    ],
)
def test_states_of_other_models_are_refused(changes, name, tmp_path):
    state = prefill(make_model(WINDOWS["mixed"]), [[1]], max_length=64)
    other = make_model(**({"windows": WINDOWS["mixed"]} | changes))
    with pytest.raises(ValueError, match=f"state: of another model.*{name}"):
        generate(other, state=state, max_tokens=1)
    with pytest.raises(ValueError, match=f"state: of another model.*{name}"):
        save_state(tmp_path / "state", state, other)
    assert not list(tmp_path.iterdir())


def test_the_state_before_a_block_of_a_stream_is_said_to_be_gone(tmp_path):
    model = make_model(WINDOWS["mixed"])
    stream = TokenStream(model, prompts(5), max_tokens=20, max_length=64)
    state, kept = stream.state, stream.state.copy()
    next(stream)
    message = r"state: its arrays are gone, a TokenStream gave them .* keep state\.copy\(\)"
    with pytest.raises(ValueError, match=message):
        generate(model, state=state, max_tokens=4)
    with pytest.raises(ValueError, match=message):
        save_state(tmp_path / "state", state, model)
    assert len(generate(model, state=kept, max_tokens=4).tokens[0]) == 4


def test_a_state_keeps_its_room_windows_and_rows():
    model = make_model(WINDOWS["mixed"])
    state = prefill(model, prompts(5), max_length=64)
    with pytest.raises(ValueError, match="max_length=32: that of the state cannot be changed"):
        prefill(model, [[1]], state=state, max_length=32)
    with pytest.raises(ValueError, match="tokens has 2 rows: the state has 1"):
        prefill(model, [[1], [2]], state=state)
    with pytest.raises(ValueError, match="row 0 has 5 tokens and 60 are to come"):
        generate(model, state=state, max_tokens=60)
    with pytest.raises(ValueError, match="expected prompts, or a state"):
        generate(model, max_tokens=12)


def test_layers_with_windows_need_no_room():
    model = make_model(WINDOWS["16"])
    state = prefill(model, prompts(5))
    assert len(generate(model, state=state, max_tokens=40).tokens[0]) == 40
    # So texts of any length are one program, also where max_length leaves room for the windows.
    rooms = [dict(reserve=0), dict(reserve=1000), dict(max_length=16)]
    shapes = [jax.tree.structure(prefill(model, prompts(5), **room)) for room in rooms]
    assert shapes == [jax.tree.structure(state)] * 3
    assert len(generate(model, prompts(5), max_tokens=40, max_length=16).tokens[0]) == 40


@pytest.mark.parametrize(("windows", "changes"), [((64, 4), {}), ((64, 0), {"slot_lag": 8})])
def test_max_length_bounds_longer_windows(windows, changes):
    model = make_model(windows, **changes)
    rows = prompts(20, 3)
    options = dict(max_tokens=12, sampling=GREEDY, piece=16)
    free = generate(model, rows, **options)
    bounded = generate(model, rows, max_length=32, **options)
    assert bounded.tokens == free.tokens
    np.testing.assert_allclose(bounded.state.logits, free.state.logits, **TOLERANCE)
    assert free.state.cache.max_length is None and bounded.state.cache.max_length == 32
    # Token by token, from the same state.
    state = prefill(model, rows, max_length=32, piece=16)
    for place in range(12):
        one = generate(model, state=state, max_tokens=1, sampling=GREEDY, block=1)
        assert [row[0] for row in one.tokens] == [row[place] for row in free.tokens]
        state = one.state
    np.testing.assert_allclose(state.logits, free.state.logits, **TOLERANCE)
    with pytest.raises(ValueError, match="max_length=32 is too short: row 0 has 32 tokens and 1 "):
        generate(model, state=state, max_tokens=1)
    with pytest.raises(ValueError, match="max_length=19 is too short: row 0 has 20 tokens, and"):
        prefill(model, rows, max_length=19)
