"""Laws of the tasks: a record becomes its text and nothing else, or is dropped."""

from __future__ import annotations

import pytest

from lm import metrics, sources, tasks

RECORD = {"module": "m", "name": "m.f", "body": "The body. ", "summary": "Sum it.", "text": " x\n"}


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_a_task_says_what_it_makes(name):
    task = tasks.task_named(name)
    keys = {"inputs", "targets"} if task.pairs else {"text"}
    before = dict(RECORD)
    made = task.to_text(RECORD)
    assert made == task.to_text(RECORD)
    assert made.keys() == keys
    assert before == RECORD
    assert all(metric in metrics.METRICS for metric in task.metrics)


@pytest.mark.parametrize("text", [" x\n", "a", "two\n\nparagraphs "])
def test_a_document_passes_as_it_stands(text):
    assert tasks.text({"title": "t", "text": text}) == {"text": text}


@pytest.mark.parametrize("text", ["", " ", "\n\t\n"])
def test_an_empty_document_is_dropped(text):
    assert tasks.text({"title": "t", "text": text}) is None


def test_a_summary_task_is_the_body_to_the_summary_and_needs_both():
    pair = {"inputs": "summarize: The body. ", "targets": "Sum it."}
    assert tasks.summarize_docstring(RECORD) == pair
    for missing in ("body", "summary"):
        assert tasks.summarize_docstring(RECORD | {missing: ""}) is None


def test_an_unknown_task_lists_all_and_names_the_nearest():
    with pytest.raises(ValueError, match="choose one of .*pydocs, wikipedia; .*'wikipedia'"):
        tasks.task_named("wikipeda")


def test_every_record_of_a_dataset_makes_a_text(tiny_tfds):
    for name, task in tasks.TASKS.items():
        records = sources.tfds_records(task.dataset, "validation", str(tiny_tfds))
        made = [task.to_text(records[i]) for i in range(len(records))]
        assert len(made) == 12 and all(made), name
