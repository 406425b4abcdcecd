"""AdamW's fine-tuning: 1e-4 that rises and falls linearly, dropout 0.1; stops when it is no better.

python -m lm train --config=configs/finetune_adamw.py:runs/pretrain --workdir=runs/finetune

The preset or run's folder after the colon says what to start from. Source: 1e-4, which T5 models
want of AdamW, is the lower of the two rates that the T5 page of transformers' documentation names.
"""

from configs import base, models


def get_config(preset: str = "t5_1_1_small"):
    config = models.apply(base.get_config(), preset)
    config.stage = "finetune"
    config.steps, config.duration.epochs = 0, 10.0
    config.model.dropout_rate = 0.1
    config.data.update(task="aeslc", target_length=128, batch_size=64)
    config.optimizer.update(name="adamw", learning_rate=1e-4, schedule="linear", weight_decay=0.01)
    config.optimizer.beta2 = 0.999
    config.optimizer.warmup.update(steps=0, percent=6.0)
    config.eval_every_steps = 500
    config.checkpoint.every_steps = 500
    config.checkpoint.best_metric, config.early_stopping_patience = "nats", 5
    return config
