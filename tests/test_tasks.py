"""Laws of the tasks: a record becomes its texts and nothing else, or is dropped."""

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


def said(ids) -> str:
    return "".join(map(chr, ids[:-1]))


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_a_task_makes_what_it_says_and_leaves_the_record_alone(name):
    task, before = tasks.get_task(name), json.dumps(RECORD)
    made = task.to_texts(RECORD)
    assert made == task.to_texts(RECORD) and made
    keys = {"inputs", "targets"} if task.pairs else {"text"}
    assert all(text.keys() - {"references"} == keys for text in made)
    assert json.dumps(RECORD) == before
    assert all(metric in metrics.METRICS for metric in task.metrics)
    assert bool(task.metrics) == task.pairs
    assert all(text["inputs"].startswith(task.prefix) for text in made if task.pairs)


@pytest.mark.parametrize("text", [" x\n", "a", "two\n\nparagraphs "])
def test_a_document_passes_as_it_stands(text):
    assert tasks.TASKS["wikipedia"].to_texts({"title": "t", "text": text}) == [{"text": text}]


@pytest.mark.parametrize("text", ["", " ", "\n\t\n", None])
def test_an_empty_document_is_dropped(text):
    assert tasks.TASKS["wikipedia"].to_texts({"title": "t", "text": text}) == []


def test_a_pair_needs_both_of_its_columns():
    task = tasks.TASKS["docstring_summary"]
    pair = {"inputs": "summarize: The body. ", "targets": "Sum it."}
    assert task.to_texts(RECORD) == [pair]
    for missing in ("body", "summary"):
        for blank in ("", " ", None):
            assert task.to_texts(RECORD | {missing: blank}) == []


def test_translation_is_asked_for_in_the_words_of_t5_between_any_two_columns():
    made = {name: tasks.TASKS[name].to_texts(RECORD) for name in tasks.TASKS if "0k_" in name}
    pair = {"inputs": "translate English to German: a cat", "targets": "eine Katze"}
    assert made["multi30k_en_de"] == [pair] and len(made) == 6
    pair = {"inputs": "translate French to English: un chat", "targets": "a cat"}
    assert made["multi30k_fr_en"] == [pair]


def test_a_class_is_its_word_and_an_unknown_one_is_dropped():
    task = tasks.TASKS["glue_mnli"]
    pair = {"inputs": "mnli hypothesis: h premise: p", "targets": "neutral"}
    assert task.to_texts(RECORD) == [pair]
    for label in (1, "1", 1.0, True, "neutral"):  # as TFDS, TSV and JSON have it
        assert task.to_texts(RECORD | {"label": label}) == [pair], label
    for label in (-1, "-1", "", None, [], [-1]):
        assert task.to_texts(RECORD | {"label": label}) == []
    for label in (3, [0, 3]):
        with pytest.raises(ValueError, match="has the label 3, but the task names 3, from 0; name"):
            task.to_texts(RECORD | {"label": label})


@pytest.mark.parametrize(
    ("targets", "value", "right"),
    [
        ("class {y}", 1, ["class yes"]),
        ("class {y}", [1, 0], ["class yes"]),  # of a list in a template the first counts
        ("class {y} ({a})", "0", ["class no (1)"]),
        ("{y}, that is {y}", 1, ["yes, that is yes"]),
        ("class {y}", "maybe", ["class maybe"]),
        ("class {y}", -1, []),
        ("{y}", [1], ["yes"]),
        ("{y}", [1, -1, 0, "1", None], ["yes", "no"]),  # a lone column: several right answers
    ],
)
def test_the_word_of_a_label_fills_its_column_and_of_a_list_all_words_are_right(
    targets, value, right
):
    task = tasks.get_task("mine", own(targets=targets, labels=("no", "yes")))
    made = task.to_texts({"a": "1", "y": value})
    assert [text["targets"] for text in made] == right[:1]
    assert all(text.get("references", right[:1]) == right for text in made)


def test_of_several_right_answers_the_first_is_learnt_and_all_count():
    (text,) = tasks.TASKS["squad"].to_texts(RECORD)
    assert text["inputs"] == "question: who? context: It was I."
    assert (text["targets"], text["references"]) == ("I", ["I", "me"])
    assert tasks.TASKS["squad"].to_texts(RECORD | {"answers": {"text": []}}) == []
    (text,) = tasks.TASKS["squad"].to_texts(RECORD | {"answers": {"text": ["", None, "I", "me"]}})
    assert (text["targets"], text["references"]) == ("I", ["I", "me"]), "a blank is no answer"


def test_a_dialogue_makes_a_pair_of_each_reply_and_all_that_was_said_before():
    task = tasks.TASKS["sgd_dialogues"]
    first, second = task.to_texts(RECORD)
    assert first == {"inputs": "respond: user: hi there", "targets": "hello"}
    assert second["targets"] == "for how many?"
    assert second["inputs"] == "respond: user: hi there\nsystem: hello\nuser: book a table"
    assert task.to_texts({"utterances": DIALOGUE.split("\n")}) == [first, second]
    assert task.ask(RECORD) == task.history(DIALOGUE.split("\n"))  # what comes next is asked for
    assert [task.ask({"utterances": DIALOGUE.split("\n")[:3]})] == [second["inputs"]]
    assert task.to_texts({"utterances": "nobody answers"}) == []


@pytest.mark.parametrize("targets", ["{u}", "{text}"])
def test_all_that_a_dialogue_is_asked_with_is_in_its_inputs(targets):
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
def test_what_a_dialogue_would_leave_out_of_its_templates_is_refused(spec):
    given = {"inputs": "respond: {u}", "targets": "{u}"} | spec
    with pytest.raises(ValueError) as error:
        tasks.get_task("mine", own(**given, turns="u"))
    for part in (
        "data.custom_tasks.mine: turns='u' of a task is asked with words and {u} at their end",
        "answered with {u}",
        f"inputs={given['inputs']!r} and targets={given['targets']!r}",
        "write 'respond: {u}' and leave targets out.",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([{"role": "user", "text": "hi"}, {"role": "system", "text": "hello"}], "{'role': 'user'"),
        (["hi", ["hello"]], "['hello']"),
        (["hi", None], "None"),
        ({"user": "hi"}, "{'user': 'hi'}"),
        (5, "5"),
    ],
)
def test_a_turn_that_is_no_text_is_a_sentence(value, named):
    task = tasks.TASKS["sgd_dialogues"]
    for read in (task.to_texts, task.ask):
        with pytest.raises(ValueError) as error:
            read({"utterances": value})
        assert f"tfds:sgd_dialogues has the turn {named}" in str(error.value)
        cure = "in the column 'utterances', which is no text; make it a list of texts, or one text"
        assert cure in str(error.value)
    assert task.to_texts({"utterances": None}) == task.to_texts({"utterances": []}) == []


def test_an_unknown_task_lists_all_and_names_the_nearest():
    with pytest.raises(ValueError, match="choose one of .*pydocs, .*wikipedia.*; .*'wikipedia'"):
        tasks.get_task("wikipeda")
    with pytest.raises(ValueError, match="choose one of .*mine.*; did you mean 'mine'"):
        tasks.get_task("min", {"mine": {"source": "a.jsonl"}})


def test_every_record_of_a_dataset_makes_a_text(tiny_tfds):
    for name in ("wikipedia", "pydocs", "docstring_summary"):
        task = tasks.TASKS[name]
        records = sources.records(task.source, "validation", str(tiny_tfds))
        made = [task.to_texts(records[i]) for i in range(len(records))]
        assert len(made) == 12 and all(made), name


@pytest.mark.parametrize("room", range(8, 80, 3))
def test_an_input_that_is_too_long_loses_its_end_and_a_dialogue_its_oldest_turns(room):
    tokens = Codes()
    summary, talk = tasks.TASKS["aeslc"], tasks.TASKS["sgd_dialogues"]
    text = "summarize: " + "abcdefghij" * 6
    ids, cut = tasks.truncate_input(summary, text, room, tokens)
    assert said(ids) == text[: room - 1] and ids[-1] == tokens.eos
    assert cut == (len(text) + 1 > room)

    text = talk.ask(RECORD)
    ids, cut = tasks.truncate_input(talk, text, room, tokens)
    assert len(ids) <= room and ids[-1] == tokens.eos and cut == (len(text) + 1 > room)
    turns = text.removeprefix(talk.prefix).split("\n")
    whole = [talk.prefix + "\n".join(turns[i:]) for i in range(len(turns))]
    fits = [kept for kept in whole if len(kept) < room]
    if fits:  # the most turns that fit, whole ones
        assert said(ids) == fits[0]
    else:  # not even the last: its end, behind what there is room for of the prefix
        asked = talk.prefix[: (room - 1) // 2]
        end = turns[-1][len(turns[-1]) - (room - 1 - len(asked)) :]
        assert said(ids) == asked + end and len(ids) == room


def own(**spec) -> dict:
    return {"mine": {"source": "data/{split}.tsv", "inputs": "say: {a}", "targets": "{b}", **spec}}


def test_a_task_of_ones_own_is_a_few_strings():
    task = tasks.get_task("mine", own(metrics=["bleu"]))
    assert task.to_texts({"a": "1", "b": "2"}) == [{"inputs": "say: 1", "targets": "2"}]
    assert task == tasks.Task("data/{split}.tsv", "say: {a}", "{b}", ("bleu",))
    braces = tasks.get_task("mine", own(inputs="{{a}} is {a}"))
    assert braces.to_texts({"a": 1, "b": 2.5}) == [{"inputs": "{a} is 1", "targets": "2.5"}]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"source": ""}, "data.custom_tasks.mine names no source; set it to"),
        ({"input": "{a}"}, "data.custom_tasks.mine='input' is unknown; .* 'inputs'"),
        ({"metrics": "bleu"}, r"data.custom_tasks.mine.metrics='bleu' is not a tuple of words"),
        ({"inputs": 3}, "data.custom_tasks.mine.inputs=3 is not text"),
        ({"metrics": ["blue"]}, "data.custom_tasks.mine: the metric of a task='blue' is unknown"),
        (
            {"inputs": "say"},
            "data.custom_tasks.mine: inputs='say' of a task has no column; write one",
        ),
        ({"inputs": "say {a"}, "data.custom_tasks.mine: inputs='say {a' of a task is no template"),
        ({"targets": ""}, "data.custom_tasks.mine: targets='' of a task has no column"),
        (
            {"inputs": "{c}", "turns": "c", "labels": ("a",)},
            "and turns='c' are texts; leave labels out",
        ),
        ({"turns": "c"}, "data.custom_tasks.mine: turns='c' of a task is asked with words and {c}"),
        ({"inputs": "say {a!r}"}, "mine: inputs='say {a!r}' of a task has {a!r}, .* write {a}"),
        ({"targets": "{b:>10}"}, "mine: targets='{b:>10}' of a task has {b:>10}, .* write {b}"),
        ({"inputs": "{} {a}"}, "mine: inputs='{} {a}' of a task has {}, .* write {name}"),
        ({"metrics": ["perplexity"]}, "mine: .*'perplexity' needs no word; evaluate writes it of"),
    ],
)
def test_a_mistake_in_a_task_of_ones_own_is_a_sentence(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        tasks.get_task("mine", own(**spec))


def test_a_column_that_is_an_object_is_a_sentence_with_one_of_its_columns():
    task = tasks.Task("tfds:x", "q: {question}", "{answers}")
    with pytest.raises(
        ValueError, match=r"an object in the column 'answers'; .* {answers\[text\]}"
    ):
        task.to_texts(RECORD)
    with pytest.raises(ValueError, match=r"an object in the column 'a'; .* {a\[text\]}"):
        dataclasses.replace(task, targets="{a}").to_texts(RECORD | {"a": [{"text": "I"}]})


@pytest.mark.parametrize("column", ["text.en", "text[en]", "a.", "[0]"])
def test_a_column_is_looked_up_by_its_whole_name_before_it_is_a_path(column):
    task = tasks.Task("x", f"say: {{{column}}}", "{b}")
    record = {column: "1", "text": {"en": "2"}, "b": "3"}
    assert task.to_texts(record) == [{"inputs": "say: 1", "targets": "3"}]
    assert task.ask(record) == "say: 1"
    if "en" in column:
        del record[column]
        assert task.ask(record) == "say: 2"


def test_a_missing_column_is_a_sentence_with_those_there_are_and_the_nearest():
    task = tasks.get_task("mine", own(inputs="say: {englsh}"))
    sentence = "data/{split}.tsv has no column 'englsh', which the task's templates name; it has "
    with pytest.raises(ValueError, match=re.escape(sentence) + "english, b; did you mean 'eng"):
        task.to_texts({"english": "1", "b": "2"})
    nested = dataclasses.replace(task, inputs="{a[c]}")
    with pytest.raises(ValueError, match=r"no column 'a\[c\]'.* it has d\."):
        nested.to_texts({"a": {"d": 1}, "b": "2"})
    with pytest.raises(ValueError, match="it has none there"):
        nested.to_texts({"a": "text", "b": "2"})
