"""Runs: a checked config, the workdir that it claims, its tokenizer and examples.

A workdir contains config.json, run.json, metrics.jsonl, events.jsonl, goodput.jsonl, checkpoints/,
tokenizer/, and shards/ unless data.shards_dir names another directory.

  schema        Run: the config as frozen dataclasses
  checks        make_run: check a config and return it as a Run
  renamed_keys  RENAMED_KEYS: config keys of older versions
  workdir       claiming a workdir, and comparing configs with it
  data          tokenizer and examples
  projections   trained parameters beside the model
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
