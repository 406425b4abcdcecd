"""Search over any step function; it knows no model.

words     Decoding: a method and its options, read from one string by parse
filters   logits to logits: what may be said next
walk      greedy and sampling: one token at a time, said for good; begin and advance, to stream
beam      beam search
search    all of them behind one signature
"""

from lm.decoding.config import METHODS, PENALTIES, STOPS, DecodingConfig, parse
from lm.decoding.dispatch import search
from lm.decoding.stepwise import DecodeState, Hypotheses, advance, begin
