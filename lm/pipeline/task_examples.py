"""Stored tokens to rows of a batch: what example number i of a split is."""

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
    """One task's split as rows: the examples of running text, or pairs, packed or not."""

    name: str
    directory: str
    manifest: dict = dataclasses.field(repr=False)
    data: config.DataConfig
    objective: objectives.ObjectiveConfig
    vocabulary: objectives.Vocabulary = dataclasses.field(repr=False)

    @functools.cached_property
    def stored(self) -> shards.Stream | shards.Pairs:
        """The shards, open."""
        kind = shards.Pairs if self.manifest["kind"] == "pairs" else shards.Stream
        return kind(self.directory, self.manifest)

    @functools.cached_property
    def raw(self) -> int:
        """Tokens of running text that make an example; 0 for pairs."""
        if self.manifest["kind"] == "pairs":
            return 0
        return objectives.lengths(self.objective, self.data.input_length).raw

    @functools.cached_property
    def packed(self) -> tuple[np.ndarray, np.ndarray] | None:
        """All pairs, row by row, and where each row begins and the last ends; None: not packed."""
        if self.raw or self.data.packing == "none":
            return None
        row_of = packing.first_fit(self.stored.lengths, self.data.lengths(self.objective))
        order = np.argsort(row_of, kind="stable")
        return order, np.searchsorted(row_of[order], np.arange(row_of.max() + 2))

    def __len__(self) -> int:
        if self.packed:
            return len(self.packed[1]) - 1
        return len(self.stored) // self.raw if self.raw else len(self.stored)

    def text(self, index: int) -> np.ndarray:
        """The stored text of an example: int32 [raw]."""
        return self.stored.read(index * self.raw, (index + 1) * self.raw).astype(np.int32)

    def row(self, index: int, rng: np.random.Generator) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """(inputs, targets) of a row's examples; running text is corrupted by the objective."""
        if self.raw:
            text = self.text(index)
            return (objectives.corrupt(self.objective, text, rng, self.vocabulary),)
        if not self.packed:
            return (self.stored[index],)
        pairs, starts = self.packed
        return (self.stored[pair] for pair in pairs[starts[index] : starts[index + 1]].tolist())


@dataclasses.dataclass(frozen=True)
class Examples:
    """A split of the mixture: the rows of all its parts, numbered through.

    damaged: the records met so far that cannot be read, and what is wrong with each.
    teacher_cache: what a teacher said of the rows of each batch, where that is cached.
    """

    parts: tuple[TaskSplit, ...]
    damaged: dict[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    teacher_cache: teacher_cache.TeacherCache | None = None

    @property
    def data(self) -> config.DataConfig:
        """The config that all parts have."""
        return self.parts[0].data

    @functools.cached_property
    def starts(self) -> list[int]:
        """The number of each part's first row, and of all rows."""
        return [0, *itertools.accumulate(len(part) for part in self.parts)]

    @functools.cached_property
    def columns(self) -> tuple[int, int]:
        """Columns of a batch's inputs and targets."""
        return self.data.lengths(self.parts[0].objective)

    @functools.cached_property
    def rates(self) -> list[int]:
        """How often each part is drawn, in hundredths of the rarest."""
        fixed = self.data.task_rates
        return config.mixing_rates(
            [len(part) for part in self.parts],
            [fixed[part.name] for part in self.parts],
            limit=self.data.max_examples_per_task,
            temperature=self.data.mixing_temperature,
        )

    @property
    def files(self) -> dict:
        """What identifies the stored tokens: the files of each task, by their bytes."""
        return {p.name: p.manifest["files"] | p.manifest["beside"] for p in self.parts}

    @property
    def facts(self) -> dict:
        """Of each task, what decided its tokens, and their number."""
        return {p.name: p.manifest["identity"] | p.manifest["counts"] for p in self.parts}

    @property
    def frequencies(self) -> np.ndarray:
        """How often each id is a target, the tasks weighed by their rates: float64 [ids]."""
        counts = [shards.load_array(p.directory, p.manifest, shards.COUNTS) for p in self.parts]
        shares = np.array(self.rates) / sum(self.rates)
        total = sum(count.sum() for count in counts)
        return sum(
            share * total * count / max(count.sum(), 1)
            for share, count in zip(shares, counts, strict=True)
        )

    def __len__(self) -> int:
        return self.starts[-1]

    def find(self, number: int) -> tuple[TaskSplit, int]:
        """The part that a row is of, and its number there."""
        part = bisect.bisect_right(self.starts, number) - 1
        return self.parts[part], number - self.starts[part]

    def batch(
        self,
        numbers: np.ndarray,
        addresses: np.ndarray,
        seed: int,
        damaged: dict[str, str] | None = None,
    ) -> batch.Batch:
        """The rows of these numbers, each masked by the generator of (seed, its address).

        damaged: takes up the damaged records among them, whose rows stay empty; without it, they
        raise ValueError.
        """
        shape = [(len(numbers), column) for column in np.repeat(self.columns, 2)]
        made = batch.Batch(*(np.zeros(size, np.int32) for size in shape))
        generators = _generators(seed, addresses.tolist())
        for place, (number, rng) in enumerate(zip(numbers.tolist(), generators, strict=True)):
            part, index = self.find(number)
            try:
                pairs = list(part.row(index, rng))
            except shards.DamagedRecord as error:
                if damaged is None:
                    raise
                damaged[error.record] = str(error)
                continue
            used = [0, 0]
            for segment, pair in enumerate(pairs, 1):
                for half, ids in enumerate(pair):
                    here = slice(used[half], used[half] + len(ids))
                    made[2 * half][place, here] = ids
                    made[2 * half + 1][place, here] = segment
                    used[half] = here.stop
        return made

    def leave_out(self, damaged: dict[str, str]) -> None:
        """Count these damaged records, each once, and say so.

        Raises ValueError, with the cure, where they are now more than data.max_bad_records.
        """
        most = self.data.max_bad_records
        for record, sentence in damaged.items():
            if record in self.damaged:
                continue
            self.damaged[record], count = sentence, len(self.damaged) + 1
            if count > most:
                wrong = sentence.removesuffix(".")
                raise ValueError(f"{wrong}, or set a data.max_bad_records above {most}.")
            print(f"left out ({count} of at most {most}): {sentence}", file=sys.stderr, flush=True)


def _generators(seed: int, addresses: Iterable[int]) -> Iterator[np.random.Generator]:
    """The generator of each address: one object whose key is set, which is quicker than many."""
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
    """Prepare the shards of a split of each task, or find them, and say how to read them.

    splits, directories: by task. Raises ValueError where a task has not one example.
    """
    parts = []
    for name, split in splits.items():
        out = directories[name]
        if tasks.is_corpus_dir(name):
            manifest = shards.read_split_manifest(name, split)
            shards.check_tokenizer(name, tokens)
        else:
            (task, named), form = data.reading(name, split), data.form(name)
            manifest = shards.prepare(task, named, data.tfds_dir, tokens, form, out)
        part = TaskSplit(name, str(out), manifest, data, objective, tokens.vocabulary)
        if not len(part):
            raise ValueError(
                f"{name} {split} ({manifest['counts']['tokens']} tokens) makes not one example of "
                f"{part.raw} tokens; use a wider split or a shorter data.input_length."
            )
        parts.append(part)
    return Examples(tuple(parts))
