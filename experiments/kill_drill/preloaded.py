"""Imports the modules of a run once, in the fork server."""

import array_record.python.array_record_module
import grain
import jax
import orbax.checkpoint
import sentencepiece
import tensorboardX
import tensorflow_datasets
import tqdm

import lm.cli
import lm.evaluate
import lm.interop
import lm.train

LOADED = (array_record, grain, jax, orbax, sentencepiece, tensorboardX, tensorflow_datasets, tqdm)
LOADED += (lm.cli, lm.evaluate, lm.interop, lm.train)
