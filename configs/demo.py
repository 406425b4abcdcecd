"""What `make demo` runs, in updates per stage; --config=configs/demo.py:minute is a cut."""

from configs import pipeline
from lm import lookup

CUTS = {"full": (1000, 300, 300, 256), "minute": (10, 10, 10, 32)}


def get_config(cut: str = "full"):
    *steps, decode = lookup.lookup(CUTS, cut, "the cut after the colon")
    config = pipeline.get_config()
    config.update(
        workdir="runs/demo", title="From docstrings to a distilled student", decode=decode
    )
    for stage, updates in zip(("pretrain", "finetune", "distill"), steps, strict=True):
        config[stage].steps = updates
    config.distill.update(file="configs/distill.py", flags="")
    return config
