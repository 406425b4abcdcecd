"""Generate answers to texts in batches, with one compiled program for each bucket of lengths."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from lm import decoding, parallel, pipeline, runs, steps, tasks, transformer

PLAIN = tasks.Task("")  # truncates an input at its end


class Answer(NamedTuple):
    """The answers to one input, best first, their scores, and whether the input was truncated."""

    texts: list[str]
    scores: list[float]
    is_truncated: bool


class Generator:
    """Generates with a run's model.

    Args:
      params: parameters on the devices.
      config: how to decode.
      seed: for sampling.
      rows: inputs decoded at once, a multiple of strategy.shards; 0: the run's batch size.
    """

    def __init__(
        self,
        run: runs.Run,
        strategy,
        params,
        tokens,
        config: decoding.DecodingConfig,
        *,
        seed: int = 0,
        rows: int = 0,
    ):
        self._strategy, self._params, self._tokens = strategy, params, tokens
        self._input_length = run.data.input_length
        self._rows, self._seed = rows or run.data.batch_size, seed
        step = functools.partial(
            steps.decode_step,
            model=transformer.Transformer(run.model, strategy.shard_activations),
            length=run.lengths[1],
            eos=tokens.eos,
            config=config,
        )
        self._step = strategy.compile(step)

    def with_params(self, params) -> Generator:
        """Copy with other parameters; shares the compiled programs."""
        generator = copy.copy(self)
        generator._params = params
        return generator

    def __call__(
        self,
        texts: Sequence[str],
        task: tasks.Task = PLAIN,
        *,
        first: int = 0,
        beat: Callable[[], None] = lambda: None,
    ) -> list[Answer]:
        """Answer texts, in order; an answer does not depend on the other texts.

        Args:
          task: decides which end of a long input is dropped.
          first: number of the first text; sampling depends on the seed and a text's number alone.
          beat: called after each batch.

        With several hosts, all pass the same texts and get all answers.
        """
        length, tokens = self._input_length, self._tokens
        inputs = [tasks.truncate_input(task, text, length, tokens) for text in texts]
        options = {"desc": "decoding", "unit": "input", "disable": None, "leave": False}
        with tqdm.tqdm(total=len(texts), **options) as bar:

            def on_batch(count: int) -> None:
                bar.update(count)
                beat()

            answers = self.generate([ids for ids, _ in inputs], first, on_batch)
        return [Answer(*answer, cut) for answer, (_, cut) in zip(answers, inputs, strict=True)]

    def generate(
        self,
        inputs: Sequence[np.ndarray],
        first: int = 0,
        on_batch: Callable[[int], object] = lambda count: None,
    ) -> list[tuple[list[str], list[float]]]:
        """Return (texts, scores) for each input; arguments as in generate_ids."""
        answers = self.generate_ids(inputs, first, on_batch)
        return [
            ([self._tokens.decode(row) for row in ids], scores.tolist()) for ids, scores in answers
        ]

    def generate_ids(
        self,
        inputs: Sequence[np.ndarray],
        first: int = 0,
        on_batch: Callable[[int], object] = lambda count: None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (int32 [n, T] ids, padding after eos; float32 [n] scores) for each input.

        Args:
          inputs: ids from tasks.truncate_input.
          first: number of the first input.
          on_batch: called after each batch with the number of inputs in it.
        """
        answers: list = [None] * len(inputs)
        for numbers, rows in pipeline.input_batches(inputs, self._rows, self._input_length):
            addresses = np.zeros((self._rows, 2), np.int32)
            addresses[: len(numbers)] = [(self._seed, first + number) for number in numbers]
            rows, addresses = map(self._strategy.place_batch, parallel.host_rows((rows, addresses)))
            output = self._step(self._params, rows, addresses)
            output = parallel.gather_rows(self._strategy.fetch_rows(output))
            for number, ids, scores in zip(numbers, output.ids, output.scores, strict=False):
                count = max(1, int(np.sum(scores > -np.inf)))  # beams may return fewer answers
                answers[number] = ids[:count], scores[:count]
            on_batch(len(numbers))
        return answers
