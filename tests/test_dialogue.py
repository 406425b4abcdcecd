"""Laws of talk: streamed answers are those of a file, a dialogue has a history, lines obey."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest

from lm import cli, decoding, inference, parallel, runs, steps, tasks, tokenizer
from tests import untrained

TEXTS = ("summarize: kilo lima", "summarize: mike", "summarize: " + "november " * 9)
TURNS = {"source": "own.jsonl", "inputs": "reply: {said}", "targets": "{said}", "turns": "said"}
OWN = {"source": "own.jsonl", "inputs": "say {en} in German:", "targets": "{de}"}


@pytest.fixture(scope="module")
def make_run(tiny_config, tmp_path_factory):
    """(task=, tasks=..) -> a run of the tasks."""

    def make(task="docstring_summary", own=None):
        changes = {"data.task": "docstring_summary", "stage": "finetune", "data.target_length": 8}
        config = tiny_config(**changes)
        config["data"] |= {"task": task, "tasks": own or {}}
        return runs.make_run(config, tmp_path_factory.mktemp("talk") / "run")

    return make


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


@pytest.fixture(scope="module")
def params(run):
    return untrained.params(run)


@pytest.mark.parametrize("how", ["greedy repetition=1.5", "sample", "beam width=3"])
def test_a_streamed_answer_is_that_of_a_file(how, run, params, tiny_tokens):
    how = decoding.parse(how)
    strategy = parallel.make_strategy(parallel.ParallelConfig(data=1))
    placed = strategy.place_state(params)
    answer = inference.Generator(run, strategy, placed, tiny_tokens, how, seed=3, rows=2)
    stream = inference.Stream(run, params, tiny_tokens, how, seed=3)
    some = TEXTS if how.method == "greedy" else TEXTS[:2]  # the third is of another bucket
    for number, found in enumerate(answer(some)):
        ids, _ = tasks.truncate_input(tasks.Task(""), TEXTS[number], 32, tiny_tokens)
        said = list(stream(ids, number))
        assert len(said) == 8 and tiny_tokens.decode(said) == found.texts[0]


def test_an_answer_ends_before_its_eos_and_nothing_is_compiled_twice(
    run, params, tiny_tokens, monkeypatch
):
    traced, begin = [], steps.decode_begin
    counted = lambda *given, **options: traced.append(1) or begin(*given, **options)
    monkeypatch.setattr(steps, "decode_begin", counted)
    stream = inference.Stream(run, params, tiny_tokens, decoding.parse("greedy"))
    whole = list(stream(np.array([5, 1], np.int32)))
    assert len(whole) == 8
    stream._eos = whole[3]
    first = whole.index(whole[3])
    assert list(stream(np.array([5, 1], np.int32))) == whole[:first]
    next(stream(np.arange(5, 15, dtype=np.int32)))
    assert len(traced) == 1, "both are of one bucket"
    next(stream(np.arange(5, 25, dtype=np.int32)))
    assert len(traced) == 2


@pytest.fixture(scope="module")
def bytes_tokens(tmp_path_factory):
    return tokenizer.write_byte_tokenizer(tmp_path_factory.mktemp("bytes"), 10)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_shown_is_never_taken_back_and_ends_as_the_whole(seed, bytes_tokens, tiny_tokens):
    rng = random.Random(seed)
    characters = "a\u00e9\u20ac\U0001f600 "
    whole = [*bytes_tokens.encode("".join(rng.choices(characters, k=12)))]
    broken = [rng.choice(whole) if rng.random() < 0.2 else token for token in whole]
    pieces = [rng.randrange(tiny_tokens.size) for _ in range(12)]
    for tokens, ids in ((bytes_tokens, whole), (bytes_tokens, broken), (tiny_tokens, pieces)):
        shown = ""
        for piece in inference.stream_text(tokens, ids):
            assert piece
            shown += piece
            assert tokens.decode(ids).startswith(shown)
        assert shown == tokens.decode(ids)
    assert all("\ufffd" not in piece for piece in inference.stream_text(bytes_tokens, whole))


def test_a_text_is_shown_as_soon_as_it_is_sure(bytes_tokens):
    given = []
    ids = (given.append(token) or token for token in bytes_tokens.encode("a\u20acb"))
    when = [(piece, len(given)) for piece in inference.stream_text(bytes_tokens, ids)]
    assert when == [("a", 1), ("\u20ac", 4), ("b", 5)]


class Parrot:
    """A stream that says "w0", "w1", .. and keeps what it was asked."""

    def __init__(self, tokens, interrupt=False):
        self.tokens, self.asked, self.interrupt = tokens, [], interrupt

    def __call__(self, ids, number):
        self.asked.append(self.tokens.decode(ids[:-1]))
        for token in self.tokens.encode(f"w{number}"):
            yield token
            if self.interrupt:
                raise KeyboardInterrupt


def made(make_run, tokens, *given, strict=False, **options):
    parrot = Parrot(tokens, **options)
    return inference.Chat(make_run(*given), tokens, parrot, strict), parrot.asked


def test_a_dialogue_is_asked_with_all_that_was_said_until_it_is_forgotten(make_run, bytes_tokens):
    talk, asked = made(make_run, bytes_tokens, "own", {"own": TURNS})
    talk._input_length = 1000
    assert ["".join(talk(line)) for line in ("a  b", "c")] == ["w0", "w1"]
    talk.reset()
    list(talk("d"))
    assert asked == [
        "reply: user: a b",
        "reply: user: a b\nsystem: w0\nuser: c",
        "reply: user: d",
    ]


def test_a_long_dialogue_is_asked_with_its_latest_turns(make_run, bytes_tokens):
    talk, asked = made(make_run, bytes_tokens, "own", {"own": TURNS})
    talk._input_length = 40
    for line in ("first", "second", "third"):
        list(talk(line))
    assert asked[1:] == ["reply: system: w0\nuser: second", "reply: system: w1\nuser: third"]


@pytest.mark.parametrize(
    ("names", "asked"),
    [("docstring_summary", "summarize: x"), ("own", "say x in German:"), ("own,aeslc", "x")],
)
def test_a_line_has_the_words_of_the_task_put_around_it(names, asked, make_run, bytes_tokens):
    talk, found = made(make_run, bytes_tokens, names, {"own": OWN})
    assert "".join(talk("x")) == "w0"
    assert "".join(talk("x")) == "w1", "each line is by itself"
    assert found == [asked, asked]


def typed(*lines):
    """A reader of these lines, then of the end."""
    left = iter(lines)

    def read(prompt):
        for line in left:
            return line
        raise EOFError

    return read


def test_words_with_a_slash_are_obeyed_and_not_asked(make_run, bytes_tokens):
    talk, asked = made(make_run, bytes_tokens, "own", {"own": TURNS})
    said = []
    inference.chat(talk, typed("a", "", "/reset", "/help", "b", "/quit", "c"), said.append)
    assert asked == ["reply: user: a", "reply: user: b"]
    assert "".join(said).count("/reset clears") == 2 and "w1" in "".join(said)


@pytest.mark.parametrize("line", ["/rest", "/", "/?", "/exit"])
def test_a_command_that_there_is_not_is_answered_by_those_that_there_are(
    line, make_run, bytes_tokens
):
    talk, asked = made(make_run, bytes_tokens, "own", {"own": TURNS})
    said = []
    inference.chat(talk, typed(line, "/etc is one", "/etc/x"), said.append)
    assert asked[0] == "reply: user: /etc is one" and len(asked) == 2
    sentence = f"{line} is not a command; use one of /help, /quit, /reset"
    assert sentence in "".join(said)
    assert ("did you mean '/reset'?" in "".join(said)) == (line == "/rest")


LONG = "longer than the model's 40 tokens"
TALK = "the dialogue so far, with the line, is"


def test_a_line_that_is_cut_is_warned_of_each_time(make_run, bytes_tokens, capsys):
    talk, asked = made(make_run, bytes_tokens, "own", {"own": OWN})
    talk._input_length = 40
    inference.chat(talk, typed("x" * 50, "y", "z" * 50), lambda text: None)
    assert capsys.readouterr().err == f"lm: warning: the line is {LONG} and was truncated.\n" * 2
    assert asked == ["say " + "x" * 35, "say y in German:", "say " + "z" * 35]


def test_turns_that_are_left_out_are_warned_of_once_and_a_line_that_is_cut_each_time(
    make_run, bytes_tokens, capsys
):
    talk, asked = made(make_run, bytes_tokens, "own", {"own": TURNS})
    talk._input_length = 40
    inference.chat(talk, typed("first", "second", "third"), lambda text: None)
    left = f"lm: warning: {TALK} {LONG}; from now on its oldest turns are dropped.\n"
    assert capsys.readouterr().err == left
    inference.chat(talk, typed("x" * 50, "y", "z" * 50), lambda text: None)
    assert capsys.readouterr().err == f"lm: warning: the line is {LONG} and was truncated.\n" * 2
    assert asked[-1].startswith("reply: ") and asked[-1].endswith("z" * 20)
    inference.chat(talk, typed("/reset", "first", "second"), lambda text: None)
    assert capsys.readouterr().err == left, "another talk"


@pytest.mark.parametrize(
    ("own", "lines", "sentence", "heard"),
    [
        (OWN, ("x" * 50, "y"), f"lm: the line is {LONG}; shorten it", ["say y in German:"]),
        (TURNS, ("x" * 50, "y"), f"lm: the line is {LONG}; shorten it", ["reply: user: y"]),
        (
            TURNS,
            ("first", "second", "/reset", "third"),
            f"lm: {TALK} {LONG}; clear it by /reset",
            ["reply: user: first", "reply: user: third"],
        ),
    ],
    ids=["line", "turn", "history"],
)
def test_a_strict_talk_refuses_what_would_be_cut_and_goes_on_as_if_it_was_not_said(
    own, lines, sentence, heard, make_run, bytes_tokens, capsys
):
    talk, asked = made(make_run, bytes_tokens, "own", {"own": own}, strict=True)
    talk._input_length = 40
    inference.chat(talk, typed(*lines), lambda text: None)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(sentence), said
    assert said[0].endswith(", or omit --strict.")
    assert asked == heard


def test_ctrl_c_stops_an_answer_and_not_the_talk(make_run, bytes_tokens):
    talk, asked = made(make_run, bytes_tokens, "own", {"own": TURNS}, interrupt=True)
    talk._input_length, said = 1000, []
    inference.chat(talk, typed("a", "b"), said.append)
    assert "w .." in "".join(said).replace("\n", "")
    assert asked[1] == "reply: user: a\nsystem: w\nuser: b", "it was heard as far as it went"


@pytest.fixture
def terminal(tiny_config, tmp_path, monkeypatch):
    """The flag of a run's workdir, at a terminal."""
    changes = {"data.task": "docstring_summary", "stage": "finetune", "data.target_length": 8}
    untrained.write(tiny_config(**changes), tmp_path / "run")
    one = lambda config: parallel.make_strategy(parallel.ParallelConfig(data=1))
    monkeypatch.setattr(parallel, "reading_strategy", one)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    return f"--workdir={tmp_path}/run"


@pytest.mark.parametrize("editing", [True, False])
def test_on_a_terminal_lines_are_asked_as_they_are_typed(editing, terminal, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "readline", raising=False)
    if not editing:
        monkeypatch.setitem(sys.modules, "readline", None)  # as where Python has none
    monkeypatch.setattr("builtins.input", typed("kilo", "kilo " * 40))
    assert cli.main(["predict", terminal, "--strict"]) == 0
    assert bool(sys.modules.get("readline")) == editing
    given = capsys.readouterr()
    assert given.err.count("\n") == 1 and "the model's 32 tokens; shorten it" in given.err
    said = given.out.splitlines()
    assert cli.main(["predict", terminal, "--text=summarize: kilo"]) == 0
    assert f'"prediction": "{said[-2]}"' in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--out=x.jsonl", "--nearest=chrf"])
@pytest.mark.parametrize("given", [[], ["--interactive"]])
def test_what_is_of_no_use_for_typed_lines_is_refused(flag, given, terminal, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", typed())
    assert cli.main(["predict", terminal, flag, *given]) == 2
    said = capsys.readouterr()
    cure = "give --input or --split, or pipe lines into standard input"
    assert f"lm: {flag} is of no use for lines that are typed; {cure}." in said.err
    assert said.err.count("\n") == 1 and not said.out
