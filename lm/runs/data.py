"""The tokenizer and the examples of a run: found, or made."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator

from lm import pipeline, shards, sources, storage, tasks, tokenizer
from lm.runs import checks, workdir
from lm.runs.schema import Run
from lm.shards import finished_corpus


def splits(run: Run) -> tuple[dict[str, str], dict[str, str]]:
    """Return the training split and the held-out split of each task."""
    data = run.data
    train, heldout = {}, {}
    for name in data.names:
        pair = data.train_split, data.heldout_split
        if tasks.is_answers_file(data.train_split):
            data.reading(name, data.train_split)  # raises for running text
            pair = data.train_split, _heldout_of_source(run, name)
        elif tasks.is_corpus_dir(name):
            for split in pair:
                shards.read_split_manifest(name, split)
            if pair[0] == pair[1]:
                raise ValueError(
                    f"data.train_split and data.heldout_split of {name} are both {pair[0]!r}; "
                    f"leave them at train and validation."
                )
        else:
            pair = sources.resolve_splits(data.get_task(name).source, *pair, data.tfds_dir)
        train[name], heldout[name] = pair
    return train, heldout


def _heldout_of_source(run: Run, name: str) -> str:
    # A file of answers replaces the training split alone.
    data = run.data
    if data.heldout_split != sources.DEFAULT_HELDOUT:
        return data.heldout_split
    source = data.get_task(name).source
    return sources.resolve_splits(source, "train", data.heldout_split, data.tfds_dir)[1]


def check_columns(run: Run) -> None:
    """Raise ValueError if the first record of a split lacks a column that its task names."""
    for by_task in splits(run):
        for name, split in by_task.items():
            if not tasks.is_corpus_dir(name):
                task, split = run.data.reading(name, split)
                task.to_texts(sources.records(task.source, split, run.data.tfds_dir)[0])


def make_tokenizer(run: Run) -> tokenizer.Tokenizer:
    """Read the run's tokenizer, or train it if the workdir is unclaimed and has none."""
    directory, config = checks.tokenizer_dir(run), run.tokenizer
    is_own = directory.resolve() == (run.workdir / "tokenizer").resolve()
    exists = (directory / tokenizer.METADATA_FILE).exists()
    if exists or not is_own or workdir.is_claimed(run.workdir):
        return tokenizer.Tokenizer(directory)
    if config.kind == "bytes":
        return tokenizer.write_byte_tokenizer(directory, config.num_extra_ids)
    texts = Texts(run, splits(run)[0], config.max_documents)
    return tokenizer.train(texts, directory, **config.options)


class Texts:
    """The texts of the first records of each task's split.

    Its length is the number of records, so that reading shows an ETA. max_records: of all tasks
    together. Raises ValueError if a dataset is missing.
    """

    def __init__(self, run: Run, splits: dict[str, str], max_records: int):
        self.tasks = [_read_texts(run, name, split) for name, split in splits.items()]
        self.max_records = -(-max_records // len(splits))

    def __len__(self) -> int:
        return sum(min(self.max_records, count) for count, _ in self.tasks)

    def __iter__(self) -> Iterator[str]:
        for _, records in self.tasks:
            for texts in itertools.islice(records(), self.max_records):
                yield from texts


def _read_texts(run: Run, name: str, split: str) -> tuple[int, Callable[[], Iterator]]:
    """Return the number of a split's records, and a function to the texts of each."""
    if tasks.is_corpus_dir(name):
        manifest, directory = (
            shards.read_split_manifest(name, split),
            storage.as_path(name).expanduser(),
        )
        parts = finished_corpus.list_files(str(directory), split)
        documents = lambda: itertools.chain.from_iterable(
            ((part.document(raw).text,) for raw in part.raw_records()) for part in parts
        )
        return manifest["counts"]["documents"], documents
    task, split = run.data.reading(name, split)
    records = sources.records(task.source, split, run.data.tfds_dir)
    fields = ("inputs", "targets") if task.pairs else ("text",)
    return len(records), lambda: (
        [text[field] for text in task.to_texts(records[i]) for field in fields]
        for i in range(len(records))
    )


def make_examples(run: Run, tokens: tokenizer.Tokenizer) -> tuple[pipeline.Examples, ...]:
    """Return (training examples, held-out examples), and prepare missing shards.

    Shards in a bucket are prepared on, and read from, this machine's disk.
    """
    train, heldout = splits(run)
    return _examples(run, run.data, tokens, "train", train), make_split(run, tokens, heldout)


def make_split(
    run: Run, tokens: tokenizer.Tokenizer, by_task: dict[str, str], folder: str = "heldout"
) -> pipeline.Examples:
    """Return the unpacked examples of any split of each task. folder: of its shards."""
    unpacked = dataclasses.replace(run.data, packing="none")
    return _examples(run, unpacked, tokens, folder, by_task)


def _examples(
    run: Run,
    data: pipeline.DataConfig,
    tokens: tokenizer.Tokenizer,
    folder: str,
    by_task: dict[str, str],
) -> pipeline.Examples:
    directories = shard_dirs(run, folder, by_task)
    copies = {task: storage.local_copy(at, shards.MANIFEST) for task, at in directories.items()}
    examples = pipeline.make_examples(data, run.objective, tokens, by_task, copies)
    for task, directory in directories.items():
        if storage.is_remote(directory):
            storage.copy_dir(copies[task], directory, shards.MANIFEST)
    return examples


def shard_dirs(run: Run, folder: str, splits: dict[str, str]) -> dict[str, pathlib.Path]:
    """Return the directory of each task's shards: a corpus's own, or in data.shards_dir.

    folder: "train" or "heldout".
    """
    directories = {}
    for task, split in splits.items():
        if tasks.is_corpus_dir(task):
            directories[task] = storage.as_path(task).expanduser() / split
        else:
            parent = run.shards_dir / task if len(splits) > 1 else run.shards_dir
            directories[task] = parent / folder
    return directories
