"""Records to token shards: each text encoded once, in parallel, written whole or not at all.

A shard directory holds ArrayRecord files and `manifest.json`, which comes last and says what is in
them. An example is int32 [1 + n]: the length of its inputs (-1 for a chunk of running text), then
its tokens. Running text is documents joined by an empty line and cut into chunks of equal length:
eos would not do, since it ends what a decoder says and may be hidden.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator

import numpy as np
import tqdm

from lm import sources, tasks, tokenizer

SHARD_EXAMPLES = 1 << 16
WINDOW = 1 << 14  # documents in memory at once
SERIAL = 2000  # documents; fewer are encoded faster than worker processes start
MANIFEST = "manifest.json"
COUNTS = "counts.npy"  # how often each id is a target: the unigram baseline


@dataclasses.dataclass(frozen=True)
class Form:
    """What examples are cut to, in tokens: chunks of `raw`, or pairs of at most these lengths."""

    raw: int = 0
    inputs: int = 0
    targets: int = 0


def prepare(
    task_name: str, split: str, data_dir: str, tokens: tokenizer.Tokenizer, form: Form, out
) -> dict:
    """Write the shards of one split into directory `out`, or find them there; returns the manifest.

    Raises ValueError where `out` holds shards of another task, split, tokenizer or form.
    """
    out = pathlib.Path(out)
    task = tasks.task_named(task_name)
    identity = {"task": task_name, "split": split, "tokenizer": tokens.fingerprint}
    identity |= {"form": dataclasses.asdict(form)}
    identity["dataset"] = sources.fingerprint(task.dataset, data_dir)
    if (out / MANIFEST).exists():
        manifest = json.loads((out / MANIFEST).read_text())
        differing = [key for key in identity if manifest["identity"].get(key) != identity[key]]
        if differing:
            raise ValueError(
                f"{out} holds shards of another {' and '.join(differing)} "
                f"({', '.join(str(manifest['identity'].get(key)) for key in differing)}); "
                f"remove it or set another --config.data.shards."
            )
        return manifest
    records = sources.tfds_records(task.dataset, split, data_dir)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    counts = {"documents": len(records), "dropped": 0, "truncated": 0, "tokens": 0}
    encoded = _encode(_texts(task, records, counts, f"encoding {task_name} {split}"), tokens)
    if task.pairs:
        examples = _pairs(encoded, form, tokens.eos, counts)
    else:
        examples = _chunks(encoded, form, tokens.encode("\n\n"), counts)
    targets = np.zeros(tokens.size, np.int64)
    files = _write(part, _count(examples, targets, counts))
    if not counts["examples"]:
        raise ValueError(
            f"{task.dataset} {split} ({len(records)} records) makes not one example of "
            f"{form.raw or form.inputs} tokens; use a wider split or shorter data.input_length."
        )
    np.save(part / COUNTS, targets)
    manifest = {"identity": identity, "counts": counts, "files": files}
    (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    part.replace(out)
    return manifest


def _texts(task: tasks.Task, records, counts: dict, label: str) -> Iterator[tuple[str, ...]]:
    progress = tqdm.tqdm(range(len(records)), desc=label, unit="doc", disable=None)
    for index in progress:
        text = task.to_text(records[index])
        if text is None:
            counts["dropped"] += 1
        else:
            yield (text["inputs"], text["targets"]) if task.pairs else (text["text"],)


_worker: tokenizer.Tokenizer


def _start_worker(directory) -> None:
    global _worker
    _worker = tokenizer.Tokenizer(directory)


def _encode_one(texts: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    return tuple(_worker.encode(text) for text in texts)


def _encode(texts: Iterable[tuple[str, ...]], tokens) -> Iterator[tuple[np.ndarray, ...]]:
    """Token ids of each tuple of texts, in order; by worker processes once there are many."""
    texts = iter(texts)
    _start_worker(tokens.directory)
    for _, text in zip(range(SERIAL), texts, strict=False):
        yield _encode_one(text)
    first = next(texts, None)
    if first is None:
        return
    yield _encode_one(first)
    # Spawned, not forked: the parent may hold jax's threads. Workers import no jax.
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), _start_worker, (tokens.directory,)) as pool:
        # In windows, since a pool reads its whole input ahead, and that may be all of Wikipedia.
        while window := list(itertools.islice(texts, WINDOW)):
            yield from pool.imap(_encode_one, window, chunksize=64)


def _chunks(encoded, form: Form, gap: np.ndarray, counts: dict) -> Iterator[np.ndarray]:
    """Documents, each followed by `gap`, as one stream in chunks of form.raw without the tail."""
    held, length = [], 0
    for (ids,) in encoded:
        held += [ids, gap]
        length += len(ids) + len(gap)
        if length < form.raw:
            continue
        stream = np.concatenate(held)
        whole = len(stream) - len(stream) % form.raw
        for start in range(0, whole, form.raw):
            yield np.concatenate([[-1], stream[start : start + form.raw]])
        held, length = [stream[whole:]], len(stream) - whole
    counts["tail"] = length


def _pairs(encoded, form: Form, eos: int, counts: dict) -> Iterator[np.ndarray]:
    """Inputs and targets, each ended by eos unless cut: a cut target must not teach to stop."""
    for inputs, targets in encoded:
        inputs = np.append(inputs[: form.inputs - 1], eos)
        counts["truncated"] += len(targets) >= form.targets
        targets = np.append(targets, eos)[: form.targets]
        yield np.concatenate([[len(inputs)], inputs, targets])


def _count(examples, targets: np.ndarray, counts: dict) -> Iterator[bytes]:
    counts["examples"] = 0
    for example in examples:
        counts["examples"] += 1
        counts["tokens"] += len(example) - 1
        np.add.at(targets, example[1 + max(example[0], 0) :], 1)
        yield example.astype("<i4").tobytes()


def _write(directory: pathlib.Path, examples: Iterator[bytes]) -> dict[str, dict]:
    """ArrayRecord files of SHARD_EXAMPLES each, one record a group so that each is read alone."""
    from array_record.python import array_record_module

    files, writer, paths = {}, None, []
    for written, data in enumerate(examples):
        if written % SHARD_EXAMPLES == 0:
            if writer:
                writer.close()
            paths.append(directory / f"shard-{len(paths):05d}.array_record")
            writer = array_record_module.ArrayRecordWriter(str(paths[-1]), "group_size:1")
        writer.write(data)
    if writer:
        writer.close()
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"sha256": digest, "bytes": path.stat().st_size}
    return files


def read_example(data: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """The tokens of a chunk and None, or the inputs and targets of a pair: int32 arrays."""
    numbers = np.frombuffer(data, "<i4")
    if numbers[0] < 0:
        return numbers[1:], None
    return numbers[1 : 1 + numbers[0]], numbers[1 + numbers[0] :]


def files_of(directory, manifest: dict) -> list[str]:
    """The shard files in order; ValueError where one is missing."""
    paths = [pathlib.Path(directory) / name for name in manifest["files"]]
    for path in paths:
        size, whole = path.stat().st_size if path.exists() else 0, manifest["files"][path.name]
        if size != whole["bytes"]:
            raise ValueError(
                f"{path} has {size} bytes instead of {whole['bytes']}; remove {directory}, and it "
                f"is made anew."
            )
    return [str(path) for path in paths]
