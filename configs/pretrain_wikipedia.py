"""Pre-train by span corruption on Wikipedia (TFDS wikipedia/20230601.en, ArrayRecord).

python -m lm train --config=configs/pretrain_wikipedia.py:t5_1_1_small --workdir=runs/wikipedia

Cost: T5 1.1 small fits one TPU v5e in 12.3 GiB with bfloat16, scan_layers and 4 micro-batches; an
    update takes at least 217 ms there, all 65,536 at least 4 hours (bounds by preflight,
    experiments/preflight_table.md). Time: not yet measured.
Score: not yet measured.
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
