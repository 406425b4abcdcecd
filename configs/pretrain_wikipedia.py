"""Span corruption on Wikipedia as TFDS stores it (wikipedia/20230601.en, ArrayRecord).

python -m lm train --config=configs/pretrain_wikipedia.py:t5_1_1_small --workdir=runs/wikipedia
"""

from configs import base, models


def get_config(preset: str = "t5_1_1_small"):
    config = models.apply(base.get_config(), preset)
    config.data.task = "wikipedia"
    if preset == "tiny":  # a trial in minutes on two cores
        config.steps = 600
        config.data.update(input_length=128, batch_size=8)
        config.optimizer.update(learning_rate=0.02, schedule="cosine")
        config.optimizer.warmup.steps = 20
        config.update(log_every_steps=50, eval_every_steps=150)
        config.checkpoint.every_steps = 150
    return config
