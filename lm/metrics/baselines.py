"""Baselines without a model."""

from __future__ import annotations

import re

SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s|\n")


def lead(text: str, num_words: int) -> str:
    """The first sentence of a text, truncated to `num_words` words."""
    return " ".join(SENTENCE_END.split(text.strip(), maxsplit=1)[0].split()[:num_words])
