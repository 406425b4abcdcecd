"""What a run's model scores in its tasks: answers against references, and how sure that is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from lm import metrics, runs, sources, steps, tasks
from lm.inference import generate

DRAWS = 1000  # of the bootstrap
LARGEST = 700.0  # nats of a perplexity that is a float


def task_texts(run: runs.Run, name: str, split: str = "") -> list[tasks.Text]:
    """A task's pairs as complete texts, at most evaluate.max_decoded_examples of them.

    split: of the task's source; empty: the one the run holds out.
    """
    task, split = run.data.reading(name, split or runs.splits(run)[1][name])
    records = sources.records(task.source, split, run.data.tfds_dir)
    every = (text for i in range(len(records)) for text in task.to_texts(records[i]))
    return list(itertools.islice(every, run.evaluate.max_decoded_examples or None))


def references(pairs: Sequence[tasks.Text]) -> list:
    """What each answer is held against: a text, or a list of them where several are right."""
    return [pair.get("references", pair["targets"]) for pair in pairs]


def score_answers(
    task: tasks.Task, pairs: Sequence[tasks.Text], said: Sequence[str]
) -> dict[str, float | dict]:
    """All scores of a task's answers; 95 % intervals by name; each metric's signature by its word.

    Of a task with rouge also those of the lead baseline, the first words of the inputs.
    """
    theirs, found = references(pairs), {"examples": len(pairs)}
    found |= {"intervals": {}, "signatures": {}}
    for word in task.metrics:
        found |= metrics.score(word, said, theirs)
        found["intervals"] |= metrics.confidence_intervals(word, said, theirs, draws=DRAWS)
        found["signatures"][word] = metrics.signature(word, theirs)
    if "rouge" in task.metrics:
        leads = lead_answers(task, pairs)
        scored = (
            metrics.score("rouge", leads, theirs),
            metrics.confidence_intervals("rouge", leads, theirs),
        )
        found |= {f"lead_{name}": value for name, value in scored[0].items()}
        found["intervals"] |= {f"lead_{name}": value for name, value in scored[1].items()}
    return found


def lead_answers(task: tasks.Task, pairs: Sequence[tasks.Text]) -> list[str]:
    """The first words of each input, as many as the targets have on average."""
    words = round(np.mean([len(pair["targets"].split()) for pair in pairs]))
    return [metrics.lead(pair["inputs"].removeprefix(task.prefix), words) for pair in pairs]


def rows(pairs: Sequence[tasks.Text], given: Sequence[generate.Answer]) -> list[dict]:
    """{inputs, targets, prediction} of each example; of several answers all, with their scores."""
    made = []
    for pair, answer in zip(pairs, given, strict=True):
        several = {"predictions": answer.texts, "scores": answer.scores}
        many = several if len(answer.texts) > 1 else {}
        made.append(pair | {"prediction": answer.texts[0]} | many)
    return made


def joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The sums of the examples of several parts, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def score_losses(examples: dict[str, np.ndarray]) -> dict[str, float | dict]:
    """The figures of held-out losses with 95 % intervals, of each example's sums.

    examples: {name: [examples]}, as HeldOut.by_example gives them. perplexity is of the tokens.
    """
    each = np.stack(list(examples.values()), axis=1)

    def figures(sums: np.ndarray) -> dict[str, float]:
        found = steps.metrics_from_sums(dict(zip(examples, sums.tolist(), strict=True)))
        return found | {"perplexity": math.exp(min(found["nats"], LARGEST))}

    found = figures(each.sum(0))
    drawn = metrics.bootstrap(each, lambda sums, _: list(figures(sums).values()), draws=DRAWS)
    tokens = int(examples["weight"].sum())
    return found | {"tokens": tokens, "intervals": metrics.percentile_intervals(found, drawn)}


class TaskScorer:
    """The scores of any parameters in a run's tasks: pairs read once, programs compiled once.

    splits: by task, those to answer; by default what the run holds out. names: of the scores, of
    several tasks as "task/score".
    """

    def __init__(self, run: runs.Run, strategy, tokens, splits: dict[str, str] | None = None):
        named = {name: run.data.get_task(name) for name in run.data.names}
        self.tasks = {name: task for name, task in named.items() if task.pairs}
        splits = runs.splits(run)[1] if splits is None else splits
        self.pairs = {name: task_texts(run, name, splits[name]) for name in self.tasks}
        self._several = len(named) > 1
        how = run.decoding
        self._answers = generate.Generator(run, strategy, None, tokens, how)
        self.names = tuple(
            self._said(name, score)
            for name, task in self.tasks.items()
            for word in task.metrics
            for score in metrics.METRICS[word].names
        )

    def _said(self, name: str, score: str) -> str:
        return f"{name}/{score}" if self._several else score

    def answers(self, params, name: str, beat=lambda: None) -> list[generate.Answer]:
        """The answers to a task's pairs, in order; params as placed. beat: before each batch.

        Several hosts call this together, and each gets all answers.
        """
        asked = [pair["inputs"] for pair in self.pairs[name]]
        return self._answers.with_params(params)(asked, self.tasks[name], beat=beat)

    def __call__(self, params, beat=lambda: None) -> dict[str, float]:
        """The scores alone, by `names`, in percent."""
        found = {}
        for name, task in self.tasks.items():
            said = [answer.texts[0] for answer in self.answers(params, name, beat)]
            for word in task.metrics:
                scored = metrics.score(word, said, references(self.pairs[name]))
                found |= {self._said(name, score): value for score, value in scored.items()}
        return found
