"""How much of the evaluation data stands in the training data: runs of n words that both have.

  evaluation -> documents -> runs -> 64-bit hashes, sorted    8 bytes a run, all that is held
  training   -> documents -> runs -> hashes -> those found    streamed, by worker processes
  evaluation -> documents -> runs -> how many were found, and where

Two different runs have the same hash with probability 2**-64: 10 million runs of evaluation data
meet one of 10 billion by chance once in about 200 comparisons.
Source: Brown et al. 2020, appendix C, arXiv:2005.14165, whose runs are of 13 words at most.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
import json
from collections.abc import Iterable, Iterator

import numpy as np
import tqdm

from lm import sources
from lm.corpus import dedupe, rules
from lm.shards import finished_corpus, processes

BATCH = 64  # documents that a worker is handed at once
WORST = 5  # documents of each evaluation set that a report shows
SHOWN = 40  # words of their longest match


def words(text: str) -> list[str]:
    """The words by which documents are compared, here and when duplicates are dropped."""
    return rules.split_words(dedupe.PUNCTUATION.sub(" ", dedupe.normalize(text)))


@functools.lru_cache(1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


@functools.cache
def _factors(n: int) -> np.ndarray:
    return np.array([_hash(f"place {place}") | 1 for place in range(n)], np.uint64)


def runs(found: list[str], n: int) -> np.ndarray:
    """A hash of each run of n words, in order: uint64 [max(0, len(found) - n + 1)]."""
    hashes = np.array([_hash(word) for word in found], np.uint64)
    total = np.zeros(max(0, len(found) - n + 1), np.uint64)
    for place, factor in enumerate(_factors(n)):
        total += hashes[place : place + len(total)] * factor  # modulo 2**64
    return total


def known(documents: Iterable[str], n: int) -> np.ndarray:
    """The hashes of all runs of n words in some documents, each once: uint64, ascending."""
    held = [np.unique(runs(words(text), n)) for text in documents]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *held]))


def among(table: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each hash stands in an ascending table, and whether it is there: int [n], bool [n]."""
    if not len(table):
        return np.zeros(len(hashes), np.int64), np.zeros(len(hashes), bool)
    places = np.searchsorted(table, hashes)
    places[places == len(table)] = 0
    return places, table[places] == hashes


def found_in(documents: Iterable[str], table: np.ndarray, n: int) -> np.ndarray:
    """The places in `table` of the runs that some documents have: int, ascending, each once."""
    held = [runs(words(text), n) for text in documents]
    places, there = among(table, np.concatenate([np.empty(0, np.uint64), *held]))
    return np.unique(places[there])


# The comparison. ---------------------------------------------------------------------------------


def _find(table: np.ndarray, n: int, batch: tuple) -> tuple[np.ndarray, dict[str, int]]:
    """The places in `table` of what a batch of (piece, raw records) has, and its counts."""
    counts = dict.fromkeys(("documents", "dropped", "unreadable"), 0)
    return found_in(_texts(*batch, counts), table, n), counts


def _texts(piece, raws, counts: dict[str, int]) -> Iterator[str]:
    """The text of each raw record, "" where it cannot be read or is dropped in reading; counted."""
    for raw in raws:
        try:
            document = piece.document(raw)
        except sources.BadRecord:
            counts["unreadable"] += 1
            yield ""
            continue
        counts["dropped" if document.drop_reason else "documents"] += 1
        yield document.text


def _batches(pieces: Iterable) -> Iterator[tuple]:
    for piece in pieces:
        raws = piece.raw_records()
        while batch := list(itertools.islice(raws, BATCH)):
            yield piece, batch


def search(pieces: list, table: np.ndarray, n: int, workers: int = 1) -> tuple[np.ndarray, dict]:
    """Which of the runs in `table` the pieces of the training data have, and what was read.

    workers: processes, 0 for one a core. Returns bool [len(table)], the same whatever the order of
    the documents, how they are cut into pieces and how many processes read them; and counts of
    documents, of those that the source drops, and of those that cannot be read.
    """
    found, counts = np.zeros(len(table), bool), {}
    progress = tqdm.tqdm(_batches(pieces), desc="training data", unit=f"x{BATCH}", disable=None)
    for seen, more in processes.ordered_map(_find, progress, workers, (table, n)):
        found[seen] = True
        counts = {key: counts.get(key, 0) + more[key] for key in more}
    return found, counts


def measure(pieces: list, table: np.ndarray, found: np.ndarray, n: int) -> dict:
    """How much of an evaluation set was found: JSON.

    documents; short: those of fewer than n words, which have no run; dropped, unreadable: by the
    source; touched, half, whole: documents of whose runs any, at least half, all were found;
    runs, found: in all documents, each as often as it stands there; share: found / runs.
    worst: the documents of the highest share, with the place and the words of the longest match.
    """
    facts = dict.fromkeys(("documents", "dropped", "unreadable", "short"), 0)
    facts |= dict.fromkeys(("touched", "half", "whole", "runs", "found"), 0)

    def matches() -> Iterator[dict]:
        for piece in pieces:
            for record, text in enumerate(_texts(piece, piece.raw_records(), facts)):
                read = words(text)
                places, there = among(table, runs(read, n))
                there &= found[places]
                total, hits = len(there), int(there.sum())
                facts["short"] += bool(text) and not total
                facts["runs"] += total
                facts["found"] += hits
                facts["touched"] += hits > 0
                facts["half"] += 0 < total <= 2 * hits
                facts["whole"] += 0 < total == hits
                if hits:
                    first, length = longest(there)
                    match = " ".join(read[first : first + min(length + n - 1, SHOWN)])
                    place = {"part": piece.name, "record": record, "word": first}
                    yield place | {"share": hits / total, "words": length + n - 1, "text": match}

    worst = heapq.nlargest(WORST, matches(), key=lambda match: (match["share"], match["words"]))
    return facts | {"share": facts["found"] / max(1, facts["runs"]), "worst": worst}


def longest(marks: np.ndarray) -> tuple[int, int]:
    """The first of the longest stretches of True: its start and its length, 0 where none is."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marks.astype(np.int8), [0]])))
    starts, stops = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    place = int(np.argmax(stops - starts))
    return int(starts[place]), int(stops[place] - starts[place])


def measure_overlap(
    source: str, overlap: str, *, n: int = 13, workers: int = 0, column="", unit="file", data_dir=""
) -> dict:
    """What of each evaluation set stands in the training data, by runs of n words: JSON.

    source: the training data. overlap: the evaluation sets, separated by commas. Either names a
    finished corpus by its directory (of which its training split is read for the one, its
    validation split for the other) or a source as sources.list_files reads it, for which column, unit
    and data_dir are. workers: processes; 0 is one a core.
    Raises ValueError for what parts_of refuses, and where no document has n words.
    """
    if n < 1:
        raise ValueError(f"--ngram={n} is no number of words; use 1 or more, as 13 or 8.")
    options = (column, unit, data_dir)
    sets = {
        name: finished_corpus.corpus_or_source_parts(name, "validation", *options)
        for name in overlap.split(",")
    }
    training = [
        piece
        for name in source.split(",")
        for piece in finished_corpus.corpus_or_source_parts(name, "train", *options)
    ]
    counts = dict.fromkeys(("documents", "dropped", "unreadable"), 0)
    texts = (
        _texts(piece, piece.raw_records(), counts) for pieces in sets.values() for piece in pieces
    )
    table = known(itertools.chain.from_iterable(texts), n)
    if not len(table):
        raise ValueError(
            f"--overlap={overlap}: none of its {counts['documents']} documents has {n} words; use "
            f"a smaller --ngram."
        )
    found, read = search(training, table, n, workers)
    if not read.get("documents"):
        raise ValueError(f"--source={source} holds no document to compare with; name another.")
    evaluation = {name: measure(pieces, table, found, n) for name, pieces in sets.items()}
    return {"ngram": n, "training": {"source": source} | read, "evaluation": evaluation}


def format_report(report: dict) -> str:
    """The report of `compare` as lines to print: a row for each evaluation set, and its worst."""
    columns = ("documents", "short", "touched", "half", "whole", "runs", "found")
    width = max(len("evaluation"), *map(len, report["evaluation"]))
    lines = ["  ".join(["evaluation".ljust(width), *(f"{c:>9}" for c in columns), "    share"])]
    for name, facts in report["evaluation"].items():
        numbers = [f"{facts[column]:>9}" for column in columns]
        lines.append("  ".join([name.ljust(width), *numbers, f"{facts['share']:>9.4%}"]))
    for facts in report["evaluation"].values():
        for match in facts["worst"][:1]:
            place = f"{match['part']} record {match['record']}, {match['words']} words"
            lines.append(f"worst: {place}, {match['share']:.0%} found: {match['text']}")
    read = report["training"]
    lines.append(f"runs of {report['ngram']} words; training data: {json.dumps(read)}")
    return "\n".join(lines)
