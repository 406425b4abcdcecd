"""Evaluate a run: held-out losses, baselines and task scores, with intervals.

heldout     the loss of held-out examples, and unigram baselines
scores      answers against references, by the metrics of a task
curve       plot the scores of several checkpoints
evaluation  all of these for a run, written into its workdir
"""

from lm.evaluate.evaluation import evaluate, evaluate_all
from lm.evaluate.heldout import HeldOut, unigram_baselines
from lm.evaluate.scores import TaskScorer, references, task_texts
