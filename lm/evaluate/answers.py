"""Inputs to answers: a run's model decodes."""

from __future__ import annotations

import functools
import logging

import tqdm

from lm import pipeline, run, steps, transformer
from lm.evaluate import reading

logger = logging.getLogger(__name__)


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


def predict(workdir, texts: list[str], which: str | int = "newest") -> list[str]:
    """The answers of a checkpoint of a run to these inputs, in order; which: as in read_params."""
    this, strategy, tokens, params, _ = reading.open_run(workdir, which)
    return Answers(this, strategy, params, tokens)(texts)
