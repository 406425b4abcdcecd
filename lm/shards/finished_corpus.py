"""A corpus that `python -m lm corpus --out=...` has finished, as a source of training data."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator

import numpy as np

from lm import sources, storage, tokenizer
from lm.shards import shard_files

BLOCK = 1 << 16  # tokens of a corpus read at once, unless a document has more
SPLITS = ("train", "validation")  # directories of a finished corpus


def _folder(directory) -> pathlib.Path:
    """The folder of a finished corpus; ValueError where it is none."""
    directory = storage.as_path(directory).expanduser()
    if shard_files.read_manifest(directory) is None:
        raise ValueError(
            f"{directory} holds no finished corpus (no {shard_files.MANIFEST}); make one with "
            f"`python -m lm corpus --source=... --out={directory}`."
        )
    return directory


def corpus_tokenizer_dir(directory) -> pathlib.Path:
    """Where the tokenizer of a finished corpus lies; ValueError where there is no such one."""
    return _folder(directory) / "tokenizer"


def read_split_manifest(directory, split: str) -> dict:
    """The manifest of a split of a finished corpus; ValueError where there is no such one."""
    directory = _folder(directory)
    if split not in SPLITS:
        raise ValueError(
            f"the split {split!r} of the corpus {directory} cannot be read; a finished corpus has "
            f"{' and '.join(SPLITS)}, and no slices of them."
        )
    manifest = shard_files.read_manifest(directory / split)
    if manifest is None:
        how = " with a --heldout above 0" if split == "validation" else ""
        raise ValueError(f"{directory} has no {split}; remove it, and make it anew{how}.")
    return manifest


def check_tokenizer(directory, tokens: tokenizer.Tokenizer) -> None:
    """Raise ValueError unless `tokens` is the tokenizer that a finished corpus is written in."""
    if read_split_manifest(directory, "train")["identity"]["tokenizer"] != tokens.fingerprint:
        raise ValueError(
            f"the corpus {directory} was written with another tokenizer than {tokens.directory}; "
            f"leave --config.tokenizer.dir empty, and start from no run of another. If that is "
            f"{corpus_tokenizer_dir(directory)}, it was exchanged since: make the corpus anew."
        )


@dataclasses.dataclass(frozen=True)
class CorpusShard:
    """A file of a finished corpus, read back to text: raw_records() and document() as sources.SourceFile has.

    start, stop: which documents of the split are in the file.
    """

    name: str
    split: str
    tokenizer: str
    start: int
    stop: int

    def raw_records(self) -> Iterator[np.ndarray]:
        """The token ids of one document at a time, the empty line behind it included, in order."""
        stream, ends = _bounded(self.split)
        start = self.start
        while start < self.stop:
            fitting = np.searchsorted(ends, ends[start] + BLOCK, "right") - 1
            stop = min(max(start + 1, int(fitting)), self.stop)
            ids = stream.read(int(ends[start]), int(ends[stop]))
            yield from np.split(ids, ends[start + 1 : stop] - ends[start])
            start = stop

    def document(self, raw: np.ndarray) -> sources.Document:
        """The text of a document's ids."""
        return sources.Document(_tokenizer(self.tokenizer).decode(raw))


@functools.lru_cache(2)
def _bounded(split: str) -> tuple[shard_files.Stream, np.ndarray]:
    """The stream of a split, and where each of its documents begins and the last ends."""
    stream = shard_files.Stream(split, shard_files.read_manifest(split))
    return stream, np.concatenate([[0], np.cumsum(stream.lengths, dtype=np.int64)])


@functools.cache
def _tokenizer(directory: str) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer(directory)


def corpus_or_source_parts(source: str, split: str, column: str, unit: str, data_dir: str) -> list:
    """The shards of a split, where `source` is a finished corpus's directory; else its parts.

    split: "train" or "validation". The others: as in sources.list_files, whose errors these are, or
    of finished.find.
    """
    directory = storage.as_path(source.strip()).expanduser()
    if shard_files.read_manifest(directory) is None:
        return sources.list_files(source, column=column, unit=unit, data_dir=data_dir)
    manifest = read_split_manifest(directory, split)
    numbers = (file["documents"] for file in manifest["files"].values())
    ends = itertools.accumulate(numbers, initial=0)
    tokens, split = (
        str(directory / "tokenizer"),
        storage.local_copy(directory / split, shard_files.MANIFEST),
    )
    bounds = zip(manifest["files"], itertools.pairwise(ends), strict=True)
    return [CorpusShard(f"{split}/{name}", str(split), tokens, *span) for name, span in bounds]
