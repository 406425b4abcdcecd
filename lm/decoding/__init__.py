"""Decode with any step function, independent of the model.

config             DecodingConfig, and its short form for flags
logits_processors  logits to logits: penalties, top-k, top-p
stepwise           one token of greedy search or sampling; the types of all methods
beam               beam search
dispatch           search: all methods behind one signature
"""

from lm.decoding.config import LENGTH_PENALTIES, METHODS, DecodingConfig, parse
from lm.decoding.dispatch import search
from lm.decoding.stepwise import DecodeState, Hypotheses, decode_token, init_state
