"""A run: a checked config and the workdir it claims; the tokenizer and examples they make.

A workdir holds config.json, run.json, metrics.jsonl, events.jsonl, goodput.jsonl, checkpoints/,
and, unless the config names other places, tokenizer/ and shards/.

  record   the config as sections, its length and places
  checks   a config to a run, or to the sentence that says what is wrong with it
  workdir  whose it is, and what may change midway
  data     tokenizer and examples
  held     what training holds beside the model
"""

from lm.run.checks import (
    FIGURES,
    STAGES,
    make_run,
    origin_of,
    read_run,
    teacher_of,
    tokenizer_dir,
)
from lm.run.data import (
    Texts,
    check_columns,
    make_examples,
    make_split,
    make_tokenizer,
    shards_of,
    splits,
)
from lm.run.held import begun, held
from lm.run.record import PLAIN_SECTIONS, SECTIONS, Run, pace, total_updates
from lm.run.workdir import (
    check_workdir,
    claim,
    differences,
    is_allowed,
    is_claimed,
    read_config,
    settled,
)

__all__ = [
    "FIGURES",
    "PLAIN_SECTIONS",
    "SECTIONS",
    "STAGES",
    "Run",
    "Texts",
    "begun",
    "check_columns",
    "check_workdir",
    "claim",
    "differences",
    "held",
    "is_allowed",
    "is_claimed",
    "make_examples",
    "make_run",
    "make_split",
    "make_tokenizer",
    "origin_of",
    "pace",
    "read_config",
    "read_run",
    "settled",
    "shards_of",
    "splits",
    "teacher_of",
    "tokenizer_dir",
    "total_updates",
]
