"""What `make demo` runs, in updates per stage; --config=configs/demo.py:minute is a cut."""

from ml_collections import ConfigDict

from lm import choose

CUTS = {"full": (1000, 300, 300, 256), "minute": (10, 10, 10, 32)}


def get_config(cut: str = "full"):
    pretrain, finetune, distill, decode = choose.choose(CUTS, cut, "the cut after the colon")
    config = ConfigDict()
    config.workdir = "runs/demo"  # one folder a run below it
    config.data_dir = ""  # where the pydocs dataset is built; empty: {workdir}/tfds
    config.tokenizer = ""  # an earlier tokenizer to use; empty: {workdir}/pretrain/tokenizer
    config.seed = 0
    config.pretrain = pretrain  # updates
    config.finetune = finetune  # updates, from the pre-trained weights and from scratch
    config.distill = distill  # updates, with the teacher and without
    config.decode = decode  # held-out examples to answer
    return config.lock()
