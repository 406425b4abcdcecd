"""Distill a fine-tuned run into a student with a quarter of its layers, on the same data.

python -m lm train --config=configs/distill.py:runs/finetune --workdir=runs/distill

Cost: planned for two CPU cores: the demo's student has 1.6 million parameters, and its teacher 3.4
    million run beside it. Time and memory: not yet measured.
Score: 4.772 nats per token and 11.0 ROUGE-L after 300 updates (without a teacher 5.649 and 11.3),
    means of three seeds, experiments/claims.md.
"""

from configs import finetune


def get_config(preset: str = "tiny"):
    config = finetune.get_config(preset)
    config.stage = "distill"
    config.teacher.workdir, config.init_from = config.init_from, ""  # if the preset is a run
    if config.teacher.workdir:
        from lm import runs

        teacher = runs.read_config(config.teacher.workdir)
        for section in ("data", "objective"):
            for key in config[section]:
                config[section][key] = teacher[section][key]
    config.model.num_encoder_layers = max(1, config.model.num_encoder_layers // 4)
    config.model.num_decoder_layers = max(1, config.model.num_decoder_layers // 4)
    return config
