"""A fine-tuned run distilled into a student with a quarter of its layers, on the same data.

python -m lm train --config=configs/distill.py:runs/finetune --workdir=runs/distill
"""

from configs import finetune


def get_config(preset: str = "tiny"):
    config = finetune.get_config(preset)
    config.stage = "distill"
    config.teacher.workdir, config.init_from = config.init_from, ""  # where the preset is a run
    if config.teacher.workdir:
        from lm import runs

        theirs = runs.read_config(config.teacher.workdir)
        for section in ("data", "objective"):
            for key in config[section]:
                config[section][key] = theirs[section][key]
    config.model.num_encoder_layers = max(1, config.model.num_encoder_layers // 4)
    config.model.num_decoder_layers = max(1, config.model.num_decoder_layers // 4)
    return config
