"""Tests of the tasks: the texts of a record, errors for invalid tasks and records, truncation."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from lm import metrics, sources, tasks

DIALOGUE = "hi there\nhello\nbook a table\nfor how many?\ntwo"
RECORD = {
    "text": " x\n",
    "body": "The body. ",
    "summary": "Sum it.",
    "document": "A story.",
    "article": "News.",
    "highlights": "In short.",
    "email_body": "Dear all",
    "subject_line": "Us",
    "en": "a cat",
    "de": "eine Katze",
    "fr": "un chat",
    "ro": "o pisică",
    "question": "who?",
    "context": "It was I.",
    "answers": {"text": ["I", "me", "I"]},
    "sentence": "s",
    "sentence1": "s1",
    "sentence2": "s2",
    "question1": "q1",
    "question2": "q2",
    "hypothesis": "h",
    "premise": "p",
    "label": 1,
    "utterances": DIALOGUE,
}


class Codes:
    """A tokenizer whose ids are the code points; eos is 0."""

    eos = 0

    def encode(self, text):
        return np.array([ord(letter) for letter in text], np.int32)


def to_text(ids) -> str:
    """The text of ids of Codes, without eos."""
    return "".join(map(chr, ids[:-1]))


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_a_task_makes_pairs_or_running_text_and_does_not_change_the_record(name):
    task, before = tasks.get_task(name), json.dumps(RECORD)
    texts = task.to_texts(RECORD)
    assert texts == task.to_texts(RECORD) and texts
    keys = {"inputs", "targets"} if task.has_inputs else {"text"}
    assert all(text.keys() - {"references"} == keys for text in texts)
    assert json.dumps(RECORD) == before
    assert all(metric in metrics.METRICS for metric in task.metrics)
    assert bool(task.metrics) == task.has_inputs
    assert all(text["inputs"].startswith(task.prefix) for text in texts if task.has_inputs)


@pytest.mark.parametrize("text", [" x\n", "a", "two\n\nparagraphs "])
def test_running_text_is_not_changed(text):
    assert tasks.TASKS["wikipedia"].to_texts({"title": "t", "text": text}) == [{"text": text}]


@pytest.mark.parametrize("text", ["", " ", "\n\t\n", None])
def test_a_blank_document_is_dropped(text):
    assert tasks.TASKS["wikipedia"].to_texts({"title": "t", "text": text}) == []


def test_a_pair_needs_both_columns():
    task = tasks.TASKS["docstring_summary"]
    pair = {"inputs": "summarize: The body. ", "targets": "Sum it."}
    assert task.to_texts(RECORD) == [pair]
    for missing in ("body", "summary"):
        for blank in ("", " ", None):
            assert task.to_texts(RECORD | {missing: blank}) == []


def test_translations_have_t5s_inputs_in_every_direction():
    texts = {name: tasks.TASKS[name].to_texts(RECORD) for name in tasks.TASKS if "0k_" in name}
    pair = {"inputs": "translate English to German: a cat", "targets": "eine Katze"}
    assert texts["multi30k_en_de"] == [pair] and len(texts) == 6
    pair = {"inputs": "translate French to English: un chat", "targets": "a cat"}
    assert texts["multi30k_fr_en"] == [pair]


def test_a_class_number_becomes_its_label_and_an_unknown_class_is_dropped():
    task = tasks.TASKS["glue_mnli"]
    pair = {"inputs": "mnli hypothesis: h premise: p", "targets": "neutral"}
    assert task.to_texts(RECORD) == [pair]
    for label in (1, "1", 1.0, True, "neutral"):  # as TFDS, TSV and JSON have it
        assert task.to_texts(RECORD | {"label": label}) == [pair], label
    for label in (-1, "-1", "", None, [], [-1]):
        assert task.to_texts(RECORD | {"label": label}) == []
    for label in (3, [0, 3]):
        with pytest.raises(ValueError, match="has the class number 3, but the task has 3 labels"):
            task.to_texts(RECORD | {"label": label})


@pytest.mark.parametrize(
    ("targets", "value", "expected"),
    [
        ("class {y}", 1, ["class yes"]),
        (
            "class {y}",
            [1, 0],
            ["class yes"],
        ),  # in a longer template a list stands for its first item
        ("class {y} ({a})", "0", ["class no (1)"]),
        ("{y}, that is {y}", 1, ["yes, that is yes"]),
        ("class {y}", "maybe", ["class maybe"]),
        ("class {y}", -1, []),
        ("{y}", [1], ["yes"]),
        (
            "{y}",
            [1, -1, 0, "1", None],
            ["yes", "no"],
        ),  # a single column: every item is a right answer
    ],
)
def test_labels_fill_their_column_and_every_item_of_a_list_is_an_answer(targets, value, expected):
    task = tasks.get_task("mine", custom_task(targets=targets, labels=("no", "yes")))
    texts = task.to_texts({"a": "1", "y": value})
    assert [text["targets"] for text in texts] == expected[:1]
    assert all(text.get("references", expected[:1]) == expected for text in texts)


def test_the_first_of_several_answers_is_the_target_and_all_are_references():
    (text,) = tasks.TASKS["squad"].to_texts(RECORD)
    assert text["inputs"] == "question: who? context: It was I."
    assert (text["targets"], text["references"]) == ("I", ["I", "me"])
    assert tasks.TASKS["squad"].to_texts(RECORD | {"answers": {"text": []}}) == []
    (text,) = tasks.TASKS["squad"].to_texts(RECORD | {"answers": {"text": ["", None, "I", "me"]}})
    assert (text["targets"], text["references"]) == ("I", ["I", "me"]), "a blank is not an answer"


def test_each_reply_of_a_dialogue_is_a_target_with_all_turns_before_as_input():
    task = tasks.TASKS["sgd_dialogues"]
    first, second = task.to_texts(RECORD)
    assert first == {"inputs": "respond: user: hi there", "targets": "hello"}
    assert second["targets"] == "for how many?"
    assert second["inputs"] == "respond: user: hi there\nsystem: hello\nuser: book a table"
    assert task.to_texts({"utterances": DIALOGUE.split("\n")}) == [first, second]
    assert task.format_input(RECORD) == task.format_dialogue(DIALOGUE.split("\n"))
    assert task.format_input({"utterances": DIALOGUE.split("\n")[:3]}) == second["inputs"]
    assert task.to_texts({"utterances": "nobody answers"}) == []


@pytest.mark.parametrize("targets", ["{u}", "{text}"])
def test_the_prefix_of_a_dialogue_begins_every_input(targets):
    task = tasks.Task("x", "{{persona}} respond: {u}", targets, turns="u")
    assert task.prefix == "{persona} respond: "
    (text,) = task.to_texts({"u": ["hi", "hello"]})
    assert text == {"inputs": "{persona} respond: user: hi", "targets": "hello"}


@pytest.mark.parametrize(
    "spec",
    [
        {"inputs": "persona: {name} respond: {u}"},
        {"inputs": "respond: {u} now:"},
        {"inputs": "{u} respond: {u}"},
        {"inputs": "respond: {c}"},
        {"inputs": "respond: {{u}} {c}"},
        {"targets": "Agent {u}"},
        {"targets": "{answer}"},
    ],
)
def test_templates_that_a_dialogue_cannot_use_are_refused(spec):
    templates = {"inputs": "respond: {u}", "targets": "{u}"} | spec
    with pytest.raises(ValueError) as error:
        tasks.get_task("mine", custom_task(**templates, turns="u"))
    assert str(error.value) == (
        "data.custom_tasks.mine: turns='u' of a task needs inputs that end in {u}, without another "
        f"column, and targets={{u}}; they are inputs={templates['inputs']!r} and "
        f"targets={templates['targets']!r}; write 'respond: {{u}}' and leave targets out."
    )


@pytest.mark.parametrize(
    ("value", "turn"),
    [
        ([{"role": "user", "text": "hi"}, {"role": "system", "text": "hello"}], "{'role': 'user'"),
        (["hi", ["hello"]], "['hello']"),
        (["hi", None], "None"),
        ({"user": "hi"}, "{'user': 'hi'}"),
        (5, "5"),
    ],
)
def test_a_turn_that_is_not_text_is_refused(value, turn):
    task = tasks.TASKS["sgd_dialogues"]
    for read in (task.to_texts, task.format_input):
        with pytest.raises(ValueError) as error:
            read({"utterances": value})
        assert f"tfds:sgd_dialogues has the turn {turn}" in str(error.value)
        fix = "in the column 'utterances', which is not text; make it a list of texts, or one text"
        assert fix in str(error.value)
    assert task.to_texts({"utterances": None}) == task.to_texts({"utterances": []}) == []


def test_the_error_for_an_unknown_task_lists_all_and_suggests_the_nearest():
    with pytest.raises(ValueError, match="choose one of .*pydocs, .*wikipedia.*; .*'wikipedia'"):
        tasks.get_task("wikipeda")
    with pytest.raises(ValueError, match="choose one of .*mine.*; did you mean 'mine'"):
        tasks.get_task("min", {"mine": {"source": "a.jsonl"}})


def test_every_record_of_the_tiny_datasets_makes_texts(tiny_tfds):
    for name in ("wikipedia", "pydocs", "docstring_summary"):
        task = tasks.TASKS[name]
        records = sources.records(task.source, "validation", str(tiny_tfds))
        texts = [task.to_texts(records[i]) for i in range(len(records))]
        assert len(texts) == 12 and all(texts), name


@pytest.mark.parametrize("max_length", range(8, 80, 3))
def test_a_long_input_loses_its_end_and_a_long_dialogue_its_oldest_turns(max_length):
    tokens = Codes()
    summary, dialogue = tasks.TASKS["aeslc"], tasks.TASKS["sgd_dialogues"]
    text = "summarize: " + "abcdefghij" * 6
    ids, is_truncated = tasks.truncate_input(summary, text, max_length, tokens)
    assert to_text(ids) == text[: max_length - 1] and ids[-1] == tokens.eos
    assert is_truncated == (len(text) + 1 > max_length)

    text = dialogue.format_input(RECORD)
    ids, is_truncated = tasks.truncate_input(dialogue, text, max_length, tokens)
    assert len(ids) <= max_length and ids[-1] == tokens.eos
    assert is_truncated == (len(text) + 1 > max_length)
    turns = text.removeprefix(dialogue.prefix).split("\n")
    candidates = [dialogue.prefix + "\n".join(turns[i:]) for i in range(len(turns))]
    fitting = [candidate for candidate in candidates if len(candidate) < max_length]
    if fitting:  # as many whole turns as possible
        assert to_text(ids) == fitting[0]
    else:  # not even the last turn: the start of the prefix, and the end of the turn
        prefix = dialogue.prefix[: (max_length - 1) // 2]
        end = turns[-1][len(turns[-1]) - (max_length - 1 - len(prefix)) :]
        assert to_text(ids) == prefix + end and len(ids) == max_length


def custom_task(**spec) -> dict:
    """data.custom_tasks with a task `mine`."""
    return {"mine": {"source": "data/{split}.tsv", "inputs": "say: {a}", "targets": "{b}", **spec}}


def test_a_custom_task_is_a_few_strings():
    task = tasks.get_task("mine", custom_task(metrics=["bleu"]))
    assert task.to_texts({"a": "1", "b": "2"}) == [{"inputs": "say: 1", "targets": "2"}]
    assert task == tasks.Task("data/{split}.tsv", "say: {a}", "{b}", ("bleu",))
    braces = tasks.get_task("mine", custom_task(inputs="{{a}} is {a}"))
    assert braces.to_texts({"a": 1, "b": 2.5}) == [{"inputs": "{a} is 1", "targets": "2.5"}]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"source": ""}, "data.custom_tasks.mine has no source; set it to"),
        ({"input": "{a}"}, "data.custom_tasks.mine='input' is unknown; .* 'inputs'"),
        ({"metrics": "bleu"}, r"data.custom_tasks.mine.metrics='bleu' is not a tuple of words"),
        ({"inputs": 3}, "data.custom_tasks.mine.inputs=3 is not text"),
        ({"metrics": ["blue"]}, "data.custom_tasks.mine: the metric of a task='blue' is unknown"),
        (
            {"inputs": "say"},
            "data.custom_tasks.mine: inputs='say' of a task has no column; write one",
        ),
        (
            {"inputs": "say {a"},
            "mine: inputs='say {a' of a task is not a template; write columns as {name}",
        ),
        ({"targets": ""}, "data.custom_tasks.mine: targets='' of a task has no column"),
        (
            {"inputs": "{c}", "turns": "c", "labels": ("a",)},
            "but turns='c' are texts; leave labels out",
        ),
        (
            {"turns": "c"},
            "data.custom_tasks.mine: turns='c' of a task needs inputs that end in {c}",
        ),
        (
            {"inputs": "say {a!r}"},
            "mine: inputs='say {a!r}' of a task is not a template; .*without ! or :",
        ),
        ({"targets": "{b:>10}"}, "mine: targets='{b:>10}' of a task is not a template"),
        ({"inputs": "{} {a}"}, "mine: inputs='{} {a}' of a task is not a template"),
        ({"metrics": ["perplexity"]}, "mine: .*'perplexity', which is always reported; leave"),
    ],
)
def test_an_invalid_custom_task_is_refused_with_a_message(spec, message):
    with pytest.raises(ValueError, match=message):
        tasks.get_task("mine", custom_task(**spec))


def test_the_error_for_an_object_names_a_column_in_it():
    task = tasks.Task("tfds:x", "q: {question}", "{answers}")
    with pytest.raises(
        ValueError, match=r"an object in the column 'answers'; .* {answers\[text\]}"
    ):
        task.to_texts(RECORD)
    with pytest.raises(ValueError, match=r"an object in the column 'a'; .* {a\[text\]}"):
        dataclasses.replace(task, targets="{a}").to_texts(RECORD | {"a": [{"text": "I"}]})


@pytest.mark.parametrize("column", ["text.en", "text[en]", "a.", "[0]"])
def test_a_column_name_with_dots_or_brackets_comes_before_a_path(column):
    task = tasks.Task("x", f"say: {{{column}}}", "{b}")
    record = {column: "1", "text": {"en": "2"}, "b": "3"}
    assert task.to_texts(record) == [{"inputs": "say: 1", "targets": "3"}]
    assert task.format_input(record) == "say: 1"
    if "en" in column:
        del record[column]
        assert task.format_input(record) == "say: 2"


def test_the_error_for_a_missing_column_lists_the_columns_and_suggests_the_nearest():
    task = tasks.get_task("mine", custom_task(inputs="say: {englsh}"))
    message = "data/{split}.tsv has no column 'englsh', which the task's templates name; it has "
    with pytest.raises(ValueError, match=re.escape(message) + "english, b; did you mean 'eng"):
        task.to_texts({"english": "1", "b": "2"})
    nested = dataclasses.replace(task, inputs="{a[c]}")
    with pytest.raises(ValueError, match=r"no column 'a\[c\]'.* it has d\."):
        nested.to_texts({"a": {"d": 1}, "b": "2"})
    with pytest.raises(ValueError, match="it has no columns"):
        nested.to_texts({"a": "text", "b": "2"})
