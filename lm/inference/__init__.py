"""Use a trained run: generate answers to inputs.

loading     open a workdir: checkpoints, parameters, tokenizer
generate    texts to answers in batches, one compiled program for each bucket of lengths
prompts     files, splits and rows as the model's inputs
prediction  a file of answers, resumable
dialogue    chat at a terminal, streamed, with a history
"""

from lm.inference.dialogue import Chat, Stream, chat, interactive, stream_text
from lm.inference.generate import Answer, Generator
from lm.inference.loading import (
    decoding_config,
    open_checkpoints,
    open_run,
    open_workdir,
    read_params,
    read_trainable_params,
)
from lm.inference.prediction import predict
from lm.inference.prompts import InputFile, SplitInputs
