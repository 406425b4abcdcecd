"""Objectives: make an example (inputs, targets) of a text by hiding tokens.

table            the config, the table of objectives, lengths, corrupt and uncorrupt
noise_masks      which tokens are hidden
corruption       inputs and targets from a text and its mask, and back
example_lengths  lengths of inputs and targets, so that every batch has one shape

Examples of the text 10 11 12 13 14 15 16. x: hidden; S0, S1: sentinels; both end with eos.

                   10 11 12 13 14 15 16     inputs               targets
  span_corruption        x  x        x      10 11 S0 14 15 S1    S0 12 13 S1 16
  iid_replace         x     x  x            10 S0 12 S1 15 16    S0 11 S1 13 14
  token_masking       x     x        x      10 S0 12 S0 14 15 S0 11 13 16, or the whole text
  mass                x  x  x               10 S0 S0 S0 14 15 16 11 12 13
  drop                x     x        x      10 12 14 15          11 13 16
  gap_sentences    x  x                     S0 12 13 14 15 16    10 11  (11 and 16 end sentences)
  prefix_lm                    x  x  x      10 11 12 13          14 15 16
  language_model   x  x  x  x  x  x  x      (only eos)           10 11 12 13 14 15 16
  deshuffling      x  x  x  x  x  x  x      14 10 16 12 11 15 13 10 11 12 13 14 15 16
  ul2              one of seven kinds of span_corruption and prefix_lm, after its mode's token
"""

from __future__ import annotations

from lm.objectives.example_lengths import Lengths
from lm.objectives.noise_masks import Vocabulary
from lm.objectives.table import (
    OBJECTIVES,
    UL2,
    ObjectiveConfig,
    check_sentinels,
    corrupt,
    lengths,
    noise_mask,
    uncorrupt,
)
