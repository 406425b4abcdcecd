"""The configuration of a corpus, and the pure functions that turn a record into a document.

A record is read, cleaned and given a key. The key decides the document's split and file; within a
file documents keep the order of the sources. Both builders, local and Beam, call these functions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from lm import lookup, sources, tokenizer
from lm.corpus import dedupe, rules
from lm.shards import finished_corpus, shard_files

SPLITS = finished_corpus.SPLITS
EXCERPT_BYTES = 200  # shown of a quarantined record
SHARD_BYTES = 64 << 20  # of source per file
MAX_SHARDS = 99_999  # files per split: file names have five digits
TOKENIZER_DOCUMENTS = 1_000_000  # to train a tokenizer on, approximately

Position = tuple[int, int]  # (number of a file, index of the record in it): the global order
# (read, kept, dropped, lines, duplicates, quarantined or splits; name or "") -> number.
Counts = Counter[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Everything that decides a corpus: equal configs of equal sources give equal bytes.

    source, column, unit, data_dir: as in sources.list_files. rules: as in rules.parse_rules.
    dedupe: one of dedupe.KINDS. heldout_fraction: of documents in the split validation, in [0, 1).
    tokenizer: a directory, or the kind to train. shards: files per split; 0: one per SHARD_BYTES.
    Raises ValueError.
    """

    source: str
    column: str = ""
    unit: str = "file"
    data_dir: str = ""
    rules: str = "default"
    dedupe: str = "near"
    heldout_fraction: float = 0.01
    tokenizer: str = "unigram"
    vocab_size: int = 32_000
    shards: int = 0

    def __post_init__(self):
        rules.parse_rules(self.rules)
        lookup.lookup(dict.fromkeys(dedupe.KINDS), self.dedupe, "--dedupe")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"--heldout_fraction={self.heldout_fraction} is not in [0, 1).")
        least = tokenizer.BYTE_VOCAB_SIZE
        if self.tokenizer in tokenizer.TRAINED_KINDS and self.vocab_size <= least:
            raise ValueError(
                f"--vocab_size={self.vocab_size} must exceed the {least} of bytes and special ids; "
                f"use 1000 or more."
            )
        if not 0 <= self.shards <= MAX_SHARDS:
            bound = "below 0" if self.shards < 0 else f"above {MAX_SHARDS}"
            raise ValueError(f"--shards={self.shards} is {bound}; use 0 to choose by size.")

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the corpus will have."""
        return SPLITS if self.heldout_fraction else SPLITS[:1]

    def shard_count(self, files: list[sources.SourceFile]) -> int:
        """The number of files of each split."""
        by_size = math.ceil(sum(file.size() for file in files) / SHARD_BYTES)
        return self.shards or min(max(1, by_size), MAX_SHARDS)


class RecordResult(NamedTuple):
    """The outcome of reading and cleaning a record.

    position: as in raw_records. text, key, signature: of a document that passes, else empty;
    signature as bytes, empty unless near duplicates are dropped. dropped: the rule that dropped it.
    lines: rule -> lines dropped. reason, excerpt: of a record that cannot be read.
    """

    position: Position
    text: str = ""
    key: bytes = b""
    signature: bytes = b""
    dropped: str = ""
    lines: dict[str, int] | None = None
    reason: str = ""
    excerpt: str = ""


def raw_records(
    number: int, files: list[sources.SourceFile]
) -> Iterator[tuple[Position, bytes | dict]]:
    """Yield (position, raw record) of each record of a file."""
    for index, raw in enumerate(files[number].raw_records()):
        yield (number, index), raw


def read_record(
    record: tuple[Position, bytes | dict],
    files: list[sources.SourceFile],
    limits: rules.RuleLimits,
    dedupe_kind: str,
) -> RecordResult:
    """Parse, clean and hash a record of raw_records."""
    position, raw = record
    try:
        document = files[position[0]].document(raw)
    except sources.BadRecord as error:
        excerpt = raw_bytes(raw)[:EXCERPT_BYTES].decode("utf-8", "backslashreplace")
        return RecordResult(position, reason=str(error), excerpt=excerpt)
    if document.drop_reason:
        return RecordResult(position, dropped=document.drop_reason)
    text, dropped, lines = rules.clean(document.text, limits)
    if dropped:
        return RecordResult(position, dropped=dropped, lines=lines)
    normalized = dedupe.normalize(text)
    signature = dedupe.signature(normalized).tobytes() if dedupe_kind == "near" else b""
    return RecordResult(position, text, dedupe.key(normalized), signature, lines=lines)


def raw_bytes(raw: bytes | dict) -> bytes:
    """The bytes of a raw record; b"" for a missing value."""
    if isinstance(raw, bytes):
        return raw
    return next((value for value in raw.values() if isinstance(value, bytes)), b"")


def quarantine_line(result: RecordResult, source_names: list[str]) -> str:
    """A line of quarantine.jsonl for a record that cannot be read. source_names: of all files."""
    number, index = result.position
    line = {"source": source_names[number], "position": index}
    return json.dumps(line | {"reason": result.reason, "excerpt": result.excerpt}) + "\n"


def shard_of(keys: np.ndarray, count: int) -> np.ndarray:
    """The file of each document, of `count`: dedupe.KEY [n] -> int [n]."""
    return (keys["low"] % np.uint64(count)).astype(np.int64)


def is_heldout(keys: np.ndarray, share: float) -> np.ndarray:
    """Whether each document is held out, which depends on its text alone: bool [n]."""
    return keys["high"] < np.uint64(int(share * 2**64))


def is_sampled(keys: np.ndarray, count: int) -> np.ndarray:
    """Select about TOKENIZER_DOCUMENTS of `count` documents to train a tokenizer on: bool [n]."""
    if count <= TOKENIZER_DOCUMENTS:
        return np.ones(len(keys), bool)
    return keys["low"] < np.uint64(int(TOKENIZER_DOCUMENTS / count * 2**64))


def record_counts(result: RecordResult) -> Counts:
    """What a record adds to the counts: read == kept + dropped + quarantined."""
    counts = Counter({("read", ""): 1})
    counts.update({("lines", rule): count for rule, count in (result.lines or {}).items()})
    if result.reason:
        counts["quarantined", ""] += 1
    elif result.dropped:
        counts["dropped", result.dropped] += 1
    else:
        counts["kept", ""] += 1
    return counts


def manifest_counts(config: CorpusConfig, counts: Counts) -> dict:
    """The counts of records for the manifest, names sorted, zeros for the config's other rules."""
    names = [name for name, _ in rules.parse_rules(config.rules)]
    listed = {"dropped": names, "lines": [n for n in names if rules.RULES[n].scope == "line"]}
    listed["duplicates"] = dedupe.KINDS[1 : dedupe.KINDS.index(config.dedupe) + 1]
    tables = {kind: dict.fromkeys(names, 0) for kind, names in listed.items()}
    for kind, name in counts:
        if kind in tables:
            tables[kind][name] = counts[kind, name]
    tables = {kind: dict(sorted(table.items())) for kind, table in tables.items()}
    return {
        "read": counts["read", ""],
        "dropped": tables["dropped"],
        "duplicates": tables["duplicates"],
        "quarantined": counts["quarantined", ""],
        "lines": tables["lines"],
    }


class EncodedShard(NamedTuple):
    """A token file as written, and the UTF-8 bytes of its documents."""

    written: shard_files.WrittenShard
    text_bytes: int


def file_name(number: int, count: int) -> str:
    """The name of file `number` of a split."""
    return f"shard-{number:05d}-of-{count:05d}.array_record"


def write_shard(
    path: pathlib.Path, texts: Iterable[str], tokens: tokenizer.Tokenizer
) -> EncodedShard:
    """Encode documents as one token file."""
    text_bytes = 0

    def encode() -> Iterator[np.ndarray]:
        nonlocal text_bytes
        for text in texts:
            text_bytes += len(text.encode())
            yield tokens.encode(text)

    written = shard_files.write_text(path, encode(), tokens.encode("\n\n"), tokens.size)
    return EncodedShard(written, text_bytes)
