"""What `python -m experiments.pipeline` runs: your corpus, your task, a student of your size.

python -m experiments.pipeline --config=configs/pipeline.py --config.corpus='texts/*.txt' \
    --config.finetune.file=configs/own_task.py --config.workdir=runs/own
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.workdir = "runs/pipeline"  # one folder a run below it
    config.title = "From a corpus to a distilled student"  # of the page
    config.data_dir = ""  # TFDS's directory; empty: {workdir}/tfds
    config.corpus = ""  # of texts, as --source of `corpus`; empty: what pretrain.file reads
    config.clean = "--vocab_size=3968"  # more flags of `corpus`
    config.tokenizer = ""  # a directory of one to use; empty: one is made of the corpus
    config.seed = 0
    config.split = ""  # that is scored, as test; empty: the held-out one
    config.decode = 512  # examples to answer; 0: all
    for stage, steps in (("pretrain", 2000), ("finetune", 1000), ("distill", 1000)):
        config[stage] = ConfigDict()
        config[stage].file = f"configs/{stage}.py"
        config[stage].steps = steps  # updates; 0: as its file says
        config[stage].flags = ""  # of `train`: "--config.model.d_ff=256 --config.seed=1"
    config.distill.file = ""  # that of finetune, with other sizes:
    config.distill.flags = "--config.model.num_encoder_layers=1 --config.model.num_decoder_layers=1"
    return config.lock()
