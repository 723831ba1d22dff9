"""`--interactive`: turns of one text, its commands, Ctrl-C, and what it says when room runs out."""

import io
import json
import signal
import sys

import numpy as np
import pytest
from saved_runs import clock, run_model
from small_models import assert_same_state

from nha_jax.inference import SamplingConfig, generate, load_state, prefill
from nha_jax.inference import session as session_module
from nha_jax.inference.session import Session
from nha_jax.inference.state import empty_state
from nha_jax.tokenizer import Tokenizer

GREEDY = ("--temperature", "0", "--max-length", "64")
COUNT = 6


@pytest.fixture
def talk(command, monkeypatch):
    """Runs the command with these lines as standard input."""

    def execute(lines, *arguments, **options):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return command("--interactive", "--max-tokens", str(COUNT), *GREEDY, *arguments, **options)

    return execute


def continued(ids, state=None, count=COUNT, **options):
    return generate(
        run_model(),
        [ids],
        max_tokens=count,
        state=state,
        sampling=SamplingConfig(temperature=0.0),
        stop_tokens=[257],
        tokenizer=Tokenizer.bytes(),
        max_length=64 if state is None else None,
        **options,
    )


def two_turns():
    first = continued([256, *b"def "])
    second = continued([*b"(x):"], first.state)
    return first, second


def test_turns_continue_one_text(talk, tmp_path):
    path = tmp_path / "state"
    shown = talk("def \n(x):\n", "--save-state", str(path))
    first, second = two_turns()
    assert shown.out == first.text[0] + "\n" + second.text[0] + "\n"
    assert "12 tokens written in 2 answers" in shown.err
    assert_same_state(load_state(path, run_model()), second.state)
    # All that is kept is the state: the same as if the whole text were read at once.
    whole = prefill(
        run_model(),
        [[256, *b"def ", *first.tokens[0], *b"(x):", *second.tokens[0]]],
        max_length=64,
        piece=16,
    )
    np.testing.assert_allclose(second.state.logits, whole.logits, rtol=2e-5, atol=2e-5)


def test_a_first_text_comes_from_the_command_line_and_json_has_a_line_per_turn(talk):
    shown = talk("(x):\n", "--prompt", "def ", "--json")
    first, second = two_turns()
    records = list(map(json.loads, shown.out.splitlines()))
    assert [record.get("tokens") for record in records] == [
        first.tokens[0],
        COUNT,
        second.tokens[0],
        COUNT,
    ]
    assert records[3]["finish_reasons"] == ["length"]
    assert [records[1]["prompt_tokens"], records[3]["prompt_tokens"]] == [5, 4]


def test_lines_are_joined_escaped_and_left_empty(talk):
    shown = talk("a\\\nb\n\n//c\nd\\\n")
    first = continued([256, *b"a\nb"])
    second = continued([], first.state)
    third = continued([*b"/c"], second.state)
    fourth = continued([*b"d\n"], third.state)
    assert shown.out == "".join(t.text[0] + "\n" for t in (first, second, third, fourth))


def test_the_state_is_saved_forgotten_and_left(talk, tmp_path):
    path = tmp_path / "state"
    shown = talk(f"def \n/save {path}\n/reset\ndef \n/quit\nnot read\n")
    first, _ = two_turns()
    assert shown.out == 2 * (first.text[0] + "\n")
    assert f"saved in {path}" in shown.err and "forgotten" in shown.err
    assert_same_state(load_state(path, run_model()), first.state)


def test_a_session_goes_on_from_a_saved_state(talk, command, tmp_path, monkeypatch):
    path = tmp_path / "state"
    talk("def \n", "--save-state", str(path))
    monkeypatch.setattr("sys.stdin", io.StringIO("(x):\n"))
    shown = command(
        *("--interactive", "--load-state", str(path)),
        *("--max-tokens", str(COUNT), "--temperature", "0"),
    )
    assert shown.out == two_turns()[1].text[0] + "\n"


def test_bad_commands_and_files_keep_the_session(talk, tmp_path):
    nowhere = tmp_path / "nowhere" / "state"
    shown = talk(f"/save {nowhere}\n/sing\n/save\n/help\ndef \n/save {nowhere}\n(x):\n")
    for message in (
        "not saved: there is no state to save",
        "/sing: no such command",
        "/save FILE: the file is missing",
        "/reset       forget the text",
    ):
        assert message in shown.err
    assert shown.err.count("not saved: ") == 2
    assert shown.out == "".join(turn.text[0] + "\n" for turn in two_turns())


def test_a_line_that_is_no_text_keeps_the_session(command, monkeypatch):
    lines = io.TextIOWrapper(io.BytesIO(b"def \n\xff\n(x):\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", lines)
    shown = command("--interactive", "--max-tokens", str(COUNT), *GREEDY)
    assert "not valid Unicode" in shown.err and "12 tokens written in 2 answers" in shown.err


def test_the_speed_is_that_of_all_answers(talk, monkeypatch):
    monkeypatch.setattr(session_module, "time", clock(0, 2, 10, 14))
    assert "12 tokens written in 2 answers, 2.0 tokens/s" in talk("def \n(x):\n").err


def test_running_out_of_room_is_said_and_keeps_the_session(talk):
    long = "x" * 47
    shown = talk(f"{long}\n{long}\n\n\n\n{long}\n/reset\n{long}\n")
    answers = shown.out.splitlines()
    # 48 + 6 tokens, 60, 64: no more.
    assert shown.err.count("no room: the text has 54 of at most 64 tokens, and these 47") == 1
    assert shown.err.count("no room: the text has 64 of at most 64 tokens") == 2
    assert "Traceback" not in shown.err and "/reset" in shown.err
    assert "22 tokens written in 4 answers" in shown.err
    assert answers[0] == answers[-1]


def test_only_line_feeds_end_a_line(command, monkeypatch):
    lines = io.TextIOWrapper(io.BytesIO(b"a\rb\r\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", lines)
    shown = command("--interactive", "--max-tokens", str(COUNT), *GREEDY)
    assert shown.out == continued([256, *b"a\rb"]).text[0] + "\n"


class Interrupting(io.StringIO):
    """Presses Ctrl-C when something is written."""

    def write(self, text):
        if text.strip():
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_an_answer_and_keeps_what_was_written(talk, monkeypatch, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    out = Interrupting()
    monkeypatch.setattr("sys.stdout", out)
    path = tmp_path / "state"
    options = ("--max-tokens", "40", "--save-state", str(path))
    shown = talk("def \n", *options)
    assert "16 tokens written in 1 answers" in shown.err
    first = continued([256, *b"def "], count=16)
    assert out.getvalue() == first.text[0] + "\n"
    assert_same_state(load_state(path, run_model()), first.state)
    assert signal.getsignal(signal.SIGINT) is before


class Waiting(io.StringIO):
    """Ctrl-C at the first line, as at a prompt."""

    pressed = False

    def readline(self):
        if not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt
        return super().readline()


def test_ctrl_c_between_turns_drops_the_line_only(command, monkeypatch):
    monkeypatch.setattr("sys.stdin", Waiting("def \n"))
    shown = command("--interactive", "--max-tokens", str(COUNT), *GREEDY)
    assert shown.out == two_turns()[0].text[0] + "\n"
    assert sys.stdin.pressed


def test_ctrl_c_while_reading_leaves_the_text_as_it_was(talk, monkeypatch):
    turn = Session.turn

    def interrupted(session, text, write):
        if text == "never":
            raise KeyboardInterrupt
        return turn(session, text, write)

    monkeypatch.setattr(Session, "turn", interrupted)
    shown = talk("def \nnever\n(x):\n")
    assert shown.out == "".join(turn.text[0] + "\n" for turn in two_turns())
    assert "the text was not read" in shown.err


@pytest.fixture
def ending(monkeypatch):
    """Makes sessions in which the answer to "def " ends its text with the third token."""
    tokenizer = Tokenizer.bytes()
    stop = continued([256, *b"def "]).tokens[0][2]
    monkeypatch.setattr(tokenizer, "eos_id", stop)

    def make(state=None, max_length=64):
        return Session(
            run_model(),
            tokenizer,
            sampling=SamplingConfig(temperature=0.0),
            max_tokens=COUNT,
            stop_strings=[],
            block=16,
            max_length=max_length,
            state=state,
        )

    return make


def answer(session, text):
    found = []
    session.turn(text, lambda new: found.extend(new.tokens[0]))
    return found


def test_after_the_end_of_a_text_another_begins(ending):
    session = ending()
    assert session.turn_ids("a") == [256, *b"a"]
    assert session.turn("def ", lambda new: None)["finish_reasons"] == ["stop_token"]
    assert session.turn_ids("a") == [256, *b"a"]
    session.turn("a", lambda new: None)


def test_a_state_saved_at_the_end_of_a_text_begins_another_too(ending, tmp_path):
    session = ending()
    answer(session, "def ")
    before = session.state.position.tolist()
    session.save(str(tmp_path / "state"))
    assert session.state.position.tolist() == before == [1 + 4 + 3]
    loaded = ending(load_state(tmp_path / "state", run_model()))
    assert loaded.state.position.tolist() == [9]
    assert loaded.turn_ids("a") == [*b"a"]
    assert answer(loaded, "a") == answer(session, "a")
    np.testing.assert_allclose(loaded.state.logits, session.state.logits, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(loaded.state.counts, session.state.counts)


def test_a_full_state_saved_at_the_end_of_a_text_is_saved_as_it_is(ending, tmp_path):
    session = ending(max_length=8)
    answer(session, "def ")
    session.save(str(tmp_path / "state"))
    loaded = ending(load_state(tmp_path / "state", run_model()))
    assert_same_state(loaded.state, session.state)
    for one in (session, loaded):
        with pytest.raises(ValueError, match="the text has 8 of at most 8 tokens"):
            one.turn("", lambda new: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "-"), "--prompt - and --interactive: both read standard input"),
        (("--block", "0"), "block=0"),
        (("--stop", ""), "stop_strings has an empty string"),
    ],
)
def test_what_cannot_be_interactive_is_said_at_once(talk, arguments, message):
    shown = talk("def \n", *arguments, status=2)
    assert message in shown.err and shown.out == "" and shown.err.count("\n") == 1


def test_a_state_of_several_rows_is_refused():
    state = empty_state(run_model(), 2, max_length=64)
    with pytest.raises(ValueError, match="state: it has 2 rows, a session goes on with one"):
        Session(
            run_model(),
            Tokenizer.bytes(),
            sampling=SamplingConfig(),
            max_tokens=1,
            stop_strings=[],
            block=16,
            state=state,
        )


def test_saving_at_the_end_without_a_text_is_an_error(talk, tmp_path):
    shown = talk("", "--save-state", str(tmp_path / "state"), status=2)
    assert "there is no state to save" in shown.err
