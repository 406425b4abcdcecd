"""The loss of held-out examples, and what a model without context would reach."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import jax
import numpy as np
import tqdm

from lm import batch, parallel, pipeline, runs, steps, transformer


class HeldOut:
    """The held-out loss of any parameters: compiled once, called as often as one likes."""

    def __init__(self, run: runs.Run, strategy, examples: pipeline.Examples, tokens):
        model = transformer.Transformer(run.model, strategy.shard_activations)
        text_bytes = tokens.piece_bytes(run.model.vocab_size)
        plain = steps.LossConfig(z_loss=0.0, label_smoothing=0.0)
        loss = steps.make_language_loss(model, plain, text_bytes)
        self._step = strategy.compile(functools.partial(steps.eval_step, loss=loss))
        self._by_row = strategy.compile(
            functools.partial(row_sums, model=model, text_bytes=text_bytes)
        )
        self._strategy, self._examples = strategy, examples
        self._seed, self._limit = run.seed, run.evaluate.max_examples

    def batches(self) -> Iterator:
        """The batches, whole, the same at every call and on every host."""
        return pipeline.heldout_batches(self._examples, self._seed, self._limit)

    def of(self, part: pipeline.TaskSplit) -> HeldOut:
        """The same of one task's examples alone, without compiling anew."""
        alone = copy.copy(self)
        alone._examples = pipeline.Examples((part,))
        return alone

    def _placed(self, label: str, beat) -> Iterator:
        """The batches as they lie on the devices; of several hosts each has its own rows."""
        total = pipeline.num_heldout_batches(self._examples, self._limit)
        bar = tqdm.tqdm(self.batches(), total=total, desc=label, disable=None, leave=bool(label))
        for rows in bar:
            beat()
            yield self._strategy.place_batch(parallel.host_rows(rows))

    def sums(self, params, label: str = "", beat=lambda: None) -> dict[str, float]:
        """Sums over all held-out examples, each counted once; params as placed.

        beat: called before each batch.
        """
        added: dict[str, float] = {}
        for rows in self._placed(label, beat):
            for name, value in self._strategy.fetch_numbers(self._step(params, rows)).items():
                added[name] = added.get(name, 0.0) + float(value)
        return added

    def by_example(self, params, label: str = "") -> dict[str, np.ndarray]:
        """The same sums of each example by itself, but the loss: {name: float64 [examples]}.

        In order, and on every host those of all; rows without a target are no examples.
        """
        found = []
        for rows in self._placed(label, lambda: None):
            own = self._strategy.fetch_rows(self._by_row(params, rows))
            found.append(parallel.gather_rows(own))
        whole = jax.tree.map(lambda *parts: np.concatenate(parts).astype(np.float64), *found)
        return {name: sums[whole["weight"] > 0] for name, sums in whole.items()}


def row_sums(params, examples: batch.Batch, *, model, text_bytes, axis=None) -> steps.Sums:
    """What steps.token_sums gives of each row of a batch by itself: {name: float32 [B]}."""
    logits = steps.apply_model(model, params, examples, None)

    def measured(logits, row):
        alone = jax.tree.map(lambda x: x[None], row)
        return steps.token_sums(logits[None], alone, text_bytes)

    return jax.vmap(measured)(logits, examples)


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
