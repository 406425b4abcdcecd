"""Sources to a finished corpus by local processes.

  records --read, clean--> spool --deduplicate--> tokenizer --encode--> token files --> manifest

The spool holds each document that the rules keep: its text in the file that it may end in, its key
and its signature. No text is in memory but what the workers are given; a document takes less than
80 bytes while duplicates are looked for, and its signature, 192 bytes, is mapped from the spool.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tqdm

from lm import sources, tokenizer
from lm.corpus import dedupe, documents, folder, rules
from lm.shards import processes
from lm.storage import staging

BATCH_RECORDS, BATCH_BYTES = 256, 1 << 20  # what a worker is given at a time
SPOOLED = 16 << 20  # bytes in memory, or about so many, before they are written
HELD = 500  # bytes that a document takes in memory beside its text


def build(recipe: documents.CorpusConfig, out, workers: int = 0) -> tuple[dict, bool]:
    """Make the corpus of a recipe in folder `out`, or find it there: (its manifest, whether found).

    workers: processes, 0 for as many as there are processors and MiB to read; the bytes do not
    depend on it.
    Raises ValueError for what the user can mend: an unknown source, a damaged archive, a folder
    with something else. Then, and if it is killed at any moment, `out` is as it was before.
    """
    out, parts = folder.resolve_out_dir(out, recipe), parts_of(recipe)
    size = sum(part.size() for part in parts)
    workers = workers or max(1, min(len(os.sched_getaffinity(0)), size >> 20))
    identity = folder.corpus_identity(recipe, parts)
    if manifest := folder.read_finished_corpus(out, identity):
        return manifest, True
    sources.check_first_records(parts)
    with staging.staging_dir(out) as room:
        if manifest := folder.read_finished_corpus(out, identity):  # by a process that was quicker
            return manifest, True
        spool = Spool(room / "spool", recipe.shard_count(parts))
        tally = _gather(recipe, parts, spool, room / folder.QUARANTINE, workers)
        keys = spool.keys()
        splits = _splits(recipe, keys, _kept(recipe, keys, spool, tally))
        folder.check_splits(recipe, {name: int(own.sum()) for name, own in splits.items()}, tally)
        sampled = splits["train"] & documents.is_sampled(keys, int(splits["train"].sum()))
        tokens = folder.make_tokenizer(recipe, room / "tokenizer", spool.texts(keys, sampled))
        written = _write(room, spool, keys, splits, tokens, workers)
        shutil.rmtree(spool.directory)
        return folder.finish_corpus(room, out, identity, tally, written), False


def parts_of(recipe: documents.CorpusConfig) -> list[sources.SourceFile]:
    """The parts of a recipe's sources, in the order of their positions."""
    where = {"column": recipe.column, "unit": recipe.unit, "data_dir": recipe.data_dir}
    return sources.list_files(recipe.source, **where)


class Spool(NamedTuple):
    """Kept documents on disk: texts by the number of their file, keys and signatures, in order."""

    directory: pathlib.Path
    count: int

    def add(self, found: list[documents.RecordResult]) -> None:
        """Append documents."""
        keys = b"".join(one.key for one in found)
        lines = defaultdict(list)
        for number, one in zip(self._numbers(keys), found, strict=True):
            lines[number].append(json.dumps(one.text, ensure_ascii=False) + "\n")
        for number, own in lines.items():
            self._append(self.path(number).name, "".join(own).encode())
        self._append("keys", keys)
        self._append("signatures", b"".join(one.signature for one in found))

    def _numbers(self, keys: bytes) -> list[int]:
        return documents.shard_of(np.frombuffer(keys, dedupe.KEY), self.count).tolist()

    def _append(self, name: str, data: bytes) -> None:
        with (self.directory / name).open("ab") as file:
            file.write(data)

    def path(self, number: int) -> pathlib.Path:
        """Where the texts of one file are: a line of JSON each."""
        return self.directory / f"texts-{number:05d}.jsonl"

    def keys(self) -> np.ndarray:
        """The keys of all documents: dedupe.KEY [n]."""
        return np.fromfile(self.directory / "keys", dedupe.KEY)

    def signatures(self) -> np.ndarray:
        """Those of all documents, mapped: uint16 [n, dedupe.ENTRIES]."""
        path = self.directory / "signatures"
        return np.memmap(path, np.uint16, "r").reshape(-1, dedupe.ENTRIES)

    def by_file(self, keys: np.ndarray) -> list[np.ndarray]:
        """For each file, which documents are in it: `count` arrays int [..], ascending."""
        numbers = documents.shard_of(keys, self.count)
        order = np.argsort(numbers, kind="stable")
        return np.split(order, np.searchsorted(numbers[order], np.arange(1, self.count)))

    def texts(self, keys: np.ndarray, wanted: np.ndarray) -> Iterator[str]:
        """The wanted documents, file by file. wanted: bool [n]."""
        for number, members in enumerate(self.by_file(keys)):
            yield from lines_of(self.path(number), wanted[members])


def lines_of(path: pathlib.Path, wanted: np.ndarray) -> Iterator[str]:
    """The wanted texts of a file of the spool. wanted: bool, one a line."""
    if not len(wanted):
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        for line, own in zip(file, wanted, strict=True):
            if own:
                yield json.loads(line)


def _gather(
    recipe: documents.CorpusConfig,
    parts: list[sources.SourceFile],
    spool: Spool,
    quarantine: pathlib.Path,
    workers: int,
) -> documents.Tally:
    """Read all records into the spool, and those that cannot be read into quarantine."""
    tally, names, held, size = documents.Tally(recipe), folder.source_names(parts), [], 0
    common = (parts, rules.parse_rules(recipe.rules), recipe.dedupe)
    spool.directory.mkdir()
    spool.add([])
    progress = tqdm.tqdm(desc="reading", unit=" records", disable=None)
    with progress, quarantine.open("w") as bad:
        for read in processes.ordered_map(_read, _batches(parts), workers, common):
            for number, position, found in read:
                tally.count(found)
                if found.reason:
                    bad.write(documents.quarantine_line(names[number], position, found))
                elif not found.dropped:
                    held.append(found)
                    size += len(found.text) + HELD
            if size > SPOOLED:
                spool.add(held)
                held, size = [], 0
            progress.update(len(read))
            progress.set_postfix(kept=tally.kept, unreadable=tally.quarantined, refresh=False)
    spool.add(held)
    return tally


def _batches(parts: list[sources.SourceFile]) -> Iterator[list[tuple[int, int, bytes | dict]]]:
    """(number of the part, number of the record in it, raw record), some at a time."""
    batch, size = [], 0
    for number, part in enumerate(parts):
        for position, raw in enumerate(part.raw_records()):
            batch.append((number, position, raw))
            size += len(documents.bytes_of(raw))
            if len(batch) == BATCH_RECORDS or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _read(parts, chosen, kind, batch) -> list[tuple[int, int, documents.RecordResult]]:
    """What a worker does with a batch of records."""
    read = lambda number, raw: documents.read_record(parts[number], raw, chosen, kind)
    return [(number, position, read(number, raw)) for number, position, raw in batch]


def _kept(recipe, keys: np.ndarray, spool: Spool, tally: documents.Tally) -> np.ndarray:
    """Which documents repeat no earlier one: bool [n]; the others are counted."""
    kept = np.ones(len(keys), bool)
    if recipe.dedupe in ("exact", "near"):
        kept = ~dedupe.same_as_earlier(keys)
        tally.duplicates["exact"] = int((~kept).sum())
    if recipe.dedupe == "near" and len(keys):
        among = np.flatnonzero(kept)
        kept[among] = ~dedupe.near_earlier(spool.signatures(), among)
        tally.duplicates["near"] = len(among) - int(kept.sum())
    return kept


def _splits(recipe, keys: np.ndarray, kept: np.ndarray) -> dict[str, np.ndarray]:
    """Which documents are in each split: bool [n]."""
    heldout = documents.is_heldout(keys, recipe.heldout)
    own = {"train": kept & ~heldout, "validation": kept & heldout}
    return {split: own[split] for split in recipe.splits}


def _write(room, spool: Spool, keys, splits, tokens: tokenizer.Tokenizer, workers: int):
    """The token files of all splits, made by workers: a documents.Shard for each number."""
    for split in splits:
        (room / split).mkdir()
    items = [
        (number, {split: own[members] for split, own in splits.items()})
        for number, members in enumerate(spool.by_file(keys))
    ]
    total, written = sum(int(own.sum()) for own in splits.values()), []
    with tqdm.tqdm(desc="encoding", unit=" documents", total=total, disable=None) as progress:
        for shard in processes.ordered_map(
            _encode, items, min(workers, len(items)), (room, spool, tokens)
        ):
            written.append(shard)
            progress.update(sum(file.facts["documents"] for file in shard.written.values()))
    return written


def _encode(room, spool: Spool, tokens, item) -> documents.SplitFiles:
    """What a worker does with a file of the spool."""
    number, wanted = item
    name = documents.file_name(number, spool.count)
    texts: dict[str, Iterable[str]]
    texts = {split: lines_of(spool.path(number), own) for split, own in wanted.items()}
    return documents.write_shard(room, name, texts, tokens)
