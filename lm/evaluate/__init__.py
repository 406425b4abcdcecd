"""A run evaluated and used: held-out loss, baselines, task scores; answers to inputs.

reading   a run's checkpoints, parameters and tokens, opened to be read
heldout   the loss of held-out examples
answers   inputs to what the model decodes
scores    answers to a task's scores
curve     the scores of several checkpoints, drawn
command   all of it for a run, written into its workdir
predict   a file of inputs to a file of answers
talk      inputs by hand, answers as they are found
"""

from lm.evaluate.answers import Answer, Answers
from lm.evaluate.command import evaluate, evaluate_all
from lm.evaluate.heldout import HeldOut, unigram_baselines
from lm.evaluate.predict import Inputs, Split, predict
from lm.evaluate.reading import open_checkpoints, open_run, read_params, read_trained
from lm.evaluate.scores import Judge, references, task_texts
from lm.evaluate.talk import Stream, Talk, converse, interactive, pieces

__all__ = [
    "Answer",
    "Answers",
    "HeldOut",
    "Inputs",
    "Judge",
    "Split",
    "Stream",
    "Talk",
    "converse",
    "evaluate",
    "evaluate_all",
    "interactive",
    "open_checkpoints",
    "open_run",
    "pieces",
    "predict",
    "read_params",
    "read_trained",
    "references",
    "task_texts",
    "unigram_baselines",
]
