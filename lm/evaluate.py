"""Held-out loss, baselines and task scores; answers to inputs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Iterator

import numpy as np
import tqdm

from lm import (
    batch,
    checkpoints,
    choose,
    logs,
    metrics,
    parallel,
    pipeline,
    run,
    sources,
    steps,
    tasks,
    transformer,
)

logger = logging.getLogger(__name__)


class HeldOut:
    """The held-out loss of any parameters: compiled once, called as often as one likes."""

    def __init__(self, this: run.Run, strategy, examples: pipeline.Examples, tokens):
        model = transformer.Transformer(this.model, strategy.place_rows)
        text_bytes = tokens.piece_bytes(this.model.vocab_size)
        plain = steps.LossConfig(z_loss=0.0, smoothing=0.0)
        loss = steps.make_language_loss(model, plain, text_bytes)
        self._step = strategy.compile(functools.partial(steps.eval_step, loss=loss))
        self._strategy, self._examples = strategy, examples
        self._seed, self._limit = this.config["seed"], this.config["evaluate"]["examples"]

    def batches(self) -> Iterator:
        """The batches, whole, the same at every call and on every host."""
        return pipeline.heldout_batches(self._examples, self._seed, self._limit)

    def of(self, part: pipeline.Part) -> HeldOut:
        """The same of one task's examples alone, without compiling anew."""
        alone = copy.copy(self)
        alone._examples = pipeline.Examples((part,))
        return alone

    def sums(self, params, label: str = "", beat=lambda: None) -> dict[str, float]:
        """Sums over all held-out examples, each counted once; params as placed.

        Of several hosts each has its own rows. beat: called before each batch.
        """
        total = pipeline.heldout_count(self._examples, self._limit)
        bar = tqdm.tqdm(self.batches(), total=total, desc=label, disable=None, leave=bool(label))
        added: dict[str, float] = {}
        host, hosts = parallel.hosts()
        for rows in bar:
            beat()
            own = batch.Batch(*(column[host::hosts] for column in rows))
            sums = self._step(params, self._strategy.place_batch(own))
            for name, value in self._strategy.fetch_numbers(sums).items():
                added[name] = added.get(name, 0.0) + float(value)
        return added


def unigram_baselines(heldout: HeldOut, train_counts: np.ndarray, text_bytes: np.ndarray) -> dict:
    """What a model without context reaches on the very targets that are scored, in nats.

    unigram_nats: cross-entropy under the training split's frequencies, plus one each.
    unigram_entropy: the held-out targets' own entropy, below which no unigram model can be.
    Only ids that stand for text count: not eos, not sentinels.
    """
    size = len(text_bytes)
    found = np.zeros(size)
    for rows in heldout.batches():
        found += np.bincount(rows.targets[rows.targets_segment_ids > 0], minlength=size)
    text = text_bytes > 0
    found = found[text]
    known = np.pad(train_counts, (0, size - len(train_counts)))[text] + 1.0
    share = found / found.sum()
    present = share > 0
    return {
        "unigram_nats": float(-(share * np.log(known / known.sum())).sum()),
        "unigram_entropy": float(-(share[present] * np.log(share[present])).sum()),
    }


def open_checkpoints(this: run.Run, *, read_only: bool = False) -> checkpoints.Checkpoints:
    """The checkpoints of a run, kept as its config says."""
    kept = {key: this.config[key] for key in ("keep", "keep_every", "keep_best")}
    return checkpoints.Checkpoints(this.workdir / "checkpoints", read_only=read_only, **kept)


def read_params(
    this: run.Run, tokens, which: str | int = "newest", strategy=None
) -> tuple[dict, int]:
    """(parameters, step) of a good checkpoint of the run, which must be of these tokens.

    The average of weights, where the run keeps one. which: "newest", "best" (by keep_best), or an
    update's number. strategy: who will place them; under mesh no device then reads more than its
    part.
    """
    shapes = transformer.shapes(this.model)
    shapes = strategy.abstract(shapes) if strategy else shapes
    with open_checkpoints(this, read_only=True) as saved:
        params, facts = saved.restore_params(shapes, which)
    if facts["tokenizer"] != tokens.fingerprint:
        raise ValueError(
            f"{this.workdir} was trained with another tokenizer than {tokens.directory}; leave "
            f"--config.tokenizer.dir empty to use its own, or restore that from a copy."
        )
    return params, facts["step"]


def open_run(workdir, which: str | int = "newest"):
    """(run, strategy, its tokenizer, placed parameters, step), over whatever devices are here.

    The batch is made a multiple of the devices: a run may be read on another machine. which: as in
    read_params.
    """
    this = run.read_run(workdir)
    strategy = parallel.reading_strategy(this.parallel)
    rows = -(-this.data.batch_size // strategy.shards) * strategy.shards
    this = dataclasses.replace(this, data=dataclasses.replace(this.data, batch_size=rows))
    tokens = run.make_tokenizer(this)
    params, step = read_params(this, tokens, which, strategy)
    return this, strategy, tokens, strategy.place_state(params), step


class Answers:
    """Greedy answers of a run's model to input texts."""

    def __init__(self, this: run.Run, strategy, params, tokens):
        self._this, self._strategy, self._params, self._tokens = this, strategy, params, tokens
        self._step = strategy.compile(
            functools.partial(
                steps.decode_step,
                model=transformer.Transformer(this.model, strategy.place_rows),
                length=this.lengths[1],
                eos=tokens.eos,
            )
        )

    def __call__(self, texts: list[str]) -> list[str]:
        """The answer to each text, in order; inputs are cut to the model's input_length."""
        data, answers = self._this.data, []
        cut = sum(len(self._tokens.encode(text)) >= data.input_length for text in texts)
        if cut:
            logger.warning("%d of %d inputs cut to %d tokens", cut, len(texts), data.input_length)
        batches = pipeline.input_batches(texts, self._tokens, data.input_length, data.batch_size)
        total = -(-len(texts) // data.batch_size)
        for rows in tqdm.tqdm(batches, total=total, desc="decoding", unit="batch", disable=None):
            said = self._step(self._params, self._strategy.place_batch(rows))
            answers += [self._tokens.decode(row) for row in self._strategy.fetch_rows(said)]
        return answers[: len(texts)]


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


def score(this: run.Run, answer: Answers, name: str) -> tuple[dict[str, float], list[dict]]:
    """(scores of the model and the lead baseline in a task, {inputs, targets, prediction} rows)."""
    pairs = task_texts(this, name)
    answers = answer([pair["inputs"] for pair in pairs])
    references = [pair["targets"] for pair in pairs]
    words = round(np.mean([len(reference.split()) for reference in references]))
    task = tasks.task_named(name)
    leads = [metrics.lead(pair["inputs"].removeprefix(task.prefix), words) for pair in pairs]
    scores = {"examples": len(pairs)}
    for word in task.metrics:
        metric = choose.choose(metrics.METRICS, word, "the task's metric")
        scores |= metric(answers, references)
        scores |= {f"lead_{key}": value for key, value in metric(leads, references).items()}
    rows = [pair | {"prediction": answer} for pair, answer in zip(pairs, answers, strict=True)]
    return scores, rows


def _losses(heldout: HeldOut, params, train: pipeline.Examples, text_bytes, label: str) -> dict:
    sums = heldout.sums(params, label)
    figures = steps.ratios(sums) | {"tokens": int(sums["weight"])}
    return figures | unigram_baselines(heldout, train.frequencies, text_bytes)


def evaluate(workdir, which: str | int = "newest") -> dict:
    """Evaluate a checkpoint of a run on its held-out split; which: as in read_params.

    Writes evaluate.json and, for tasks of pairs, predictions.jsonl into the workdir. Of several
    tasks, the figures of each stand under its name, and those of all together above. What an
    earlier call wrote for the same checkpoint and limits is returned as it is.
    """
    this, strategy, tokens, params, step = open_run(workdir, which)
    path = this.workdir / "evaluate.json"
    made_of = {"step": step, "limits": this.config["evaluate"]}
    if path.exists() and (done := json.loads(path.read_text())) | made_of == done:
        return done
    train, examples = run.make_examples(this, tokens)
    heldout = HeldOut(this, strategy, examples, tokens)
    text_bytes = tokens.piece_bytes(this.model.vocab_size)
    label = f"held-out loss of {this.name}"
    figures = made_of | _losses(heldout, params, train, text_bytes, label)
    several, lines, answer = len(examples.parts) > 1, [], Answers(this, strategy, params, tokens)
    for part, learnt in zip(examples.parts, train.parts, strict=True):
        scores = {}
        if several:
            own, alone = pipeline.Examples((learnt,)), heldout.of(part)
            scores = _losses(alone, params, own, text_bytes, f"{label}: {part.name}")
        if tasks.task_named(part.name).pairs:
            judged, rows = score(this, answer, part.name)
            scores |= judged
            named = {"task": part.name} if several else {}
            lines += [json.dumps(named | row, ensure_ascii=False) + "\n" for row in rows]
        figures |= {"tasks": figures.get("tasks", {}) | {part.name: scores}} if several else scores
    if lines:
        logs.write_atomically(this.workdir / "predictions.jsonl", "".join(lines))
    chosen = "" if which == "newest" else f" --step={which}"
    figures["command"] = f"python -m lm evaluate --workdir={workdir}{chosen}"
    if not math.isfinite(figures["nats"]):
        raise ValueError(f"the held-out loss of {workdir} at update {step} is not finite.")
    logs.write_atomically(path, json.dumps(figures, indent=2) + "\n")
    return figures


def predict(workdir, texts: list[str], which: str | int = "newest") -> list[str]:
    """The answers of a checkpoint of a run to these inputs, in order; which: as in read_params."""
    this, strategy, tokens, params, _ = open_run(workdir, which)
    return Answers(this, strategy, params, tokens)(texts)
