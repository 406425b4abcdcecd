"""Laws of the bar: it follows SentencePiece's own log, and changes neither model nor screen."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from lm import tokenizer
from lm.tokenizer import progress
from tests.tiny_data import varied_texts

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("kind, pieces", [("unigram", 400), ("bpe", 700)])
def test_the_share_done_grows_with_the_log_from_nothing_to_all(
    tmp_path, capfd, monkeypatch, kind, pieces
):
    monkeypatch.setattr(progress, "SILENT", progress.TOLD)
    tokenizer.train(varied_texts(), tmp_path, kind=kind, pieces=pieces)
    lines = capfd.readouterr().err.splitlines()
    shares = [progress.share_done("\n".join(lines[:i]), pieces) for i in range(len(lines) + 1)]
    assert shares == sorted(shares) and len(set(shares)) >= 4
    assert shares[0] == 0 and 0.6 < shares[-1] <= 1


def test_a_log_that_says_nothing_or_too_much_is_no_error():
    for log in ("", "EM sub_iter=0 size=5", "Initialized 9 seed pieces\nEM sub_iter=0 size=9"):
        assert progress.share_done(log, 700) == 0
    barely = "Initialized 11 seed pieces\nEM sub_iter=0 size=11"
    assert progress.share_done(barely, 10) == 0
    over = "Alphabet size=9\nmerges=999\nInitialized 9 seed pieces"
    assert progress.share_done(over, 700) == 1
    less = "Initialized 99999 seed pieces\nEM sub_iter=1 size=3"
    assert progress.share_done(less, 700) == 1


ON_A_TERMINAL = """
import sys; sys.path[:0] = sys.argv[1:2]
from lm import tokenizer
from tests.tiny_data import varied_texts
for kind in ("unigram", "bpe"):
    print(tokenizer.train(varied_texts(), sys.argv[2], kind=kind, pieces=400).fingerprint)
    print("after", kind, file=sys.stderr)
try:
    tokenizer.train(varied_texts(), sys.argv[2])
except ValueError as error:
    print("still here:", error, file=sys.stderr)
"""


def test_a_terminal_sees_a_bar_the_same_model_comes_out_and_errors_are_seen(tmp_path):
    master, slave = os.openpty()
    command = [sys.executable, "-c", ON_A_TERMINAL, str(ROOT), str(tmp_path)]
    with subprocess.Popen(command, stderr=slave, stdout=subprocess.PIPE, text=True) as process:
        os.close(slave)
        screen = b""
        while data := read(master):
            screen += data
        fingerprints = process.stdout.read().split()
    os.close(master)
    screen = screen.decode()
    assert (
        screen.count("fitting: 100%") >= 2 and "after bpe" in screen.partition("after unigram")[2]
    )
    assert "still here: tokenizer.vocab_size=32000 is more" in screen
    assert "trainer" not in screen, "SentencePiece's own log stays away"
    quiet = [
        tokenizer.train(varied_texts(), tmp_path, kind=kind, pieces=400).fingerprint
        for kind in ("unigram", "bpe")
    ]
    assert fingerprints == quiet


def read(master: int) -> bytes:
    """What is there of a terminal's output; nothing once the other side is closed."""
    try:
        return os.read(master, 65536)
    except OSError:  # Linux's way to say so
        return b""
