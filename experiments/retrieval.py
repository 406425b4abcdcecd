"""A baseline for dialogues: answer with the reply to the most similar history."""

from __future__ import annotations

from collections.abc import Sequence

CHUNK = 64  # histories compared at a time


class Retrieval:
    """Answers a history with the reply to the most similar known history.

    Similarity is the cosine of scikit-learn's tf-idf vectors of words; of equally similar histories
    the first counts. Needs scikit-learn, which is in the extra `dev`.
    """

    def __init__(self, histories: Sequence[str], replies: Sequence[str]):
        """Raises ValueError for unequal numbers, and if no history has a word."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        if len(histories) != len(replies):
            raise ValueError(f"{len(histories)} histories have {len(replies)} replies.")
        self.replies, self.vectorizer = list(replies), TfidfVectorizer()
        self.known = self.vectorizer.fit_transform(histories)

    def __call__(self, histories: Sequence[str]) -> list[str]:
        """The reply to the most similar known history, for each of these."""
        queries, answers = self.vectorizer.transform(histories), []
        for start in range(0, len(histories), CHUNK):
            similarity = self.known @ queries[start : start + CHUNK].T.toarray()  # [known, CHUNK]
            answers += [self.replies[index] for index in similarity.argmax(0)]
        return answers
