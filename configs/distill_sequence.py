"""A student learns what its teacher says, instead of what is right: sequence-level distillation.

python -m lm predict --workdir=runs/finetune --split=train --decoding="beam num_beams=4" \
  --out=runs/finetune/answers.jsonl
python -m lm train --config=configs/distill_sequence.py:runs/finetune --workdir=runs/distill

What is held out stays the task's own. Source: Kim and Rush 2016, arXiv:1606.07947.
"""

from configs import distill


def get_config(preset: str = "tiny"):
    config = distill.get_config(preset)
    config.teacher.loss = dict(labels=dict(weight=1.0))
    config.data.train_split = f"{config.teacher.workdir or 'runs/finetune'}/answers.jsonl"
    config.data.shards_dir = ""
    return config
