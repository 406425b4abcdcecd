"""Masked language modelling on the docstrings of the installed packages, in minutes on two cores.

python -m lm corpus --config=configs/pretrain.py --workdir=runs/pretrain
python -m lm train --config=configs/pretrain.py --workdir=runs/pretrain
"""

from configs import base, models


def get_config(preset: str = "tiny"):
    config = models.apply(base.get_config(), preset)
    config.steps = 5000
    config.data.update(input_length=96, batch_size=8)
    config.objective.update(
        noise_density=0.5, mean_noise_span_length=5.0
    )  # in a short run, every target counts
    config.optimizer.update(learning_rate=0.02, schedule="cosine")
    config.optimizer.warmup.steps = 20
    config.update(log_every_steps=50, eval_every_steps=500)
    config.checkpoint.every_steps = 100
    return config
