"""Summarization: the subject line of an email from its body, on two CPU cores.

python -m lm train --config=configs/aeslc.py:runs/pretrain --workdir=runs/aeslc

TFDS's copy has train and validation here, so its last 2 % are held out and validation is the test.
"""

from configs import multi30k


def get_config(preset: str = "tiny"):
    config = multi30k.get_config(preset)
    config.data.update(task="aeslc", train_split="train[:98%]", heldout_split="train[98%:]")
    config.data.update(input_length=256, target_length=32, packing="none", batch_size=16)
    return config
