"""A bar for SentencePiece's fitting, which reports nothing but a log on the standard error."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator

import tqdm

from lm.tokenizer import model

SECONDS = 0.2  # between two looks at the log
SILENT, TOLD = 2, 0  # SentencePiece's minloglevel: errors alone, and all it does


@contextlib.contextmanager
def followed(pieces: int) -> Iterator[int]:
    """Show a bar while SentencePiece fits `pieces`; yields the minloglevel to fit with.

    On a terminal alone: there the standard error is a file meanwhile, from which the bar is read.
    Elsewhere nothing changes, and nothing is shown.
    """
    if not sys.stderr.isatty():
        yield SILENT
        return
    finished = threading.Event()
    with tempfile.TemporaryFile() as log, open(os.dup(2), "w") as screen:
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
        bar = tqdm.tqdm(total=1.0, desc="fitting", bar_format=form, file=screen)

        def follow():
            while not finished.wait(SECONDS):
                said = os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0)
                bar.update(share_done(said.decode("utf-8", "replace"), pieces) - bar.n)

        follower = threading.Thread(target=follow, daemon=True)
        sys.stderr.flush()
        os.dup2(log.fileno(), 2)
        follower.start()
        try:
            yield TOLD
            bar.update(1.0 - bar.n)
        finally:
            os.dup2(screen.fileno(), 2)
            finished.set()
            follower.join()
            bar.close()


def share_done(log: str, pieces: int) -> float:
    """How much of the fitting of `pieces` is done, in [0, 1], by what SentencePiece has logged.

    bpe joins pairs until there are enough. unigram drops a quarter of its candidates a round,
    until there are 1.1 times `pieces`; while it looks for candidates, nothing is known.
    """
    last = lambda what: int(found[-1]) if (found := re.findall(what, log)) else None
    joined, alphabet = last(r"merges=(\d+)"), last(r"Alphabet size=(\d+)")
    if joined is not None and alphabet is not None:
        return min(joined / max(pieces - model.BYTE_VOCAB_SIZE - alphabet, 1), 1.0)
    first, left = last(r"Initialized (\d+) seed"), last(r"EM sub_iter=\d+ size=(\d+)")
    if not first or not left or first <= 1.1 * pieces:
        return 0.0
    return min(max(math.log(first / left) / math.log(first / (1.1 * pieces)), 0.0), 1.0)
