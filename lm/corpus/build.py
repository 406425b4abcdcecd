"""Build a corpus from its sources by local processes.

  records --read, clean--> spool --deduplicate--> tokenizer --encode--> token files --> manifest

The spool stores the text, key and signature of each document that passes the rules. Memory holds
the batches in flight, and less than 80 bytes per document while duplicates are searched; the
signatures, 192 bytes each, are memory-mapped.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tqdm

from lm import sources, tokenizer
from lm.corpus import dedupe, documents, folder, rules
from lm.shards import processes

BATCH_RECORDS, BATCH_BYTES = 256, 1 << 20  # per item of a worker process
SPOOL_BYTES = 16 << 20  # buffered before a write, approximately
DOCUMENT_OVERHEAD = 500  # bytes of memory for a document besides its text


def build(
    config: documents.CorpusConfig, out: str | pathlib.Path, workers: int = 0
) -> tuple[dict, bool]:
    """Build the corpus in directory `out`; returns (manifest, whether it existed already).

    workers: processes; 0 for at most one a core and one a MiB of source. The bytes do not depend on
    it. If the build fails or is killed, `out` is unchanged.
    Raises ValueError for unknown or damaged sources and for an `out` with other contents.
    """

    def write(files, staging_dir):
        size = sum(file.size() for file in files)
        count = workers or max(1, min(len(os.sched_getaffinity(0)), size >> 20))
        return _write_corpus(config, files, staging_dir, count)

    return folder.build_corpus(config, out, write)


def _write_corpus(
    config: documents.CorpusConfig,
    files: list[sources.SourceFile],
    staging_dir: pathlib.Path,
    workers: int,
) -> tuple[documents.Counts, dict[str, list[documents.EncodedShard]]]:
    spool = Spool(staging_dir / "spool", config.shard_count(files))
    counts = _read_sources(config, files, spool, staging_dir / folder.QUARANTINE, workers)
    keys = spool.keys()
    is_kept = _deduplicate(config, keys, spool, counts)
    is_heldout = documents.is_heldout(keys, config.heldout_fraction)
    splits = {"train": is_kept & ~is_heldout}
    if config.heldout_fraction:
        splits["validation"] = is_kept & is_heldout
    counts.update({("splits", split): int(members.sum()) for split, members in splits.items()})
    sampled = splits["train"] & documents.is_sampled(keys, counts["splits", "train"])
    tokens = folder.make_tokenizer(config, staging_dir, counts, spool.texts(keys, sampled))
    written = _write_shards(staging_dir, spool, keys, splits, tokens, workers)
    shutil.rmtree(spool.directory)
    return counts, written


class Spool(NamedTuple):
    """Documents on disk: texts in one file for each token file; keys and signatures in order.

    count: of token files of a split.
    """

    directory: pathlib.Path
    count: int

    def add(self, results: list[documents.RecordResult]) -> None:
        """Append documents."""
        keys = b"".join(result.key for result in results)
        numbers = documents.shard_of(np.frombuffer(keys, dedupe.KEY), self.count).tolist()
        lines = defaultdict(list)
        for number, result in zip(numbers, results, strict=True):
            lines[number].append(json.dumps(result.text, ensure_ascii=False) + "\n")
        for number, texts in lines.items():
            self._append(self.path(number).name, "".join(texts).encode())
        self._append("keys", keys)
        self._append("signatures", b"".join(result.signature for result in results))

    def _append(self, name: str, data: bytes) -> None:
        with (self.directory / name).open("ab") as file:
            file.write(data)

    def path(self, number: int) -> pathlib.Path:
        """The path of the texts of a file, one JSON string a line."""
        return self.directory / f"texts-{number:05d}.jsonl"

    def keys(self) -> np.ndarray:
        """The keys of all documents: dedupe.KEY [n]."""
        return np.fromfile(self.directory / "keys", dedupe.KEY)

    def signatures(self) -> np.ndarray:
        """The memory-mapped signatures of all documents: uint16 [n, dedupe.NUM_HASHES]."""
        path = self.directory / "signatures"
        return np.memmap(path, np.uint16, "r").reshape(-1, dedupe.NUM_HASHES)

    def by_file(self, keys: np.ndarray) -> list[np.ndarray]:
        """The documents of each file: `count` arrays int [..], ascending."""
        numbers = documents.shard_of(keys, self.count)
        order = np.argsort(numbers, kind="stable")
        return np.split(order, np.searchsorted(numbers[order], np.arange(1, self.count)))

    def texts(self, keys: np.ndarray, is_selected: np.ndarray) -> Iterator[str]:
        """The selected documents, file by file. is_selected: bool [n]."""
        for number, members in enumerate(self.by_file(keys)):
            yield from _read_lines(self.path(number), is_selected[members])


def _read_lines(path: pathlib.Path, is_selected: np.ndarray) -> Iterator[str]:
    """The selected texts of a spool file. is_selected: bool, one a line."""
    if not len(is_selected):
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        for line, is_match in zip(file, is_selected, strict=True):
            if is_match:
                yield json.loads(line)


def _read_sources(
    config: documents.CorpusConfig,
    files: list[sources.SourceFile],
    spool: Spool,
    quarantine: pathlib.Path,
    workers: int,
) -> documents.Counts:
    """Read and clean all records into the spool, and unreadable ones into quarantine."""
    counts, names = Counter(), folder.source_names(files)
    buffer, size = [], 0
    shared = (files, rules.parse_rules(config.rules), config.dedupe)
    spool.directory.mkdir()
    spool.add([])
    progress = tqdm.tqdm(desc="reading", unit=" records", disable=None)
    with progress, quarantine.open("w") as quarantine_file:
        for results in processes.ordered_map(_read_batch, _batches(files), workers, shared):
            for result in results:
                counts.update(documents.record_counts(result))
                if result.reason:
                    quarantine_file.write(documents.quarantine_line(result, names))
                elif not result.dropped:
                    buffer.append(result)
                    size += len(result.text) + DOCUMENT_OVERHEAD
            if size > SPOOL_BYTES:
                spool.add(buffer)
                buffer, size = [], 0
            progress.update(len(results))
            numbers = {"kept": counts["kept", ""], "unreadable": counts["quarantined", ""]}
            progress.set_postfix(numbers, refresh=False)
    spool.add(buffer)
    return counts


def _batches(
    files: list[sources.SourceFile],
) -> Iterator[list[tuple[documents.Position, bytes | dict]]]:
    """Batches of documents.raw_records of all files."""
    batch, size = [], 0
    for number in range(len(files)):
        for record in documents.raw_records(number, files):
            batch.append(record)
            size += len(documents.raw_bytes(record[1]))
            if len(batch) == BATCH_RECORDS or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _read_batch(
    files: list[sources.SourceFile], limits: rules.RuleLimits, dedupe_kind: str, batch: list
) -> list[documents.RecordResult]:
    return [documents.read_record(record, files, limits, dedupe_kind) for record in batch]


def _deduplicate(
    config: documents.CorpusConfig, keys: np.ndarray, spool: Spool, counts: documents.Counts
) -> np.ndarray:
    """Which documents repeat no earlier one: bool [n]; counts the duplicates."""
    is_kept = np.ones(len(keys), bool)
    if config.dedupe in ("exact", "near"):
        is_kept = ~dedupe.same_as_earlier(keys)
        counts["duplicates", "exact"] = int((~is_kept).sum())
    if config.dedupe == "near" and len(keys):
        candidates = np.flatnonzero(is_kept)
        is_kept[candidates] = ~dedupe.near_earlier(spool.signatures(), candidates)
        counts["duplicates", "near"] = len(candidates) - int(is_kept.sum())
    return is_kept


def _write_shards(
    staging_dir: pathlib.Path,
    spool: Spool,
    keys: np.ndarray,
    splits: dict[str, np.ndarray],
    tokens: tokenizer.Tokenizer,
    workers: int,
) -> dict[str, list[documents.EncodedShard]]:
    """Write the token files of all splits by worker processes. splits: split -> bool [n]."""
    items = []
    for split, is_member in splits.items():
        (staging_dir / split).mkdir()
        for number, members in enumerate(spool.by_file(keys)):
            items.append((staging_dir / split, number, is_member[members]))
    workers, written = min(workers, len(items)), {split: [] for split in splits}
    total = sum(int(is_member.sum()) for is_member in splits.values())
    with tqdm.tqdm(desc="encoding", unit=" documents", total=total, disable=None) as progress:
        shards = processes.ordered_map(_write_shard, items, workers, (spool, tokens))
        for (directory, *_), shard in zip(items, shards, strict=True):
            written[directory.name].append(shard)
            progress.update(shard.written.facts["documents"])
    return written


def _write_shard(
    spool: Spool, tokens: tokenizer.Tokenizer, item: tuple[pathlib.Path, int, np.ndarray]
) -> documents.EncodedShard:
    """Encode lines of a spool file in a worker. item: (directory, number, bool, one a line)."""
    directory, number, is_selected = item
    texts = _read_lines(spool.path(number), is_selected)
    path = directory / documents.file_name(number, spool.count)
    return documents.write_shard(path, texts, tokens)
