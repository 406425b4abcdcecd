"""The tokenizer and the examples of a run, which are prepared if they do not exist."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from lm import pipeline, shards, sources, storage, tasks, tokenizer
from lm.runs import checks, workdir
from lm.runs.schema import Run
from lm.shards import finished_corpus


def splits(run: Run) -> tuple[dict[str, str], dict[str, str]]:
    """Return the training split and the held-out split of each task.

    Raises ValueError if a split does not exist or both share examples.
    """
    data, train, heldout = run.data, {}, {}
    for name in data.names:
        pair, source = (data.train_split, data.heldout_split), data.get_task(name).source
        if tasks.is_answers_file(data.train_split):  # replaces the training split only
            data.task_and_split(name, data.train_split)  # raises for running text
            if data.heldout_split == sources.DEFAULT_HELDOUT:
                resolved = sources.resolve_splits(source, "train", pair[1], data.tfds_dir)
                pair = data.train_split, resolved[1]
        elif tasks.is_corpus_dir(name):
            for split in pair:
                shards.read_split_manifest(name, split)
            if pair[0] == pair[1]:
                raise ValueError(
                    f"data.train_split and data.heldout_split of {name} are both {pair[0]!r}; "
                    f"leave them at train and validation."
                )
        else:
            pair = sources.resolve_splits(source, *pair, data.tfds_dir)
        train[name], heldout[name] = pair
    return train, heldout


def check_columns(run: Run) -> None:
    """Raise ValueError if the first record of a split lacks a column that its task reads."""
    for by_task in splits(run):
        for name, split in by_task.items():
            if not tasks.is_corpus_dir(name):
                task, split = run.data.task_and_split(name, split)
                task.to_texts(sources.records(task.source, split, run.data.tfds_dir)[0])


def make_tokenizer(run: Run) -> tokenizer.Tokenizer:
    """Read the run's tokenizer, or train it in an unclaimed workdir that has none."""
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
    """An iterable of the texts of the first records of each task's split.

    max_records: total over all tasks. len() counts records, for the ETA of a reader.
    Raises ValueError if a dataset is missing.
    """

    def __init__(self, run: Run, splits: dict[str, str], max_records: int):
        self._tasks = [_read_texts(run, name, split) for name, split in splits.items()]
        self._max_records = -(-max_records // len(splits))  # per task

    def __len__(self) -> int:
        return sum(min(self._max_records, count) for count, _ in self._tasks)

    def __iter__(self) -> Iterator[str]:
        for _, records in self._tasks:
            for texts in itertools.islice(records(), self._max_records):
                yield from texts


def _read_texts(run: Run, name: str, split: str) -> tuple[int, Callable[[], Iterator]]:
    """Return the number of records of a split, and a function that iterates over their texts."""
    if tasks.is_corpus_dir(name):
        count = shards.read_split_manifest(name, split)["counts"]["documents"]
        files = finished_corpus.list_files(str(storage.as_path(name).expanduser()), split)
        return count, lambda: ((f.document(raw).text,) for f in files for raw in f.raw_records())
    task, split = run.data.task_and_split(name, split)
    records = sources.records(task.source, split, run.data.tfds_dir)
    fields = ("inputs", "targets") if task.has_inputs else ("text",)
    return len(records), lambda: (
        [text[field] for text in task.to_texts(records[i]) for field in fields]
        for i in range(len(records))
    )


def make_examples(
    run: Run, tokens: tokenizer.Tokenizer
) -> tuple[pipeline.Examples, pipeline.Examples]:
    """Return (training examples, held-out examples); prepares missing shards."""
    train, heldout = splits(run)
    examples = _prepare_examples(run, run.data, tokens, train, "train")
    return examples, make_split(run, tokens, heldout)


def make_split(
    run: Run, tokens: tokenizer.Tokenizer, splits: dict[str, str], folder: str = "heldout"
) -> pipeline.Examples:
    """Return the unpacked examples of one split of each task; prepares missing shards.

    folder: the name of their directories in data.shards_dir.
    """
    unpacked = dataclasses.replace(run.data, packing="none")
    return _prepare_examples(run, unpacked, tokens, splits, folder)


def _prepare_examples(
    run: Run,
    data: pipeline.DataConfig,
    tokens: tokenizer.Tokenizer,
    splits: dict[str, str],
    folder: str,
) -> pipeline.Examples:
    # Shards in a bucket are prepared on, and read from, the local disk.
    directories = {}
    for task, split in splits.items():
        if tasks.is_corpus_dir(task):
            directories[task] = storage.as_path(task).expanduser() / split
        else:
            parent = run.shards_dir / task if len(splits) > 1 else run.shards_dir
            directories[task] = parent / folder
    copies = {task: storage.local_copy(at, shards.MANIFEST) for task, at in directories.items()}
    examples = pipeline.make_examples(data, run.objective, tokens, splits, copies)
    for task, directory in directories.items():
        if storage.is_remote(directory):
            storage.copy_dir(copies[task], directory, shards.MANIFEST)
    return examples
