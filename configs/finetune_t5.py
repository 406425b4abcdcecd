"""T5's fine-tuning: Adafactor at a constant 1e-3, dropout 0.1; the best on validation is kept.

python -m lm train --config=configs/finetune_t5.py:runs/pretrain --workdir=runs/finetune

The preset or run's folder after the colon says what to start from. Source: Raffel et al. 2020,
arXiv:1910.10683, section 3.1.3: 2^18 updates of 128 rows, a checkpoint at every 5,000.
"""

from configs import base, models


def get_config(preset: str = "t5_1_1_small"):
    config = models.apply(base.get_config(), preset)
    config.stage = "finetune"
    config.steps = 262_144
    config.model.dropout_rate = 0.1
    config.data.update(task="aeslc", packing="first_fit")
    config.data.update(input_length=512, target_length=512, batch_size=128)
    config.optimizer.update(name="adafactor", learning_rate=1e-3, schedule="constant")
    config.optimizer.warmup.steps = 0
    config.eval_every_steps = 5000
    config.checkpoint.every_steps = 5000
    config.checkpoint.update(keep_period=5000, best_metric="nats")
    return config
