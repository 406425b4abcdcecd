"""Run every stage on your corpus and task: tokenizer, pre-train, fine-tune, distill, report.

python -m experiments.pipeline --config=configs/pipeline.py --config.corpus='texts/*.txt' \\
  --config.finetune.file=configs/own_task.py --config.workdir=runs/own

Cost: 6,000 updates of the tiny preset over five runs; the demo's 2,200 take about 12 minutes on two
    CPU cores, evaluation included. With the defaults here: not yet measured.
Score: depends on your data; not yet measured. The page compares each stage with a baseline.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.workdir = "runs/pipeline"  # has one folder per run
    config.title = "From a corpus to a distilled student"  # of the page
    config.data_dir = ""  # TFDS's directory; empty: {workdir}/tfds
    config.corpus = ""  # of texts, as --source of `corpus`; empty: the data of pretrain.file
    config.clean = "--vocab_size=3968"  # more flags of `corpus`
    config.tokenizer = ""  # its directory; empty: train one on the corpus
    config.seed = 0
    config.split = ""  # to score, as test; empty: the held-out one
    config.decode = 512  # examples to decode; 0: all
    for stage, steps in (("pretrain", 2000), ("finetune", 1000), ("distill", 1000)):
        config[stage] = ConfigDict()
        config[stage].file = f"configs/{stage}.py"
        config[stage].steps = steps  # updates; 0: those of its file
        config[stage].flags = ""  # of `train`: "--config.model.d_ff=256 --config.seed=1"
    config.distill.file = ""  # empty: that of finetune, with these sizes:
    config.distill.flags = "--config.model.num_encoder_layers=1 --config.model.num_decoder_layers=1"
    return config.lock()
