"""Use a trained run: decode inputs to answers.

loading   open a run: its checkpoints, parameters, tokenizer
generate  texts to answers in batches, one compiled program a bucket of lengths
predict   a file of inputs to a file of answers, resumable
chat      answers token by token at a terminal, with the history of a dialogue
"""

from lm.inference.dialogue import Chat, Stream, chat, interactive, pieces
from lm.inference.generate import Answer, Generator
from lm.inference.loading import open_checkpoints, open_run, read_params, read_trained
from lm.inference.prediction import Inputs, Split, predict
