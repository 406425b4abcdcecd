"""Runs: a checked config and the workdir it claims; its tokenizer and examples.

A workdir holds config.json, run.json, metrics.jsonl, events.jsonl, goodput.jsonl, checkpoints/,
and, unless the config names other directories, tokenizer/ and shards/.

  schema        Run: the config as frozen dataclasses
  checks        make_run: a config to a Run, or to a sentence that says what is wrong with it
  renamed_keys  RENAMED_KEYS: the keys of older versions
  workdir       who claims it, and what may change midway
  data          tokenizer and examples
  projections   what training holds beside the model
"""

from lm.runs.checks import (
    HELDOUT_METRICS,
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
    shard_dirs,
    splits,
)
from lm.runs.projections import trained_shapes, with_projections
from lm.runs.renamed_keys import RENAMED_KEYS
from lm.runs.schema import (
    SECTIONS,
    STAGES,
    EvaluateConfig,
    GuardConfig,
    Run,
    run_length,
    total_updates,
)
from lm.runs.workdir import (
    check_workdir,
    claim,
    differences,
    is_allowed,
    is_claimed,
    read_config,
    without_operational,
)
