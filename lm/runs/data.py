"""The tokenizer and the examples that a run makes, or finds."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib

from lm import pipeline, shards, sources, storage, tasks, tokenizer
from lm.runs import checks, workdir
from lm.runs.schema import Run
from lm.shards import finished_corpus


def splits(run: Run) -> tuple[dict[str, str], dict[str, str]]:
    """The splits to train on and to hold out, by task."""
    train, heldout = {}, {}
    for name in run.data.names:
        named = run.data.train_split, run.data.heldout_split
        if tasks.is_answers_file(run.data.train_split):
            run.data.reading(name, run.data.train_split)  # which says what cannot be answered
            named = run.data.train_split, _held_out(run, name)
        elif tasks.is_corpus_dir(name):
            for split in named:
                shards.read_split_manifest(name, split)
            if len({*named}) == 1:
                raise ValueError(
                    f"data.train_split and data.heldout_split of {name} are both {named[0]!r}; leave them at "
                    f"train and validation."
                )
        else:
            named = sources.resolve_splits(
                run.data.get_task(name).source, *named, run.data.tfds_dir
            )
        train[name], heldout[name] = named
    return train, heldout


def _held_out(run: Run, name: str) -> str:
    # What a task holds out where its training split is a file of answers to the rest.
    if run.data.heldout_split != sources.DEFAULT_HELDOUT:
        return run.data.heldout_split
    source = run.data.get_task(name).source
    return sources.resolve_splits(source, "train", run.data.heldout_split, run.data.tfds_dir)[1]


def check_columns(run: Run) -> None:
    """Raise ValueError where the first record of a split lacks a column that its task names."""
    for by_task in splits(run):
        for name, split in by_task.items():
            if not tasks.is_corpus_dir(name):
                task, split = run.data.reading(name, split)
                task.to_texts(sources.records(task.source, split, run.data.tfds_dir)[0])


def make_tokenizer(run: Run) -> tokenizer.Tokenizer:
    """The run's tokenizer; before the workdir is claimed, trained where there is none yet."""
    directory = checks.tokenizer_dir(run)
    named = directory.resolve() != (run.workdir / "tokenizer").resolve()
    if (directory / tokenizer.METADATA_FILE).exists() or named or workdir.is_claimed(run.workdir):
        return tokenizer.Tokenizer(directory)
    options = dict(run.config["tokenizer"])
    if options["kind"] == "bytes":
        return tokenizer.write_byte_tokenizer(directory, options["num_extra_ids"])
    texts = Texts(run, splits(run)[0], options["max_documents"])
    chosen = {key: options[key] for key in checks.TOKENIZER_KEYS}
    return tokenizer.train(texts, directory, **chosen)


class Texts:
    """The texts of the first `most` records, as many of each task; with a length, so that reading
    shows an ETA.

    splits: by task. Raises ValueError, with the cure, where a dataset is absent.
    """

    def __init__(self, run: Run, splits: dict[str, str], most: int):
        self.found = [_texts_of(run, name, split) for name, split in splits.items()]
        self.most = -(-most // len(splits))

    def __len__(self) -> int:
        return sum(min(self.most, count) for count, _ in self.found)

    def __iter__(self):
        for _, records in self.found:
            for text in itertools.islice(records(), self.most):
                yield from text


def _texts_of(run: Run, name: str, split: str):
    """(records of a task's split, a function to the texts of each of them, one after the other)."""
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
    """(training examples, held-out examples), their shards prepared where they are not yet.

    Those of a bucket are read from copies on this machine's disk, and prepared there first.
    """
    train, heldout = splits(run)
    return _examples(run, run.data, tokens, "train", train), make_split(run, tokens, heldout)


def make_split(
    run: Run, tokens: tokenizer.Tokenizer, by_task: dict[str, str], folder: str = "heldout"
) -> pipeline.Examples:
    """The examples of any split of each task, to be measured: each counts by itself.

    folder: of its shards.
    """
    whole = dataclasses.replace(run.data, packing="none")
    return _examples(run, whole, tokens, folder, by_task)


def _examples(run: Run, data, tokens, folder: str, by_task: dict[str, str]) -> pipeline.Examples:
    lying = shards_of(run, folder, by_task)
    on_disk = {task: storage.local_copy(at, shards.MANIFEST) for task, at in lying.items()}
    made = pipeline.make_examples(data, run.objective, tokens, by_task, on_disk)
    for task, at in lying.items():
        if storage.is_remote(at):
            storage.copy_dir(on_disk[task], at, shards.MANIFEST)
    return made


def shards_of(run: Run, name: str, splits: dict[str, str]) -> dict[str, pathlib.Path]:
    """Where the shards of a split lie, by task: a corpus's own, or in data.shards_dir.

    name: of the folder, as "train" or "heldout".
    """
    shards, found = run.place("data.shards_dir", "shards"), {}
    for task, split in splits.items():
        if tasks.is_corpus_dir(task):
            found[task] = storage.as_path(task).expanduser() / split
        else:
            found[task] = shards / task / name if len(splits) > 1 else shards / name
    return found
