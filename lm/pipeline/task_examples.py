"""Stored tokens to rows of a batch: example i of a split."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from lm import batch, objectives, shards, tasks, tokenizer
from lm.pipeline import config, packing, teacher_cache


@dataclasses.dataclass(frozen=True)
class TaskSplit:
    """One task's split as rows: windows of running text, or pairs, packed or not."""

    name: str
    directory: str
    manifest: dict = dataclasses.field(repr=False)
    data: config.DataConfig
    objective: objectives.ObjectiveConfig
    vocabulary: objectives.Vocabulary = dataclasses.field(repr=False)

    @property
    def is_text(self) -> bool:
        """Whether the split is running text, not pairs."""
        return self.manifest["kind"] != "pairs"

    @functools.cached_property
    def stored(self) -> shards.Stream | shards.Pairs:
        """The open shards."""
        kind = shards.Stream if self.is_text else shards.Pairs
        return kind(self.directory, self.manifest)

    @functools.cached_property
    def window(self) -> int:
        """The tokens of running text in an example."""
        return objectives.lengths(self.objective, self.data.input_length).raw

    @functools.cached_property
    def packed(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(all pairs row by row, where each row starts and the last one ends), if packed."""
        if self.is_text or self.data.packing == "none":
            return None
        row_of = packing.first_fit(self.stored.lengths, self.data.lengths(self.objective))
        order = np.argsort(row_of, kind="stable")
        return order, np.searchsorted(row_of[order], np.arange(row_of.max() + 2))

    def __len__(self) -> int:
        if self.packed:
            return len(self.packed[1]) - 1
        return len(self.stored) // self.window if self.is_text else len(self.stored)

    def text(self, index: int) -> np.ndarray:
        """The stored text of an example: int32 [window]."""
        return self.stored.read(index * self.window, (index + 1) * self.window).astype(np.int32)

    def row(self, index: int, rng: np.random.Generator) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """(inputs, targets) of each example in a row; the objective corrupts running text."""
        if self.is_text:
            text = self.text(index)
            return (objectives.corrupt(self.objective, text, rng, self.vocabulary),)
        if not self.packed:
            return (self.stored[index],)
        pairs, starts = self.packed
        return (self.stored[pair] for pair in pairs[starts[index] : starts[index + 1]].tolist())


@dataclasses.dataclass(frozen=True)
class Examples:
    """A split of the mixture: the rows of all its tasks, numbered consecutively.

    damaged: unreadable records so far -> the damage. teacher_cache: of the rows of each batch.
    """

    splits: tuple[TaskSplit, ...]
    damaged: dict[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    teacher_cache: teacher_cache.TeacherCache | None = None

    @property
    def data(self) -> config.DataConfig:
        """The config of all splits."""
        return self.splits[0].data

    @functools.cached_property
    def starts(self) -> list[int]:
        """The number of each split's first row, and the total."""
        return [0, *itertools.accumulate(len(split) for split in self.splits)]

    @functools.cached_property
    def columns(self) -> tuple[int, int]:
        """Columns of a batch's inputs and targets."""
        return self.data.lengths(self.splits[0].objective)

    @functools.cached_property
    def rates(self) -> list[int]:
        """How often each task occurs, in hundredths of the rarest."""
        fixed = self.data.task_rates
        return config.mixing_rates(
            [len(split) for split in self.splits],
            [fixed[split.name] for split in self.splits],
            limit=self.data.max_examples_per_task,
            temperature=self.data.mixing_temperature,
        )

    @property
    def files(self) -> dict:
        """Task -> its files with their hashes: the identity of the stored tokens."""
        return {s.name: s.manifest["files"] | s.manifest["beside"] for s in self.splits}

    @property
    def facts(self) -> dict:
        """Task -> what decided its tokens, and their number."""
        return {s.name: s.manifest["identity"] | s.manifest["counts"] for s in self.splits}

    @property
    def frequencies(self) -> np.ndarray:
        """How often each id is a target, tasks weighted by their rates: float64 [ids]."""
        counts = [shards.load_array(s.directory, s.manifest, shards.COUNTS) for s in self.splits]
        shares = np.array(self.rates) / sum(self.rates)
        total = sum(count.sum() for count in counts)
        return sum(
            share * total * count / max(count.sum(), 1)
            for share, count in zip(shares, counts, strict=True)
        )

    def __len__(self) -> int:
        return self.starts[-1]

    def locate(self, number: int) -> tuple[TaskSplit, int]:
        """The split that contains a row, and the row's index in it."""
        index = bisect.bisect_right(self.starts, number) - 1
        return self.splits[index], number - self.starts[index]

    def batch(
        self,
        numbers: np.ndarray,
        addresses: np.ndarray,
        seed: int,
        damaged: dict[str, str] | None = None,
    ) -> batch.Batch:
        """The rows of these numbers, each masked by the generator of (seed, its address).

        damaged: collects damaged records, whose rows stay empty; without it they raise ValueError.
        """
        shape = [(len(numbers), column) for column in np.repeat(self.columns, 2)]
        rows = batch.Batch(*(np.zeros(size, np.int32) for size in shape))
        generators = _generators(seed, addresses.tolist())
        for row, (number, rng) in enumerate(zip(numbers.tolist(), generators, strict=True)):
            split, index = self.locate(number)
            try:
                pairs = list(split.row(index, rng))
            except shards.DamagedRecord as error:
                if damaged is None:
                    raise
                damaged[error.record] = str(error)
                continue
            ends = [0, 0]  # of inputs and targets so far
            for segment, pair in enumerate(pairs, 1):
                for side, ids in enumerate(pair):
                    span = slice(ends[side], ends[side] + len(ids))
                    rows[2 * side][row, span] = ids
                    rows[2 * side + 1][row, span] = segment
                    ends[side] = span.stop
        return rows

    def count_damaged(self, damaged: dict[str, str]) -> None:
        """Count and print damaged records, each once.

        Raises ValueError, with the fix, for more than data.max_bad_records.
        """
        limit = self.data.max_bad_records
        for record, message in damaged.items():
            if record in self.damaged:
                continue
            self.damaged[record], count = message, len(self.damaged) + 1
            if count > limit:
                cause = message.removesuffix(".")
                raise ValueError(f"{cause}, or set a data.max_bad_records above {limit}.")
            print(f"left out ({count} of at most {limit}): {message}", file=sys.stderr, flush=True)


def _generators(seed: int, addresses: Iterable[int]) -> Iterator[np.random.Generator]:
    """The generator of each address; one object is re-keyed, which is faster than creating many."""
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64))
    fresh, generator = bits.state, np.random.Generator(bits)
    for address in addresses:
        fresh["state"]["key"][1] = address
        bits.state = fresh
        yield generator


def make_examples(
    data: config.DataConfig,
    objective: objectives.ObjectiveConfig,
    tokens: tokenizer.Tokenizer,
    splits: dict[str, str],
    directories: dict[str, pathlib.Path],
) -> Examples:
    """Prepare the shards of a split of each task, unless they exist, as examples.

    splits, directories: by task. Raises ValueError for a task without an example.
    """
    task_splits = []
    for name, split in splits.items():
        if tasks.is_corpus_dir(name):
            manifest = shards.read_split_manifest(name, split)
            shards.check_tokenizer(name, tokens)
        else:
            task, source_split = data.task_and_split(name, split)
            arguments = (data.tfds_dir, tokens, data.pair_lengths(name), directories[name])
            manifest = shards.prepare(task, source_split, *arguments)
        directory = str(directories[name])
        task_split = TaskSplit(name, directory, manifest, data, objective, tokens.vocabulary)
        if not len(task_split):
            raise ValueError(
                f"{name} {split} ({manifest['counts']['tokens']} tokens) makes not one example of "
                f"{task_split.window} tokens; use a wider split or a shorter data.input_length."
            )
        task_splits.append(task_split)
    return Examples(tuple(task_splits))
