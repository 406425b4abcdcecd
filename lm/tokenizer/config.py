"""The section tokenizer of a config, and the kinds of tokenizers."""

from __future__ import annotations

import dataclasses

from lm import lookup
from lm.tokenizer import model

TRAINED_KINDS = {
    "unigram": "pieces that make the texts likely, pruned from many candidates",
    "bpe": "pieces made by joining the most frequent pair, again and again",
}
KINDS = TRAINED_KINDS | {"bytes": "UTF-8 bytes, as in ByT5; nothing is trained"}
NORMALIZATIONS = {  # name: options of SentencePiece
    "identity": dict(
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,  # so that indentation is a few tokens, not one a space
    ),
    "nmt_nfkc": dict(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
}
STORED_NAMES = {  # of a key in tokenizer.json
    "kind": "kind",
    "vocab_size": "pieces",
    "num_extra_ids": "num_sentinels",
    "normalization": "normalization",
    "character_coverage": "character_coverage",
}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to train or to read; keys as in configs/base.py. Raises ValueError."""

    dir: str = ""
    kind: str = "unigram"
    vocab_size: int = 32_000
    num_extra_ids: int = 100
    normalization: str = "identity"
    character_coverage: float = 0.9995
    max_documents: int = 200_000

    def __post_init__(self):
        lookup.lookup(KINDS, self.kind, "tokenizer.kind")
        lookup.lookup(NORMALIZATIONS, self.normalization, "tokenizer.normalization")
        bounds = {"vocab_size": (1, None), "num_extra_ids": (0, None), "max_documents": (1, None)}
        lookup.check_bounds(self, "tokenizer", bounds | {"character_coverage": (0.98, 1)})
        fixed = {"normalization": "identity", "vocab_size": model.BYTE_VOCAB_SIZE}
        for key, value in fixed.items() if self.kind == "bytes" else ():
            if getattr(self, key) != value:
                raise ValueError(
                    f"tokenizer.{key}={getattr(self, key)!r} does not suit tokenizer.kind='bytes'; "
                    f"use {value!r}."
                )

    @property
    def stored(self) -> dict:
        """The metadata of a tokenizer of this config, by the names of tokenizer.json."""
        return {name: getattr(self, key) for key, name in STORED_NAMES.items()}

    @property
    def options(self) -> dict:
        """The arguments of `train`."""
        return {key: getattr(self, key) for key in STORED_NAMES}
