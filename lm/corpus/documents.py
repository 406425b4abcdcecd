"""One record's way into a corpus: pure functions that any runner calls, and what they depend on.

A record is read, cleaned and given a key. All else follows from the key: which split the document
is in and which file of it. Within a file documents stand in the order of the sources.
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
EXCERPT = 200  # bytes of a quarantined record
SHARD = 64 << 20  # bytes of source for a file
SHARDS = 99_999  # files of a split, at most: their numbers have five digits
SAMPLE = 1_000_000  # documents that a tokenizer is trained on, or about so many


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """All that decides a corpus: the same recipe of the same sources makes the same bytes.

    source, column, unit, data_dir: as in sources.list_files. rules: as in rules.chosen. dedupe: one
    of dedupe.KINDS. heldout: the share of documents in the split "validation", in [0, 1).
    tokenizer: a directory with one, or the kind to train, of `pieces` pieces. shards: files of each
    split; 0 is one for every SHARD bytes of source.
    Raises ValueError.
    """

    source: str
    column: str = ""
    unit: str = "file"
    data_dir: str = ""
    rules: str = "default"
    dedupe: str = "near"
    heldout: float = 0.01
    tokenizer: str = "unigram"
    pieces: int = 32_000
    shards: int = 0

    def __post_init__(self):
        rules.parse_rules(self.rules)
        lookup.lookup(dict.fromkeys(dedupe.KINDS), self.dedupe, "--dedupe")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"--heldout={self.heldout} is not a share in [0, 1); use 0.01.")
        if self.tokenizer in tokenizer.TRAINED_KINDS and self.pieces <= tokenizer.BYTE_VOCAB_SIZE:
            raise ValueError(
                f"--pieces={self.pieces} has no room beside the {tokenizer.BYTE_VOCAB_SIZE} of bytes "
                f"and special ids; use 1000 or more."
            )
        if self.shards < 0:
            raise ValueError(f"--shards={self.shards} is below 0; use 0 to choose by size.")
        if self.shards > SHARDS:
            raise ValueError(f"--shards={self.shards} is above {SHARDS}; use 0 to choose by size.")

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there will be."""
        return SPLITS if self.heldout else SPLITS[:1]

    def shard_count(self, parts: list[sources.SourceFile]) -> int:
        """Files of each split."""
        by_size = math.ceil(sum(part.size() for part in parts) / SHARD)
        return self.shards or min(max(1, by_size), SHARDS)


class RecordResult(NamedTuple):
    """What became of a record.

    text, key, signature: of a document that is kept ("" and b"" of another; signature as bytes, b""
    unless near duplicates are looked for). dropped: the rule that dropped it. lines: rule -> lines
    it dropped. reason, excerpt: of a record that could not be read.
    """

    text: str = ""
    key: bytes = b""
    signature: bytes = b""
    dropped: str = ""
    lines: dict[str, int] | None = None
    reason: str = ""
    excerpt: str = ""


def read_record(
    part: sources.SourceFile, raw: bytes | dict, chosen: rules.RuleLimits, kind: str
) -> RecordResult:
    """A raw record of a part -> the document it holds, or why there is none. kind: of dedupe."""
    try:
        document = part.document(raw)
    except sources.BadRecord as error:
        start = bytes_of(raw)[:EXCERPT].decode("utf-8", "backslashreplace")
        return RecordResult(reason=str(error), excerpt=start)
    if document.drop_reason:
        return RecordResult(dropped=document.drop_reason)
    text, dropped, lines = rules.clean(document.text, chosen)
    if dropped:
        return RecordResult(dropped=dropped, lines=lines)
    normalised = dedupe.normalize(text)
    signature = dedupe.signature(normalised).tobytes() if kind == "near" else b""
    return RecordResult(text, dedupe.key(normalised), signature, lines=lines)


def bytes_of(raw: bytes | dict) -> bytes:
    """What a raw record holds of its source; b"" for a missing value."""
    if isinstance(raw, bytes):
        return raw
    return next((value for value in raw.values() if isinstance(value, bytes)), b"")


def quarantine_line(source: str, position: int, found: RecordResult) -> str:
    """The line of quarantine.jsonl. position: the record's number in its source, from 0."""
    line = {"source": source, "position": position}
    line |= {"reason": found.reason, "excerpt": found.excerpt}
    return json.dumps(line) + "\n"


def shard_of(keys: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` files each document is in: dedupe.KEY [n] -> int [n]."""
    return (keys["low"] % np.uint64(count)).astype(np.int64)


def is_heldout(keys: np.ndarray, share: float) -> np.ndarray:
    """Whether each document is held out, a matter of its text alone: bool [n]."""
    return keys["high"] < np.uint64(int(share * 2**64))


def is_sampled(keys: np.ndarray, count: int) -> np.ndarray:
    """Whether a tokenizer learns from each document, about SAMPLE of `count` of them: bool [n]."""
    if count <= SAMPLE:
        return np.ones(len(keys), bool)
    return keys["low"] < np.uint64(int(SAMPLE / count * 2**64))


class Tally:
    """Counts of what became of the records: read == kept + dropped + quarantined.

    kept: by the rules; duplicates, by kind, are among them. first: why the first unreadable record
    is unreadable. recipe: whose rules and kinds are counted even where they find nothing.
    """

    def __init__(self, recipe: CorpusConfig | None = None):
        self.read, self.kept, self.quarantined, self.first = 0, 0, 0, ""
        self.dropped, self.lines, self.duplicates = Counter(), Counter(), Counter()
        if recipe:
            names = [name for name, _ in rules.parse_rules(recipe.rules)]
            self.dropped.update(dict.fromkeys(names, 0))
            lines = (name for name in names if rules.RULES[name].scope == "line")
            self.lines.update(dict.fromkeys(lines, 0))
            kinds = dedupe.KINDS[1 : dedupe.KINDS.index(recipe.dedupe) + 1]
            self.duplicates.update(dict.fromkeys(kinds, 0))

    def count(self, found: RecordResult) -> None:
        """Add one record."""
        self.read += 1
        self.lines.update(found.lines or {})
        if found.reason:
            self.quarantined += 1
            self.first = self.first or found.reason
        elif found.dropped:
            self.dropped[found.dropped] += 1
        else:
            self.kept += 1

    def counts(self) -> dict:
        """All but `first`, for the manifest; names in alphabetical order."""
        by_name = lambda counter: dict(sorted(counter.items()))
        return {
            "read": self.read,
            "dropped": by_name(self.dropped),
            "duplicates": by_name(self.duplicates),
            "quarantined": self.quarantined,
            "lines": by_name(self.lines),
        }


class SplitFiles(NamedTuple):
    """One file of each split: what was written, and the UTF-8 bytes of its documents' text."""

    written: dict[str, shard_files.WrittenShard]
    text_bytes: dict[str, int]


def file_name(number: int, count: int) -> str:
    """The name of file `number` of a split."""
    return f"shard-{number:05d}-of-{count:05d}.array_record"


def write_shard(
    directory, name: str, texts: dict[str, Iterable[str]], tokens: tokenizer.Tokenizer
) -> SplitFiles:
    """Write the file `name` of each split into its folder. texts: split -> documents in order."""
    gap, written, sizes = tokens.encode("\n\n"), {}, dict.fromkeys(texts, 0)

    def encoded(split: str) -> Iterator[np.ndarray]:
        for text in texts[split]:
            sizes[split] += len(text.encode())
            yield tokens.encode(text)

    for split in texts:
        path = pathlib.Path(directory) / split / name
        written[split] = shard_files.write_text(path, encoded(split), gap, tokens.size)
    return SplitFiles(written, sizes)
