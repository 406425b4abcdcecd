"""N-gram overlap: how much of the evaluation data is contained in the training data.

  evaluation -> documents -> n-grams -> sorted 64-bit hashes    8 bytes an n-gram in memory
  training   -> documents -> n-grams -> hashes found            streamed by worker processes
  evaluation -> documents -> n-grams -> counts of those found

Two n-grams collide with probability 2^-64: about one in 200 comparisons of 10 million evaluation
n-grams with 10 billion training n-grams reports a false match.
Source: Brown et al. 2020, appendix C, arXiv:2005.14165, with n-grams of up to 13 words.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tqdm

from lm import sources
from lm.corpus import dedupe
from lm.shards import finished_corpus, processes

BATCH_DOCUMENTS = 64  # per item of a worker process
COUNTS = ("documents", "skipped", "touched", "whole", "runs", "found")

Files = list[sources.SourceFile] | list[finished_corpus.CorpusShard]


@functools.lru_cache(1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


@functools.cache
def _factors(n: int) -> np.ndarray:
    return np.array([_hash(f"place {index}") | 1 for index in range(n)], np.uint64)


def ngrams(text: str, n: int) -> np.ndarray:
    """A hash of each run of n words, in order: uint64 [max(0, words - n + 1)]."""
    words = dedupe.comparison_words(dedupe.normalize(text))
    return dedupe.ngram_hashes(np.array([_hash(word) for word in words], np.uint64), _factors(n))


def unique_ngrams(documents: Iterable[str], n: int) -> np.ndarray:
    """The distinct hashes of n-grams in the documents: uint64, ascending."""
    hashes = [np.unique(ngrams(text, n)) for text in documents]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))


def _is_in(hashes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Whether each hash is in an ascending table: bool [n]."""
    if not len(table):
        return np.zeros(len(hashes), bool)
    return table[np.minimum(np.searchsorted(table, hashes), len(table) - 1)] == hashes


def _texts(file: Any, records: Iterable, counts: Counter) -> Iterator[str]:
    """The text of each raw record; counts them, and those that the source drops or cannot read."""
    for raw in records:
        try:
            document = file.document(raw)
        except sources.BadRecord:
            document = sources.Document("", "unreadable")
        counts["skipped" if document.drop_reason else "documents"] += 1
        yield document.text


def _find(table: np.ndarray, n: int, batch: tuple[Any, list]) -> tuple[np.ndarray, Counter]:
    """The n-grams of a batch (file, raw records) that are in `table`; and counts of records."""
    counts = Counter()
    hashes = unique_ngrams(_texts(*batch, counts), n)
    return hashes[_is_in(hashes, table)], counts


def _batches(files: Files) -> Iterator[tuple[Any, list]]:
    for file in files:
        records = file.raw_records()
        while batch := list(itertools.islice(records, BATCH_DOCUMENTS)):
            yield file, batch


def search(files: Files, table: np.ndarray, n: int, workers: int = 1) -> tuple[np.ndarray, Counter]:
    """The n-grams of an ascending table that the training files contain; and counts of records.

    workers: processes, 0 for one a core; the result does not depend on it.
    """
    is_found, counts = np.zeros(len(table), bool), Counter()
    with tqdm.tqdm(desc="searching", unit=" records", disable=None) as progress:
        for hits, read in processes.ordered_map(_find, _batches(files), workers, (table, n)):
            is_found[np.searchsorted(table, hits)] = True
            counts.update(read)
            progress.update(read.total())
    return table[is_found], counts


def count_overlap(files: Files, found_ngrams: np.ndarray, n: int) -> dict:
    """Count how much of an evaluation set the training data contain.

    found_ngrams: those of the training data, ascending. Returns documents; skipped: records that
    the source drops or cannot read; touched, whole: documents of which any, all n-grams are found;
    runs, found: n-grams, and those found, with repetition; share: found / runs.
    """
    counts = Counter()
    for file in files:
        for text in _texts(file, file.raw_records(), counts):
            is_hit = _is_in(ngrams(text, n), found_ngrams)
            runs, hits = len(is_hit), int(is_hit.sum())
            counts.update(touched=hits > 0, whole=0 < runs == hits, runs=runs, found=hits)
    share = counts["found"] / max(1, counts["runs"])
    return {key: counts[key] for key in COUNTS} | {"share": share}


def measure_overlap(
    source: str,
    evaluation: str,
    *,
    n: int = 13,
    workers: int = 0,
    column: str = "",
    unit: str = "file",
    data_dir: str = "",
) -> dict:
    """Report how much of each evaluation set is in the training data, as JSON.

    Args:
        source: the training data: finished corpora (their training split) or sources, separated by
            commas.
        evaluation: the evaluation sets, likewise; of a corpus its validation split.
        n: words of an n-gram.
        workers: processes; 0 for one a core.
        column, unit, data_dir: as in sources.list_files.

    Raises ValueError as list_files does, and if no evaluation document has n words.
    """
    if n < 1:
        raise ValueError(f"--ngram={n} is below 1; use 13 or 8 words.")
    options = {"column": column, "unit": unit, "data_dir": data_dir}
    list_files = lambda name, split: finished_corpus.list_files(name, split, **options)
    sets = {name: list_files(name, "validation") for name in evaluation.split(",")}
    training = [file for name in source.split(",") for file in list_files(name, "train")]
    counts = Counter()
    texts = (_texts(file, file.raw_records(), counts) for file in itertools.chain(*sets.values()))
    table = unique_ngrams(itertools.chain.from_iterable(texts), n)
    if not len(table):
        raise ValueError(
            f"--overlap={evaluation}: none of its {counts['documents']} documents has {n} words; "
            f"use a smaller --ngram."
        )
    found_ngrams, read = search(training, table, n, workers)
    if not read["documents"]:
        raise ValueError(f"--source={source} has no documents; name another.")
    training = {"source": source, "documents": read["documents"], "skipped": read["skipped"]}
    facts = {name: count_overlap(files, found_ngrams, n) for name, files in sets.items()}
    return {"ngram": n, "training": training, "evaluation": facts}


def format_report(report: dict) -> str:
    """Format the report of `measure_overlap` as a table with a row for each evaluation set."""
    width = max(len("evaluation"), *map(len, report["evaluation"]))
    lines = ["  ".join(["evaluation".ljust(width), *(f"{c:>9}" for c in COUNTS), "    share"])]
    for name, facts in report["evaluation"].items():
        numbers = [f"{facts[column]:>9}" for column in COUNTS]
        lines.append("  ".join([name.ljust(width), *numbers, f"{facts['share']:>9.4%}"]))
    training = json.dumps(report["training"])
    return "\n".join([*lines, f"{report['ngram']}-grams of words; training data: {training}"])
