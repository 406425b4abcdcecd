"""Fine-tune on WMT 2014, English to German, as T5; keep the best checkpoint by BLEU.

python -m lm train --config=configs/wmt14_en_de.py:runs/pretrain --workdir=runs/wmt14
python -m lm evaluate --workdir=runs/wmt14 --split=test --step=best

Rows are shorter than T5's. Decodes with 4 beams. Source: Raffel et al. 2020, arXiv:1910.10683,
section 3.7.
Cost: T5 1.1 small takes 1.3e13 FLOPs per update, 3.4e18 in all: at least 1 hour on one H100 at its
    peak of 989 TFLOP/s. Time: not yet measured.
Score: not yet measured.
"""

from configs import finetune_t5


def get_config(preset: str = "t5_1_1_small"):
    config = finetune_t5.get_config(preset)
    config.data.update(task="wmt14_en_de", input_length=256, target_length=256)
    config.decoding.update(method="beam", num_beams=4, length_penalty=0.6)
    config.evaluate.max_decoded_examples = 0
    config.checkpoint.best_metric = "bleu"
    return config
