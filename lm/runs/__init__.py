"""A run: a checked config and the workdir it claims; the tokenizer and examples they make.

A workdir holds config.json, run.json, metrics.jsonl, events.jsonl, goodput.jsonl, checkpoints/,
and, unless the config names other places, tokenizer/ and shards/.

  record   the config as sections, its length and places
  checks   a config to a run, or to the sentence that says what is wrong with it
  workdir  whose it is, and what may change midway
  data     tokenizer and examples
  held     what training holds beside the model
"""

from lm.runs.checks import (
    FIGURES,
    STAGES,
    init_source,
    make_run,
    read_run,
    teacher_source,
    tokenizer_dir,
)
from lm.runs.data import (
    Texts,
    check_columns,
    make_examples,
    make_split,
    make_tokenizer,
    shards_of,
    splits,
)
from lm.runs.projections import trained_shapes, with_projections
from lm.runs.schema import PLAIN_SECTIONS, SECTIONS, Run, pace, total_updates
from lm.runs.workdir import (
    check_workdir,
    claim,
    differences,
    is_allowed,
    is_claimed,
    read_config,
    settled,
)
