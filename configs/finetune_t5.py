"""Fine-tune as T5: Adafactor at a constant 1e-3, dropout 0.1; keep the best on validation.

python -m lm train --config=configs/finetune_t5.py:runs/pretrain --workdir=runs/finetune

The preset or run folder after the colon names the model. Source: Raffel et al. 2020,
arXiv:1910.10683, section 3.1.3: 2^18 updates of 128 rows, a checkpoint at every 5,000.
Cost: T5 1.1 small takes 2.8e13 FLOPs per update, 7.2e18 in all: at least 2 hours on one H100 at its
    peak of 989 TFLOP/s. Time: not yet measured.
Score: not yet measured.
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
