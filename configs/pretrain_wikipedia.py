"""Span corruption on Wikipedia as TFDS stores it (wikipedia/20230601.en, ArrayRecord).

python -m lm train --config=configs/pretrain_wikipedia.py:t5_1_1_small --workdir=runs/wikipedia
"""

from configs import base, models


def get_config(preset: str = "t5_1_1_small"):
    config = models.apply(base.get_config(), preset)
    config.data.task = "wikipedia"
    if preset == "tiny":  # a trial in minutes on two cores
        config.steps = 1000
        config.data.update(input_length=128, batch_size=32)
        config.optimizer.update(name="adamw", peak=3e-3, schedule="cosine", warmup=100)
        config.every.update(log=50, evaluate=250, checkpoint=250)
    return config
