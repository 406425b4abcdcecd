"""A corpus that `python -m lm corpus --out=...` has finished, as a source of training data."""

from __future__ import annotations

import pathlib

from lm import tokenizer
from lm.corpus import shards
from lm.sources import places

SPLITS = ("train", "validation")  # directories of a finished corpus


def _folder(directory) -> pathlib.Path:
    """The folder of a finished corpus; ValueError where it is none."""
    directory = places.place(directory).expanduser()
    if shards.read_manifest(directory) is None:
        raise ValueError(
            f"{directory} holds no finished corpus (no {shards.MANIFEST}); make one with "
            f"`python -m lm corpus --source=... --out={directory}`."
        )
    return directory


def tokenizer_of(directory) -> pathlib.Path:
    """Where the tokenizer of a finished corpus lies; ValueError where there is no such one."""
    return _folder(directory) / "tokenizer"


def find(directory, split: str) -> dict:
    """The manifest of a split of a finished corpus; ValueError where there is no such one."""
    directory = _folder(directory)
    if split not in SPLITS:
        raise ValueError(
            f"the split {split!r} of the corpus {directory} cannot be read; a finished corpus has "
            f"{' and '.join(SPLITS)}, and no slices of them."
        )
    manifest = shards.read_manifest(directory / split)
    if manifest is None:
        how = " with a --heldout above 0" if split == "validation" else ""
        raise ValueError(f"{directory} has no {split}; remove it, and make it anew{how}.")
    return manifest


def check_tokenizer(directory, tokens: tokenizer.Tokenizer) -> None:
    """Raise ValueError unless `tokens` is the tokenizer that a finished corpus is written in."""
    if find(directory, "train")["identity"]["tokenizer"] != tokens.fingerprint:
        raise ValueError(
            f"the corpus {directory} was written with another tokenizer than {tokens.directory}; "
            f"leave --config.tokenizer.dir empty, and start from no run of another. If that is "
            f"{tokenizer_of(directory)}, it was exchanged since: make the corpus anew."
        )
