"""Baselines that know little: a model that does not beat them has learnt nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s|\n")
WORD = re.compile(r"\b\w\w+\b")  # as scikit-learn's
CHUNK = 64  # histories that are asked at once


def lead(text: str, words: int) -> str:
    """The first sentence of a text, and of it at most the first `words` words."""
    return " ".join(SENTENCE_END.split(text.strip(), maxsplit=1)[0].split()[:words])


class Retrieval:
    """Answers a history with the reply that the most similar history had.

    Similarity is the cosine of tf-idf vectors of words, as scikit-learn's TfidfVectorizer computes
    them. Of equally similar histories the first is taken, so one without a known word gets the
    first reply of all.
    """

    def __init__(self, histories: Sequence[str], replies: Sequence[str]):
        """Learn as many replies as histories.

        Raises ValueError where one has no other, and where no history has a word.
        """
        if len(histories) != len(replies):
            raise ValueError(
                f"{len(histories)} histories have {len(replies)} replies; give each history one."
            )
        words = dict.fromkeys(word for history in histories for word in _words(history))
        if not words:
            raise ValueError("No history has a word; give histories with words of two letters.")
        self.replies, self.columns = list(replies), {word: at for at, word in enumerate(words)}
        counts = self._counts(histories)
        examples = np.bincount(counts.indices, minlength=len(words))  # that have the word
        self.idf = np.log((1 + len(replies)) / (1 + examples)) + 1
        self.known = self._weighed(counts)

    def __call__(self, histories: Sequence[str]) -> list[str]:
        """The reply to the most similar known history, for each of these, in order."""
        asked, answers = self._weighed(self._counts(histories)), []
        for at in range(0, len(histories), CHUNK):
            alike = self.known @ asked[at : at + CHUNK].T.toarray()  # [known, CHUNK]
            answers += [self.replies[index] for index in alike.argmax(0)]
        return answers

    def _counts(self, histories: Sequence[str]):
        """How often each known word is in each history: sparse [histories, words]."""
        from scipy import sparse

        ends, columns = [0], []
        for history in histories:
            columns += [self.columns[word] for word in _words(history) if word in self.columns]
            ends.append(len(columns))
        shape = (len(histories), len(self.columns))
        counts = sparse.csr_array((np.ones(len(columns)), columns, ends), shape=shape)
        counts.sum_duplicates()
        return counts

    def _weighed(self, counts):
        """Counts times idf, each row of length 1 or, without words, 0."""
        weighed = counts.multiply(self.idf)
        lengths = np.sqrt(weighed.multiply(weighed).sum(1))
        return weighed.multiply(1 / np.where(lengths > 0, lengths, 1)[:, None]).tocsr()


def _words(text: str) -> list[str]:
    """The words of a text in lower case: two letters, digits or underscores, or more."""
    return WORD.findall(text.lower())
