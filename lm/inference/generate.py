"""Inputs to answers: a run's model decodes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from lm import decoding, parallel, pipeline, runs, steps, tasks, transformer

PLAIN = tasks.Task("")  # what is too long loses its end


class Answer(NamedTuple):
    """What is said to an input, n_best of it, and whether the input had to be cut to fit."""

    texts: list[str]
    scores: list[float]
    cut: bool


class Generator:
    """A run's model, asked: one program for a bucket of lengths, compiled once.

    rows: inputs decoded at once, by default the run's batch; a multiple of strategy.shards. seed:
    of what is sampled.
    """

    def __init__(
        self,
        run: runs.Run,
        strategy,
        params,
        tokens,
        how: decoding.DecodingConfig,
        *,
        seed=0,
        rows=0,
    ):
        self._strategy, self._params, self._tokens = strategy, params, tokens
        self._most, self._rows = run.data.input_length, rows or run.data.batch_size
        self._seed = seed
        self._step = strategy.compile(
            functools.partial(
                steps.decode_step,
                model=transformer.Transformer(run.model, strategy.shard_activations),
                length=run.lengths[1],
                eos=tokens.eos,
                how=how,
            )
        )

    def of(self, params) -> Generator:
        """The same of other placed parameters, without compiling anew."""
        other = copy.copy(self)
        other._params = params
        return other

    def __call__(
        self,
        texts: Sequence[str],
        task: tasks.Task = PLAIN,
        *,
        first: int = 0,
        beat: Callable[[], None] = lambda: None,
    ) -> list[Answer]:
        """The answer to each text, in order, whatever it is asked together with.

        task: says what stays of an input that is too long. first: the number of the first text
        among all that are asked: what is sampled follows from the seed and a text's number alone.
        beat: called after each batch. Several hosts are given the same texts and return them all.
        """
        fitted = [tasks.truncate_input(task, text, self._most, self._tokens) for text in texts]
        asked = [ids for ids, _ in fitted]
        options = {"desc": "decoding", "unit": "input", "disable": None, "leave": False}
        with tqdm.tqdm(total=len(texts), **options) as bar:

            def tick(count: int) -> None:
                bar.update(count)
                beat()

            said = self.ask(asked, first, tick)
        return [Answer(*found, cut) for found, (_, cut) in zip(said, fitted, strict=True)]

    def ask(
        self, asked: Sequence[np.ndarray], first: int = 0, tick: Callable[[int], None] = lambda _: 0
    ) -> list[tuple[list[str], list[float]]]:
        """(texts, scores) for each input, given by its ids as tasks.fitted makes them.

        tick: called after each batch with the number of inputs that it answered.
        """
        found = self.hypotheses(asked, first, tick)
        return [([self._tokens.decode(row) for row in ids], s.tolist()) for ids, s in found]

    def hypotheses(
        self, asked: Sequence[np.ndarray], first: int = 0, tick: Callable[[int], None] = lambda _: 0
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The same as ids: (int32 [n, T], pad after eos, float32 [n]) for each input."""
        said: list = [None] * len(asked)
        for numbers, rows in pipeline.input_batches(asked, self._rows, self._most):
            addresses = np.zeros((self._rows, 2), np.int32)
            addresses[: len(numbers)] = [(self._seed, first + number) for number in numbers]
            own, addresses = parallel.host_rows((rows, addresses))
            place = self._strategy.place_batch
            found = self._step(self._params, place(own), place(addresses))
            found = parallel.gather_rows(self._strategy.fetch_rows(found))
            for number, ids, scores in zip(numbers, found.ids, found.scores, strict=False):
                kept = max(1, int(np.sum(scores > -np.inf)))  # beams may find fewer than n_best
                said[number] = ids[:kept], scores[:kept]
            tick(len(numbers))
        return said
