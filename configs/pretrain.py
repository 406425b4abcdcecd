"""Masked language modelling on the docstrings of the installed packages, in minutes on two cores.

python -m lm corpus --config=configs/pretrain.py --workdir=runs/pretrain
python -m lm train --config=configs/pretrain.py --workdir=runs/pretrain
"""

from configs import base, models


def get_config(preset: str = "tiny"):
    config = models.apply(base.get_config(), preset)
    config.steps = 1500
    config.data.update(input_length=128, batch_size=32)
    config.optimizer.update(name="adamw", peak=3e-3, schedule="cosine", warmup=150)
    config.every.update(log=50, evaluate=500, checkpoint=500)
    return config
