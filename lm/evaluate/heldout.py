"""The loss of held-out examples, and of a unigram model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import jax
import numpy as np
import tqdm

from lm import batch, parallel, pipeline, runs, steps, transformer


class HeldOut:
    """Computes the held-out loss of parameters on the devices, with one compiled program."""

    def __init__(
        self, run: runs.Run, strategy: parallel.Strategy, examples: pipeline.Examples, tokens
    ):
        model = transformer.Transformer(run.model, strategy.shard_activations)
        text_bytes = tokens.piece_bytes(run.model.vocab_size)
        loss_config = steps.LossConfig(z_loss=0.0, label_smoothing=0.0)
        loss = steps.make_language_loss(model, loss_config, text_bytes)
        self._step = strategy.compile(functools.partial(steps.eval_step, loss=loss))
        row_sums = functools.partial(_row_sums, model=model, text_bytes=text_bytes)
        self._row_sums = strategy.compile(row_sums)
        self._strategy, self._examples = strategy, examples
        self._seed, self._limit = run.seed, run.evaluate.max_examples

    def batches(self) -> Iterator:
        """Yield global batches, the same at each call and on each host."""
        return pipeline.heldout_batches(self._examples, self._seed, self._limit)

    def for_task(self, split: pipeline.TaskSplit) -> HeldOut:
        """Copy for the examples of a task; shares the compiled programs."""
        task_loss = copy.copy(self)
        task_loss._examples = pipeline.Examples((split,))
        return task_loss

    def _placed(self, label: str, beat) -> Iterator:
        """Yield the batches on the devices; each host places its rows."""
        total = pipeline.num_heldout_batches(self._examples, self._limit)
        bar = tqdm.tqdm(self.batches(), total=total, desc=label, disable=None, leave=bool(label))
        for rows in bar:
            beat()
            yield self._strategy.place_batch(parallel.host_rows(rows))

    def sums(self, params, label: str = "", beat=lambda: None) -> dict[str, float]:
        """Sum the metrics of all held-out examples; beat: called before each batch."""
        totals: dict[str, float] = {}
        for rows in self._placed(label, beat):
            for name, value in self._strategy.fetch_numbers(self._step(params, rows)).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def by_example(self, params, label: str = "") -> dict[str, np.ndarray]:
        """Sum the metrics of each example, without the loss: {name: float64 [examples]}.

        Every host returns all examples, in order; rows without targets are dropped.
        """
        batches = []
        for rows in self._placed(label, lambda: None):
            sums = self._strategy.fetch_rows(self._row_sums(params, rows))
            batches.append(parallel.gather_rows(sums))
        totals = jax.tree.map(lambda *sums: np.concatenate(sums).astype(np.float64), *batches)
        return {name: sums[totals["weight"] > 0] for name, sums in totals.items()}


def _row_sums(params, examples: batch.Batch, *, model, text_bytes, axis=None) -> steps.Sums:
    """Compute steps.token_sums of each row of a batch: {name: float32 [B]}."""
    logits = steps.apply_model(model, params, examples, None)

    def token_sums(logits, row):
        row = jax.tree.map(lambda x: x[None], row)
        return steps.token_sums(logits[None], row, text_bytes)

    return jax.vmap(token_sums)(logits, examples)


def unigram_baselines(heldout: HeldOut, train_counts: np.ndarray, text_bytes: np.ndarray) -> dict:
    """Compute the loss of unigram models on the held-out targets, in nats per text token.

    Returns unigram_nats, the cross-entropy under the training counts plus one, and unigram_entropy,
    the entropy of the held-out targets and lowest loss of any unigram model. eos and sentinels are
    not counted.
    """
    size = len(text_bytes)
    counts = np.zeros(size)
    for rows in heldout.batches():
        counts += np.bincount(rows.targets[rows.targets_segment_ids > 0], minlength=size)
    is_text = text_bytes > 0
    counts = counts[is_text]
    smoothed = np.pad(train_counts, (0, size - len(train_counts)))[is_text] + 1.0
    frequencies = counts / counts.sum()
    positive = frequencies[frequencies > 0]
    return {
        "unigram_nats": float(-(frequencies * np.log(smoothed / smoothed.sum())).sum()),
        "unigram_entropy": float(-(positive * np.log(positive)).sum()),
    }
