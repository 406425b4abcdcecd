"""What a run's model scores in its tasks."""

from __future__ import annotations

import numpy as np

from lm import choose, metrics, run, sources, tasks
from lm.evaluate import answers


def task_texts(this: run.Run, name: str) -> list[dict[str, str]]:
    """The held-out pairs of a task of the run as texts, whole, at most evaluate.decode of them."""
    task = tasks.task_named(name)
    records = sources.tfds_records(task.dataset, run.splits(this)[1][name], this.data.dir)
    limit, pairs = this.config["evaluate"]["decode"] or len(records), []
    for index in range(len(records)):
        text = task.to_text(records[index])
        if text is not None:
            pairs.append(text)
        if len(pairs) == limit:
            break
    return pairs


def score(this: run.Run, answer: answers.Answers, name: str) -> tuple[dict[str, float], list[dict]]:
    """(scores of the model and the lead baseline in a task, {inputs, targets, prediction} rows)."""
    pairs = task_texts(this, name)
    said = answer([pair["inputs"] for pair in pairs])
    references = [pair["targets"] for pair in pairs]
    words = round(np.mean([len(reference.split()) for reference in references]))
    task = tasks.task_named(name)
    leads = [metrics.lead(pair["inputs"].removeprefix(task.prefix), words) for pair in pairs]
    scores = {"examples": len(pairs)}
    for word in task.metrics:
        metric = choose.choose(metrics.METRICS, word, "the task's metric")
        scores |= metric(said, references)
        scores |= {f"lead_{key}": value for key, value in metric(leads, references).items()}
    rows = [pair | {"prediction": answer} for pair, answer in zip(pairs, said, strict=True)]
    return scores, rows
