"""Text into (inputs, targets), one example at a time: hide something, ask for it back.

  tokens           10 11 12 13 14 15 16     eos ends both halves; S0, S1 are sentinels

  span_corruption        x  x        x      each hidden span leaves a sentinel of its own
                   10 11 S0    14 15 S1     S0 12 13 S1 16
  iid_replace         x     x  x            the same for each run of tokens hidden one by one
                   10 S0 12 S1    15 16     S0 11 S1 13 14
  token_masking       x     x        x      each hidden token leaves the same mask token, S0
                   10 S0 12 S0 14 15 S0     11 13 16, or the whole text
  mass                x  x  x               the same for one span
                   10 S0 S0 S0 14 15 16     11 12 13
  drop                x     x        x      hidden tokens leave nothing
                   10 12 14 15              11 13 16
  gap_sentences    x  x                     each hidden sentence leaves S0 (here 11, 16 end one)
                   S0 12 13 14 15 16        10 11
  prefix_lm                    x  x  x      the end of the text is asked for
                   10 11 12 13              14 15 16
  language_model   x  x  x  x  x  x  x      all of it is
                                            10 11 12 13 14 15 16
  deshuffling      x  x  x  x  x  x  x      all of it, given in another order
                   14 10 16 12 11 15 13     10 11 12 13 14 15 16
  ul2              one of seven kinds of span_corruption and prefix_lm, behind its mode's token

Lengths follow from the length of the text, exactly or as the most they can be, so that every batch
of a run has one shape.
"""

from __future__ import annotations

from lm.objectives.example_lengths import Lengths
from lm.objectives.noise_masks import Vocabulary
from lm.objectives.table import (
    MODES,
    OBJECTIVES,
    UL2,
    ObjectiveConfig,
    check_sentinels,
    corrupt,
    lengths,
    noise_mask,
    restore,
)
