"""Run the demo (`make demo`): pre-train, fine-tune, distill; configs/demo.py:minute is a short run.

python -m experiments.pipeline --config=configs/demo.py

Cost: about 12 minutes on two CPU cores; with `minute` 10 updates per stage.
Score: 5.468 nats per text token after pre-training, 4.710 nats per token after fine-tuning, 4.772
    for the student, means of three seeds, experiments/claims.md.
"""

from configs import pipeline
from lm import lookup

LENGTHS = {"full": (1000, 300, 300, 256), "minute": (10, 10, 10, 32)}


def get_config(length: str = "full"):
    *steps, decode = lookup.lookup(LENGTHS, length, "the length after the colon")
    config = pipeline.get_config()
    config.update(
        workdir="runs/demo", title="From docstrings to a distilled student", decode=decode
    )
    for stage, updates in zip(("pretrain", "finetune", "distill"), steps, strict=True):
        config[stage].steps = updates
    config.distill.update(file="configs/distill.py", flags="")
    return config
