"""The built-in tasks: a name and a few strings each."""

from __future__ import annotations

import itertools

from lm.tasks.task import Task

LANGUAGES = {"en": "English", "de": "German", "fr": "French", "ro": "Romanian"}


def _translation(dataset: str, source: str, target: str) -> Task:
    """From one language's column to another's, in T5's words."""
    inputs = f"translate {LANGUAGES[source]} to {LANGUAGES[target]}: {{{source}}}"
    return Task(dataset, inputs, f"{{{target}}}", ("bleu", "chrf"))


def _summary(dataset: str, column: str, summary_column: str) -> Task:
    return Task(dataset, f"summarize: {{{column}}}", f"{{{summary_column}}}", ("rouge",))


def _glue(name: str, columns: str, *labels: str) -> Task:
    """A task of GLUE in T5's words: the inputs are its name, then each column after its own name.

    Source: Raffel et al. 2020, appendix D, arXiv:1910.10683.
    """
    inputs = " ".join([name, *(f"{column}: {{{column}}}" for column in columns.split())])
    return Task(f"tfds:glue/{name}", inputs, "{label}", ("accuracy",), labels)


TASKS = {
    "wikipedia": Task("tfds:wikipedia/20230601.en"),
    "english_prose": Task("tfds:english_prose"),
    "pydocs": Task("tfds:pydocs"),
    "docstring_summary": _summary("tfds:pydocs", "body", "summary"),
    "aeslc": _summary("tfds:aeslc", "email_body", "subject_line"),
    "cnn_dailymail": _summary("tfds:cnn_dailymail", "article", "highlights"),
    "xsum": _summary("tfds:xsum", "document", "summary"),
    "sgd_dialogues": Task(
        "tfds:sgd_dialogues",
        inputs="respond: {utterances}",
        targets="{utterances}",
        metrics=("bleu", "exact_match"),
        turns="utterances",
    ),
    "squad": Task(
        "tfds:squad/v1.1",
        inputs="question: {question} context: {context}",
        targets="{answers[text]}",
        metrics=("exact_match", "f1"),
    ),
    "glue_cola": _glue("cola", "sentence", "unacceptable", "acceptable"),
    "glue_sst2": _glue("sst2", "sentence", "negative", "positive"),
    "glue_mrpc": _glue("mrpc", "sentence1 sentence2", "not_equivalent", "equivalent"),
    "glue_qqp": _glue("qqp", "question1 question2", "not_duplicate", "duplicate"),
    "glue_mnli": _glue("mnli", "hypothesis premise", "entailment", "neutral", "contradiction"),
    "glue_qnli": _glue("qnli", "question sentence", "entailment", "not_entailment"),
    "glue_rte": _glue("rte", "sentence1 sentence2", "entailment", "not_entailment"),
    "glue_wnli": _glue("wnli", "sentence1 sentence2", "not_entailment", "entailment"),
}
for source, target in itertools.permutations(("en", "de", "fr"), 2):
    TASKS[f"multi30k_{source}_{target}"] = _translation("tfds:multi30k", source, target)
for language, year in {"de": "wmt14", "fr": "wmt14", "ro": "wmt16"}.items():  # as in T5
    for source, target in (("en", language), (language, "en")):
        dataset = f"tfds:{year}_translate/{language}-en"
        TASKS[f"{year}_{source}_{target}"] = _translation(dataset, source, target)
