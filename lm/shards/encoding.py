"""Records of a task to token shards: each text encoded once, in parallel, whole or not at all."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tqdm

from lm import sources, tasks, tokenizer
from lm.shards import processes, shard_files
from lm.storage import staging

SHARD_TOKENS = 1 << 27  # a file of text
SHARD_EXAMPLES = 1 << 16  # a file of pairs
BATCH = 64  # documents that a worker is given at once
SERIAL = 2000  # documents; fewer are encoded faster than worker processes start


@dataclasses.dataclass(frozen=True)
class PairLengths:
    """What pairs are cut to: at most so many tokens of inputs and of targets."""

    inputs: int
    targets: int


def prepare(
    task: tasks.Task,
    split: str,
    data_dir: str,
    tokens: tokenizer.Tokenizer,
    form: PairLengths | None,
    out,
) -> dict:
    """Write the shards of one split into directory `out`, or find them there; returns the manifest.

    form: of pairs; None for running text, which is stored uncut. Raises ValueError where `out`
    holds shards of another task, split, tokenizer or form, and for records without the task's
    columns.
    """
    out = pathlib.Path(out)
    made_of = {key: getattr(task, key) for key in ("source", "inputs", "targets", "turns")}
    identity = {"task": made_of | {"labels": list(task.labels)}, "split": split}
    identity |= {"tokenizer": tokens.fingerprint}
    identity |= {"form": dataclasses.asdict(form) if form else {"record": shard_files.RECORD}}
    identity["dataset"] = sources.source_fingerprint(task.source, split, data_dir)
    if manifest := _found(out, identity):
        return manifest
    records = sources.records(task.source, split, data_dir)
    counts = {"records": len(records), "dropped": 0}
    encoded = _encode(
        _texts(task, records, counts, f"encoding {split} of {task.source}"), task, form, tokens
    )
    with staging.staging_dir(out) as room:
        if manifest := _found(out, identity):  # by another process, since we looked
            return manifest
        if task.pairs:
            counts |= {"truncated": 0, "inputs_cut": 0}
            files = _write_pairs(room, _pairs(encoded, counts), tokens)
        else:
            files = _write_text(room, encoded, tokens)
        if not files:
            raise ValueError(
                f"{task.source} {split} ({len(records)} records) holds no text; use a wider split."
            )
        manifest = shard_files.write_manifest(room, identity, files, counts)
        room.replace(out)
    return manifest


def _found(out: pathlib.Path, identity: dict) -> dict | None:
    """The manifest of shards of this identity in `out`; ValueError where it holds anything else."""
    manifest = shard_files.read_manifest(out)
    if manifest is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; set another --config.data.shards_dir.")
    theirs = manifest["identity"] if manifest else identity
    differing = [key for key in identity if theirs.get(key) != identity[key]]
    if differing:
        raise ValueError(
            f"{out} holds shards of another {' and '.join(differing)} "
            f"({', '.join(str(theirs.get(key)) for key in differing)}); "
            f"remove it or set another --config.data.shards_dir."
        )
    return manifest


def _texts(task: tasks.Task, records, counts: dict, label: str) -> Iterator[tasks.Text]:
    progress = tqdm.tqdm(range(len(records)), desc=label, unit="doc", disable=None)
    for index in progress:
        texts = task.to_texts(records[index])
        counts["dropped"] += not texts
        yield from texts


class Pair(NamedTuple):
    """A pair within its form, and which of the two had to be cut."""

    inputs: np.ndarray
    targets: np.ndarray
    cut: tuple[bool, bool]


def _encode_all(
    tokens, task: tasks.Task, form: PairLengths | None, batch: list[tasks.Text]
) -> list:
    if form is None:
        return [tokens.encode(text["text"]) for text in batch]
    return [_pair(tokens, task, form, text) for text in batch]


def _pair(tokens, task: tasks.Task, form: PairLengths, text: tasks.Text) -> Pair:
    """Inputs and targets, each ended by eos; not a cut target, which must not teach to stop."""
    inputs, shorter = tasks.truncate_input(task, text["inputs"], form.inputs, tokens)
    targets = np.append(tokens.encode(text["targets"]), tokens.eos)
    return Pair(inputs, targets[: form.targets], (shorter, len(targets) > form.targets))


def _encode(texts: Iterable[tasks.Text], task, form: PairLengths | None, tokens) -> Iterator:
    """Token ids of each text, or its Pair, in order; by worker processes once there are many."""
    texts, common = iter(texts), (tokens, task, form)
    yield from _encode_all(*common, list(itertools.islice(texts, SERIAL)))
    batches = iter(lambda: list(itertools.islice(texts, BATCH)), [])
    for batch in processes.ordered_map(_encode_all, batches, 0, common):
        yield from batch


def _pairs(encoded: Iterable[Pair], counts: dict) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for inputs, targets, (shorter, truncated) in encoded:
        counts["inputs_cut"] += shorter
        counts["truncated"] += truncated
        yield inputs, targets


def _write_text(directory: pathlib.Path, documents, tokens) -> dict[str, shard_files.WrittenShard]:
    """Files of whole documents, each cut after SHARD_TOKENS."""
    gap = tokens.encode("\n\n")
    write = lambda path, part: shard_files.write_text(path, part, gap, tokens.size)
    return _write_files(directory, documents, SHARD_TOKENS, len, write)


def _write_pairs(directory: pathlib.Path, pairs, tokens) -> dict[str, shard_files.WrittenShard]:
    """Files of SHARD_EXAMPLES pairs."""
    write = lambda path, part: shard_files.write_pairs(path, part, tokens.size)
    return _write_files(directory, pairs, SHARD_EXAMPLES, lambda pair: 1, write)


def _write_files(
    directory, items, most: int, measure, write
) -> dict[str, shard_files.WrittenShard]:
    """Deal items to files in order, each ended by the item with which it measures `most`."""
    files, items = {}, iter(items)
    for first in items:

        def one_file(item=first):
            size = measure(item)
            yield item
            while size < most and (item := next(items, None)) is not None:
                size += measure(item)
                yield item

        name = f"shard-{len(files):05d}.array_record"
        files[name] = write(directory / name, one_file())
    return files
