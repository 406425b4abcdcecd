"""Chat: streamed answers equal predict's, dialogues have a history, slash commands work."""

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
    """make_run(task=.., custom_tasks=..) -> a run of the tasks."""

    def make(task="docstring_summary", custom_tasks=None):
        changes = {"data.task": "docstring_summary", "stage": "finetune", "data.target_length": 8}
        config = tiny_config(**changes)
        config["data"] |= {"task": task, "custom_tasks": custom_tasks or {}}
        if "," in task:
            mixture = tuple((name, None) for name in task.split(","))
            config["data"] |= {"task": "", "mixture": mixture}
        return runs.make_run(config, tmp_path_factory.mktemp("chat") / "run")

    return make


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


@pytest.fixture(scope="module")
def params(run):
    return untrained.params(run)


@pytest.mark.parametrize(
    "decoding_text", ["greedy repetition_penalty=1.5", "sample", "beam num_beams=3"]
)
def test_a_streamed_answer_equals_that_of_a_generator(decoding_text, run, params, tiny_tokens):
    config = decoding.parse(decoding_text)
    strategy = parallel.make_strategy(parallel.ParallelConfig(data=1))
    placed = strategy.place_state(params)
    generator = inference.Generator(run, strategy, placed, tiny_tokens, config, seed=3, rows=2)
    stream = inference.Stream(run, params, tiny_tokens, config, seed=3)
    texts = (
        TEXTS if decoding_text.startswith("greedy") else TEXTS[:2]
    )  # the third is in another bucket
    for number, expected in enumerate(generator(texts)):
        ids, _ = tasks.truncate_input(tasks.Task(""), TEXTS[number], 32, tiny_tokens)
        answer = list(stream(ids, number))
        assert len(answer) == 8 and tiny_tokens.decode(answer) == expected.texts[0]


def test_an_answer_ends_before_eos_and_nothing_is_compiled_twice(
    run, params, tiny_tokens, monkeypatch
):
    traces, init = [], steps.init_decoding
    count = lambda *arguments, **options: traces.append(1) or init(*arguments, **options)
    monkeypatch.setattr(steps, "init_decoding", count)
    stream = inference.Stream(run, params, tiny_tokens, decoding.parse("greedy"))
    expected = list(stream(np.array([5, 1], np.int32)))
    assert len(expected) == 8
    stream._eos = expected[3]
    first = expected.index(expected[3])
    assert list(stream(np.array([5, 1], np.int32))) == expected[:first]
    next(stream(np.arange(5, 15, dtype=np.int32)))
    assert len(traces) == 1, "both are in one bucket"
    next(stream(np.arange(5, 25, dtype=np.int32)))
    assert len(traces) == 2


@pytest.fixture(scope="module")
def bytes_tokens(tmp_path_factory):
    return tokenizer.write_byte_tokenizer(tmp_path_factory.mktemp("bytes"), 10)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_streamed_text_join_to_the_decoded_text(seed, bytes_tokens, tiny_tokens):
    rng = random.Random(seed)
    characters = "a\u00e9\u20ac\U0001f600 "
    valid = [*bytes_tokens.encode("".join(rng.choices(characters, k=12)))]
    broken = [rng.choice(valid) if rng.random() < 0.2 else token for token in valid]
    pieces = [rng.randrange(tiny_tokens.size) for _ in range(12)]
    for tokens, ids in ((bytes_tokens, valid), (bytes_tokens, broken), (tiny_tokens, pieces)):
        prefix = ""
        for piece in inference.stream_text(tokens, ids):
            assert piece
            prefix += piece
            assert tokens.decode(ids).startswith(prefix)
        assert prefix == tokens.decode(ids)
    assert all("\ufffd" not in piece for piece in inference.stream_text(bytes_tokens, valid))


def test_a_character_is_yielded_at_its_last_byte(bytes_tokens):
    read = []
    ids = (read.append(token) or token for token in bytes_tokens.encode("a\u20acb"))
    pieces = [(piece, len(read)) for piece in inference.stream_text(bytes_tokens, ids)]
    assert pieces == [("a", 1), ("\u20ac", 4), ("b", 5)]


class Parrot:
    """A stream that answers "w0", "w1", .. and records its inputs."""

    def __init__(self, tokens, interrupt=False):
        self.tokens, self.inputs, self.interrupt = tokens, [], interrupt

    def __call__(self, ids, number):
        self.inputs.append(self.tokens.decode(ids[:-1]))
        for token in self.tokens.encode(f"w{number}"):
            yield token
            if self.interrupt:
                raise KeyboardInterrupt


def make_chat(run, tokens, strict=False, **options):
    parrot = Parrot(tokens, **options)
    return inference.Chat(run, tokens, parrot, strict), parrot.inputs


def test_a_dialogue_has_its_history_until_reset(make_run, bytes_tokens):
    chat, inputs = make_chat(make_run("own", {"own": TURNS}), bytes_tokens)
    chat._input_length = 1000
    assert ["".join(chat(line)) for line in ("a  b", "c")] == ["w0", "w1"]
    chat.reset()
    list(chat("d"))
    assert inputs == [
        "reply: user: a b",
        "reply: user: a b\nsystem: w0\nuser: c",
        "reply: user: d",
    ]


def test_a_long_dialogue_keeps_its_latest_turns(make_run, bytes_tokens):
    chat, inputs = make_chat(make_run("own", {"own": TURNS}), bytes_tokens)
    chat._input_length = 40
    for line in ("first", "second", "third"):
        list(chat(line))
    assert inputs[1:] == ["reply: system: w0\nuser: second", "reply: system: w1\nuser: third"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [("docstring_summary", "summarize: x"), ("own", "say x in German:"), ("own,aeslc", "x")],
)
def test_a_line_fills_the_template_of_the_task(names, expected, make_run, bytes_tokens):
    chat, inputs = make_chat(make_run(names, {"own": OWN}), bytes_tokens)
    assert "".join(chat("x")) == "w0"
    assert "".join(chat("x")) == "w1", "lines are independent"
    assert inputs == [expected, expected]


def typed(*lines):
    """Return a function that reads these lines, then raises EOFError."""
    remaining = iter(lines)

    def read(prompt):
        for line in remaining:
            return line
        raise EOFError

    return read


def test_slash_commands_are_not_answered(make_run, bytes_tokens):
    chat, inputs = make_chat(make_run("own", {"own": TURNS}), bytes_tokens)
    output = []
    inference.chat(chat, typed("a", "", "/reset", "/help", "b", "/quit", "c"), output.append)
    assert inputs == ["reply: user: a", "reply: user: b"]
    assert "".join(output).count("/reset clears") == 2 and "w1" in "".join(output)


@pytest.mark.parametrize("line", ["/rest", "/", "/?", "/exit"])
def test_an_unknown_command_is_answered_with_the_list_of_commands(line, make_run, bytes_tokens):
    chat, inputs = make_chat(make_run("own", {"own": TURNS}), bytes_tokens)
    output = []
    inference.chat(chat, typed(line, "/etc is one", "/etc/x"), output.append)
    assert inputs[0] == "reply: user: /etc is one" and len(inputs) == 2
    sentence = f"{line} is not a command; use one of /help, /quit, /reset"
    assert sentence in "".join(output)
    assert ("did you mean '/reset'?" in "".join(output)) == (line == "/rest")


LONG = "longer than the model's 40 tokens"
DIALOGUE = "the dialogue so far, with the line, is"


def test_each_truncated_line_gives_a_warning(make_run, bytes_tokens, capsys):
    chat, inputs = make_chat(make_run("own", {"own": OWN}), bytes_tokens)
    chat._input_length = 40
    inference.chat(chat, typed("x" * 50, "y", "z" * 50), lambda text: None)
    assert capsys.readouterr().err == f"lm: warning: the line is {LONG} and was truncated.\n" * 2
    assert inputs == ["say " + "x" * 35, "say y in German:", "say " + "z" * 35]


def test_dropped_turns_give_one_warning_and_each_truncated_line_another(
    make_run, bytes_tokens, capsys
):
    chat, inputs = make_chat(make_run("own", {"own": TURNS}), bytes_tokens)
    chat._input_length = 40
    inference.chat(chat, typed("first", "second", "third"), lambda text: None)
    dropped = f"lm: warning: {DIALOGUE} {LONG}; from now on its oldest turns are dropped.\n"
    assert capsys.readouterr().err == dropped
    inference.chat(chat, typed("x" * 50, "y", "z" * 50), lambda text: None)
    assert capsys.readouterr().err == f"lm: warning: the line is {LONG} and was truncated.\n" * 2
    assert inputs[-1].startswith("reply: ") and inputs[-1].endswith("z" * 20)
    inference.chat(chat, typed("/reset", "first", "second"), lambda text: None)
    assert capsys.readouterr().err == dropped, "a new dialogue"


@pytest.mark.parametrize(
    ("task", "lines", "sentence", "expected"),
    [
        (OWN, ("x" * 50, "y"), f"lm: the line is {LONG}; shorten it", ["say y in German:"]),
        (TURNS, ("x" * 50, "y"), f"lm: the line is {LONG}; shorten it", ["reply: user: y"]),
        (
            TURNS,
            ("first", "second", "/reset", "third"),
            f"lm: {DIALOGUE} {LONG}; clear it by /reset",
            ["reply: user: first", "reply: user: third"],
        ),
    ],
    ids=["line", "turn", "history"],
)
def test_strict_refuses_long_lines_and_keeps_the_history(
    task, lines, sentence, expected, make_run, bytes_tokens, capsys
):
    chat, inputs = make_chat(make_run("own", {"own": task}), bytes_tokens, strict=True)
    chat._input_length = 40
    inference.chat(chat, typed(*lines), lambda text: None)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith(sentence), errors
    assert errors[0].endswith(", or omit --strict.")
    assert inputs == expected


def test_ctrl_c_stops_the_answer_and_not_the_chat(make_run, bytes_tokens):
    chat, inputs = make_chat(make_run("own", {"own": TURNS}), bytes_tokens, interrupt=True)
    chat._input_length, output = 1000, []
    inference.chat(chat, typed("a", "b"), output.append)
    assert "w .." in "".join(output).replace("\n", "")
    assert inputs[1] == "reply: user: a\nsystem: w\nuser: b", "the history has the shown part"


@pytest.fixture
def terminal(tiny_config, tmp_path, monkeypatch):
    """The flag of a run's workdir, at a terminal."""
    changes = {"data.task": "docstring_summary", "stage": "finetune", "data.target_length": 8}
    untrained.write(tiny_config(**changes), tmp_path / "run")
    one_device = lambda config: parallel.make_strategy(parallel.ParallelConfig(data=1))
    monkeypatch.setattr(parallel, "reading_strategy", one_device)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    return f"--workdir={tmp_path}/run"


@pytest.mark.parametrize("editing", [True, False])
def test_predict_at_a_terminal_answers_typed_lines(editing, terminal, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "readline", raising=False)
    if not editing:
        monkeypatch.setitem(sys.modules, "readline", None)  # as on systems without it
    monkeypatch.setattr("builtins.input", typed("kilo", "kilo " * 40))
    assert cli.main(["predict", terminal, "--strict"]) == 0
    assert bool(sys.modules.get("readline")) == editing
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "the model's 32 tokens; shorten it" in output.err
    lines = output.out.splitlines()
    assert cli.main(["predict", terminal, "--text=summarize: kilo"]) == 0
    assert f'"prediction": "{lines[-2]}"' in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--out=x.jsonl", "--nearest=chrf"])
@pytest.mark.parametrize("flags", [[], ["--interactive"]])
def test_flags_of_files_are_refused_for_typed_lines(flag, flags, terminal, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", typed())
    assert cli.main(["predict", terminal, flag, *flags]) == 2
    output = capsys.readouterr()
    fix = "give --input or --split, or pipe lines into standard input"
    assert f"lm: {flag} is not supported for typed lines; {fix}." in output.err
    assert output.err.count("\n") == 1 and not output.out
