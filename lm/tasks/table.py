"""The tasks that are built in; an entry is a name and a few strings."""

from __future__ import annotations

from lm.tasks.task import Task

LANGUAGES = {"en": "English", "de": "German", "fr": "French", "ro": "Romanian"}


def translation(source: str, ours: str, theirs: str) -> Task:
    """From the column of one language to another's, asked for in T5's words."""
    asked = f"translate {LANGUAGES[ours]} to {LANGUAGES[theirs]}: {{{ours}}}"
    return Task(source, asked, f"{{{theirs}}}", ("bleu", "chrf"))


def summary(source: str, text: str, short: str) -> Task:
    """From the column of a text to that of its summary."""
    return Task(source, f"summarize: {{{text}}}", f"{{{short}}}", ("rouge",))


def glue(name: str, columns: str, *labels: str) -> Task:
    """A task of GLUE in T5's words: its name, each column after its own, the label as a word.

    Source: Raffel et al. 2020, appendix D, arXiv:1910.10683.
    """
    asked = " ".join([name, *(f"{column}: {{{column}}}" for column in columns.split())])
    return Task(f"tfds:glue/{name}", asked, "{label}", ("accuracy",), labels)


TASKS = {
    "wikipedia": Task("tfds:wikipedia/20230601.en"),
    "english_prose": Task("tfds:english_prose"),
    "pydocs": Task("tfds:pydocs"),
    "docstring_summary": summary("tfds:pydocs", "body", "summary"),
    "aeslc": summary("tfds:aeslc", "email_body", "subject_line"),
    "cnn_dailymail": summary("tfds:cnn_dailymail", "article", "highlights"),
    "xsum": summary("tfds:xsum", "document", "summary"),
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
    "glue_cola": glue("cola", "sentence", "unacceptable", "acceptable"),
    "glue_sst2": glue("sst2", "sentence", "negative", "positive"),
    "glue_mrpc": glue("mrpc", "sentence1 sentence2", "not_equivalent", "equivalent"),
    "glue_qqp": glue("qqp", "question1 question2", "not_duplicate", "duplicate"),
    "glue_mnli": glue("mnli", "hypothesis premise", "entailment", "neutral", "contradiction"),
    "glue_qnli": glue("qnli", "question sentence", "entailment", "not_entailment"),
    "glue_rte": glue("rte", "sentence1 sentence2", "entailment", "not_entailment"),
    "glue_wnli": glue("wnli", "sentence1 sentence2", "not_entailment", "entailment"),
}
TASKS |= {
    f"multi30k_{ours}_{theirs}": translation("tfds:multi30k", ours, theirs)
    for ours in ("en", "de", "fr")
    for theirs in ("en", "de", "fr")
    if ours != theirs
}
WMT = {"de": "wmt14", "fr": "wmt14", "ro": "wmt16"}  # T5's three
TASKS |= {
    f"{year}_{ours}_{theirs}": translation(f"tfds:{year}_translate/{other}-en", ours, theirs)
    for other, year in WMT.items()
    for ours, theirs in (("en", other), (other, "en"))
}
