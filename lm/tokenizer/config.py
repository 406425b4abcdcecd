"""The section tokenizer of a config."""

from __future__ import annotations

import dataclasses

from lm import lookup
from lm.tokenizer import model, training

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
        lookup.lookup(training.KINDS, self.kind, "tokenizer.kind")
        lookup.lookup(training.NORMALIZATIONS, self.normalization, "tokenizer.normalization")
        bounds = {"vocab_size": (1, None), "num_extra_ids": (0, None), "max_documents": (1, None)}
        lookup.check_bounds(self, "tokenizer", bounds | {"character_coverage": (0.98, 1)})
        if self.kind != "bytes":
            return
        if self.normalization != "identity":
            raise ValueError(
                f"tokenizer.normalization={self.normalization!r} has no effect on bytes; with "
                f"tokenizer.kind='bytes' use identity."
            )
        if self.vocab_size != model.BYTE_VOCAB_SIZE:
            raise ValueError(
                f"tokenizer.vocab_size={self.vocab_size} is not the number of bytes and special "
                f"ids; with tokenizer.kind='bytes' use {model.BYTE_VOCAB_SIZE}."
            )

    @property
    def stored(self) -> dict:
        """The metadata of a tokenizer of this config, by the names of tokenizer.json."""
        return {name: getattr(self, key) for key, name in STORED_NAMES.items()}

    @property
    def options(self) -> dict:
        """The arguments of `train`."""
        return {key: getattr(self, key) for key in STORED_NAMES}
