"""Search over any step function; it knows no model.

words     Decoding: a method and its options, read from one string by parse
filters   logits to logits: what may be said next
walk      greedy and sampling: one token at a time, said for good; begin and advance, to stream
beam      beam search
search    all of them behind one signature
"""

from lm.decoding.search import search
from lm.decoding.walk import Hypotheses, Walk, advance, begin
from lm.decoding.words import METHODS, PENALTIES, STOPS, Decoding, parse

__all__ = [
    "METHODS",
    "PENALTIES",
    "STOPS",
    "Decoding",
    "Hypotheses",
    "Walk",
    "advance",
    "begin",
    "parse",
    "search",
]
