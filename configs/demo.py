"""What `make demo` runs, in updates per stage; --config=configs/demo.py:minute is a cut."""

from ml_collections import ConfigDict


def get_config(cut: str = "full"):
    full = cut == "full"
    config = ConfigDict()
    config.workdir = "runs/demo"  # one folder a run below it
    config.data_dir = ""  # where the pydocs dataset is built; empty: {workdir}/tfds
    config.tokenizer = ""  # an earlier tokenizer to use; empty: {workdir}/pretrain/tokenizer
    config.seed = 0
    config.pretrain = 350 if full else 10  # updates
    config.finetune = 150 if full else 10  # updates, from the pre-trained weights and from scratch
    config.distill = 150 if full else 10  # updates, with the teacher and without
    config.decode = 256 if full else 32  # held-out examples to answer
    return config.lock()
