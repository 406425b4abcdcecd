"""Score answers and losses, with bootstrap intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from lm import metrics, runs, sources, steps, tasks
from lm.inference import generate

NUM_DRAWS = 1000  # of the bootstrap
MAX_NATS = 700.0  # exp of more overflows a float


def task_texts(run: runs.Run, name: str, split: str = "") -> list[tasks.Text]:
    """Read at most evaluate.max_decoded_examples pairs of a run's task, not truncated.

    split: of the task's source; empty: the run's held-out split.
    """
    task, split = run.data.task_and_split(name, split or runs.splits(run)[1][name])
    records = sources.records(task.source, split, run.data.tfds_dir)
    texts = (text for i in range(len(records)) for text in task.to_texts(records[i]))
    return list(itertools.islice(texts, run.evaluate.max_decoded_examples or None))


def references(pairs: Sequence[tasks.Text]) -> list:
    """Return the references of each pair: a text or a list of texts."""
    return [pair.get("references", pair["targets"]) for pair in pairs]


def score_answers(
    task: tasks.Task, pairs: Sequence[tasks.Text], answers: Sequence[str]
) -> dict[str, float | dict]:
    """Compute a task's scores with 95 % intervals, and the signature of each metric.

    With rouge, also scores the lead baseline: the first words of each input, as many as the mean
    target has.
    """
    targets, intervals, signatures = references(pairs), {}, {}
    scores = {"examples": len(pairs), "intervals": intervals, "signatures": signatures}
    for metric in task.metrics:
        scores |= metrics.score(metric, answers, targets)
        intervals |= metrics.confidence_intervals(metric, answers, targets, draws=NUM_DRAWS)
        signatures[metric] = metrics.signature(metric, targets)
    if "rouge" in task.metrics:
        num_words = round(np.mean([len(pair["targets"].split()) for pair in pairs]))
        inputs = [pair["inputs"].removeprefix(task.prefix) for pair in pairs]
        leads = [metrics.lead(text, num_words) for text in inputs]
        for result, compute in ((scores, metrics.score), (intervals, metrics.confidence_intervals)):
            values = compute("rouge", leads, targets)
            result |= {f"lead_{name}": value for name, value in values.items()}
    return scores


def rows(pairs: Sequence[tasks.Text], answers: Sequence[generate.Answer]) -> list[dict]:
    """Make the rows of predictions.jsonl; several answers come with their scores."""
    lines = []
    for pair, answer in zip(pairs, answers, strict=True):
        line = pair | {"prediction": answer.texts[0]}
        if len(answer.texts) > 1:
            line |= {"predictions": answer.texts, "scores": answer.scores}
        lines.append(line)
    return lines


def concatenate(sums: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate the sums of several tasks' examples."""
    return {name: np.concatenate([task[name] for task in sums]) for name in sums[0]}


def score_losses(examples: dict[str, np.ndarray]) -> dict[str, float | dict]:
    """Compute held-out metrics with 95 % intervals; perplexity is per token.

    examples: {name: sums of each example}, as in HeldOut.by_example.
    """
    sums = np.stack(list(examples.values()), axis=1)

    def figures(sums: np.ndarray) -> dict[str, float]:
        values = steps.metrics_from_sums(dict(zip(examples, sums.tolist(), strict=True)))
        return values | {"perplexity": math.exp(min(values["nats"], MAX_NATS))}

    values = figures(sums.sum(0))
    draws = metrics.bootstrap(sums, lambda row, _: list(figures(row).values()), draws=NUM_DRAWS)
    tokens = int(examples["weight"].sum())
    return values | {"tokens": tokens, "intervals": metrics.percentile_intervals(values, draws)}


class TaskScorer:
    """Scores parameters in a run's tasks; reads pairs and compiles once.

    splits: by task; default: the run's held-out splits. The attribute `names` lists the scores, as
    "task/score" with several tasks.
    """

    def __init__(self, run: runs.Run, strategy, tokens, splits: dict[str, str] | None = None):
        run_tasks = {name: run.data.get_task(name) for name in run.data.names}
        self.tasks = {name: task for name, task in run_tasks.items() if task.has_inputs}
        splits = runs.splits(run)[1] if splits is None else splits
        self.pairs = {name: task_texts(run, name, splits[name]) for name in self.tasks}
        self._several = len(run_tasks) > 1
        self._generator = generate.Generator(run, strategy, None, tokens, run.decoding)
        self.names = tuple(
            self._score_name(name, score)
            for name, task in self.tasks.items()
            for metric in task.metrics
            for score in metrics.METRICS[metric].names
        )

    def _score_name(self, name: str, score: str) -> str:
        return f"{name}/{score}" if self._several else score

    def answers(self, params, name: str, beat=lambda: None) -> list[generate.Answer]:
        """Answer a task's pairs, in order; params: on the devices; beat: called after each batch.

        All hosts call this together and get all answers.
        """
        inputs = [pair["inputs"] for pair in self.pairs[name]]
        return self._generator.with_params(params)(inputs, self.tasks[name], beat=beat)

    def __call__(self, params, beat=lambda: None) -> dict[str, float]:
        """Compute the scores of `names`, in percent."""
        scores = {}
        for name, task in self.tasks.items():
            answers = [answer.texts[0] for answer in self.answers(params, name, beat)]
            for metric in task.metrics:
                values = metrics.score(metric, answers, references(self.pairs[name]))
                scores |= {self._score_name(name, score): value for score, value in values.items()}
        return scores
