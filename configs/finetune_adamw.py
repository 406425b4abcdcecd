"""Fine-tune with AdamW: linear schedule with a peak of 1e-4, dropout 0.1, early stopping.

python -m lm train --config=configs/finetune_adamw.py:runs/pretrain --workdir=runs/finetune

The preset or run folder after the colon names the model. Source: the T5 page of transformers'
documentation recommends 1e-4 or 3e-4 for AdamW; this is the lower of the two.
Cost: T5 1.1 small takes 7.0e12 FLOPs per update, for at most 10 epochs; planned for one GPU or TPU.
    Time: not yet measured.
Score: not yet measured.
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
