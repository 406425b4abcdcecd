"""Encode the records of a task to token shards, in parallel and atomically."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tqdm

from lm import sources, tasks, tokenizer
from lm.shards import processes, shard_files

SHARD_TOKENS = 1 << 27  # tokens per file of text
SHARD_EXAMPLES = 1 << 16  # pairs per file
BATCH_DOCUMENTS = 64  # per item of a worker process
SERIAL_DOCUMENTS = 2000  # encoded faster than worker processes start


@dataclasses.dataclass(frozen=True)
class PairLengths:
    """The tokens that inputs and targets are truncated to."""

    inputs: int
    targets: int


def prepare(
    task: tasks.Task,
    split: str,
    data_dir: str,
    tokens: tokenizer.Tokenizer,
    lengths: PairLengths | None,
    out: str | pathlib.Path,
) -> dict:
    """Write the shards of a split to `out`, unless they exist; returns the manifest.

    lengths: of pairs; None for running text, which is not truncated.
    Raises ValueError if `out` was built from another task, split, tokenizer or lengths, and for
    records without the task's columns.
    """
    out = pathlib.Path(out)
    task_fields = {key: getattr(task, key) for key in ("source", "inputs", "targets", "turns")}
    identity = {
        "task": task_fields | {"labels": list(task.labels)},
        "split": split,
        "tokenizer": tokens.fingerprint,
        "form": dataclasses.asdict(lengths) if lengths else {"record": shard_files.RECORD_TOKENS},
        "dataset": sources.source_fingerprint(task.source, split, data_dir),
    }

    def write(staging_dir: pathlib.Path) -> dict:
        records = sources.records(task.source, split, data_dir)
        counts = {"records": len(records), "dropped": 0}
        texts = _texts(task, records, counts, f"encoding {split} of {task.source}")
        items, separator = _encode(texts, task, lengths, tokens), tokens.encode("\n\n")
        write_text = lambda path, ids: shard_files.write_text(path, ids, separator, tokens.size)
        write_pairs = lambda path, pairs: shard_files.write_pairs(path, pairs, tokens.size)
        if task.has_inputs:
            counts |= {"truncated": 0, "inputs_cut": 0}
            pairs = _count_truncated(items, counts)
            files = _write_files(staging_dir, pairs, SHARD_EXAMPLES, lambda pair: 1, write_pairs)
        else:
            files = _write_files(staging_dir, items, SHARD_TOKENS, len, write_text)
        if not files:
            raise ValueError(
                f"{task.source} {split} ({len(records)} records) holds no text; use a wider split."
            )
        return shard_files.write_manifest(staging_dir, identity, files, counts)

    return shard_files.build_once(out, identity, "--config.data.shards_dir", write)[0]


def _texts(task: tasks.Task, records, counts: dict, label: str) -> Iterator[tasks.Text]:
    progress = tqdm.tqdm(range(len(records)), desc=label, unit="doc", disable=None)
    for index in progress:
        texts = task.to_texts(records[index])
        counts["dropped"] += not texts
        yield from texts


class Pair(NamedTuple):
    """A truncated pair, and whether its inputs and its targets were longer."""

    inputs: np.ndarray
    targets: np.ndarray
    is_truncated: tuple[bool, bool]


def _encode_batch(tokens, task: tasks.Task, lengths: PairLengths | None, batch: list) -> list:
    if lengths is None:
        return [tokens.encode(text["text"]) for text in batch]
    return [_encode_pair(tokens, task, lengths, text) for text in batch]


def _encode_pair(tokens, task: tasks.Task, lengths: PairLengths, text: tasks.Text) -> Pair:
    """Encode inputs and targets with eos; truncated targets have none, so as not to teach it."""
    inputs, is_truncated = tasks.truncate_input(task, text["inputs"], lengths.inputs, tokens)
    targets = np.append(tokens.encode(text["targets"]), tokens.eos)
    return Pair(inputs, targets[: lengths.targets], (is_truncated, len(targets) > lengths.targets))


def _encode(texts: Iterable[tasks.Text], task, lengths: PairLengths | None, tokens) -> Iterator:
    """The token ids or Pair of each text, in order; by worker processes once there are many."""
    texts, shared = iter(texts), (tokens, task, lengths)
    yield from _encode_batch(*shared, list(itertools.islice(texts, SERIAL_DOCUMENTS)))
    batches = iter(lambda: list(itertools.islice(texts, BATCH_DOCUMENTS)), [])
    for batch in processes.ordered_map(_encode_batch, batches, 0, shared):
        yield from batch


def _count_truncated(pairs: Iterable[Pair], counts: dict) -> Iterator[tuple]:
    for inputs, targets, (inputs_truncated, targets_truncated) in pairs:
        counts["inputs_cut"] += inputs_truncated
        counts["truncated"] += targets_truncated
        yield inputs, targets


def _write_files(
    directory: pathlib.Path, items: Iterable, max_size: int, size_of: Callable, write: Callable
) -> dict[str, shard_files.WrittenShard]:
    """Distribute items over files in order; the item that reaches `max_size` ends a file."""
    files, items = {}, iter(items)
    for first in items:

        def file_items(item=first):
            size = size_of(item)
            yield item
            while size < max_size and (item := next(items, None)) is not None:
                size += size_of(item)
                yield item

        name = f"shard-{len(files):05d}.array_record"
        files[name] = write(directory / name, file_items())
    return files
