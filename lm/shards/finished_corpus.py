"""A corpus built by `python -m lm corpus --out=...`, as a source of training data."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator

import numpy as np

from lm import sources, storage, tokenizer
from lm.shards import shard_files

READ_TOKENS = 1 << 16  # per read, unless a document is longer
SPLITS = ("train", "validation")  # directories of a finished corpus


def _corpus_dir(directory: str | pathlib.Path) -> pathlib.Path:
    directory = storage.as_path(directory).expanduser()
    if shard_files.read_manifest(directory) is None:
        raise ValueError(
            f"{directory} holds no finished corpus (no {shard_files.MANIFEST}); build one with "
            f"`python -m lm corpus --source=... --out={directory}`."
        )
    return directory


def corpus_tokenizer_dir(directory: str | pathlib.Path) -> pathlib.Path:
    """The tokenizer's directory in a finished corpus; raises ValueError if it is not one."""
    return _corpus_dir(directory) / "tokenizer"


def read_split_manifest(directory: str | pathlib.Path, split: str) -> dict:
    """Read the manifest of a split of a finished corpus; raises ValueError if it is missing."""
    directory = _corpus_dir(directory)
    if split not in SPLITS:
        raise ValueError(
            f"the corpus {directory} has no split {split!r}; use {' or '.join(SPLITS)}, without "
            f"slices."
        )
    manifest = shard_files.read_manifest(directory / split)
    if manifest is None:
        flag = " with a --heldout_fraction above 0" if split == "validation" else ""
        raise ValueError(f"{directory} has no {split}; remove it and build it again{flag}.")
    return manifest


def check_tokenizer(directory: str | pathlib.Path, tokens: tokenizer.Tokenizer) -> None:
    """Raise ValueError unless the corpus was encoded with this tokenizer."""
    if read_split_manifest(directory, "train")["identity"]["tokenizer"] != tokens.fingerprint:
        raise ValueError(
            f"the corpus {directory} was encoded with another tokenizer than {tokens.directory}; "
            f"leave --config.tokenizer.dir empty, and init_from no run with another tokenizer. If "
            f"{corpus_tokenizer_dir(directory)} itself was replaced, build the corpus again."
        )


@dataclasses.dataclass(frozen=True)
class CorpusShard:
    """A file of a finished corpus, decoded to text, with the interface of sources.SourceFile.

    start, stop: the documents of the split that are in the file.
    """

    name: str
    split: str
    tokenizer: str
    start: int
    stop: int

    def raw_records(self) -> Iterator[np.ndarray]:
        """The token ids of each document in order, with the empty line after it."""
        stream, ends = _open_split(self.split)
        start = self.start
        while start < self.stop:
            last = int(np.searchsorted(ends, ends[start] + READ_TOKENS, "right")) - 1
            stop = min(max(start + 1, last), self.stop)
            ids = stream.read(int(ends[start]), int(ends[stop]))
            yield from np.split(ids, ends[start + 1 : stop] - ends[start])
            start = stop

    def document(self, raw: np.ndarray) -> sources.Document:
        """Decode a document's ids."""
        return sources.Document(_tokenizer(self.tokenizer).decode(raw))


@functools.lru_cache(2)
def _open_split(split: str) -> tuple[shard_files.Stream, np.ndarray]:
    """The stream of a split, and the position of each document's start and of the end."""
    stream = shard_files.Stream(split, shard_files.read_manifest(split))
    return stream, np.concatenate([[0], np.cumsum(stream.lengths, dtype=np.int64)])


@functools.cache
def _tokenizer(directory: str) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer(directory)


def list_files(
    source: str, split: str, *, column: str = "", unit: str = "file", data_dir: str = ""
) -> list[CorpusShard] | list[sources.SourceFile]:
    """The shards of a split if `source` is a finished corpus, else the files of the source.

    Raises ValueError as read_split_manifest or sources.list_files does.
    """
    directory = storage.as_path(source.strip()).expanduser()
    if shard_files.read_manifest(directory) is None:
        return sources.list_files(source, column=column, unit=unit, data_dir=data_dir)
    files = read_split_manifest(directory, split)["files"]
    ends = itertools.accumulate((file["documents"] for file in files.values()), initial=0)
    tokens = str(directory / "tokenizer")
    split_dir = storage.local_copy(directory / split, shard_files.MANIFEST)
    return [
        CorpusShard(f"{split_dir}/{name}", str(split_dir), tokens, start, stop)
        for name, (start, stop) in zip(files, itertools.pairwise(ends), strict=True)
    ]
