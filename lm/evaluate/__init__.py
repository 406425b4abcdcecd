"""A run evaluated and used: held-out loss, baselines, task scores; answers to inputs.

reading   a run's checkpoints, parameters and tokens, opened to be read
heldout   the loss of held-out examples
answers   inputs to what the model decodes
scores    answers to a task's scores
command   all of it for a run, written into its workdir
"""

from lm.evaluate.answers import Answers, predict
from lm.evaluate.command import evaluate
from lm.evaluate.heldout import HeldOut, unigram_baselines
from lm.evaluate.reading import open_checkpoints, open_run, read_params
from lm.evaluate.scores import score, task_texts

__all__ = [
    "Answers",
    "HeldOut",
    "evaluate",
    "open_checkpoints",
    "open_run",
    "predict",
    "read_params",
    "score",
    "task_texts",
    "unigram_baselines",
]
