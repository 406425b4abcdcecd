"""The loss of held-out examples, and what a model without context would reach."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import numpy as np
import tqdm

from lm import batch, parallel, pipeline, run, steps, transformer


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
