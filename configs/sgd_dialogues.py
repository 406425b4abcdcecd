"""Conversation: the next turn of a dialogue from all turns before it, on two CPU cores.

python -m lm train --config=configs/sgd_dialogues.py:runs/pretrain --workdir=runs/sgd

Of a long history the latest turns are read. The last 2 % of train are held out; validation is the
test.
"""

from configs import multi30k


def get_config(preset: str = "tiny"):
    config = multi30k.get_config(preset)
    config.data.update(task="sgd_dialogues", train_split="train[:98%]", heldout_split="train[98%:]")
    config.data.update(input_length=128, target_length=48, packing="none", batch_size=16)
    return config
