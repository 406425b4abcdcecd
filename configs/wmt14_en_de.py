"""WMT 2014, English to German, as T5 was fine-tuned, on shorter rows; the best by BLEU is kept.

python -m lm train --config=configs/wmt14_en_de.py:runs/pretrain --workdir=runs/wmt14
python -m lm evaluate --workdir=runs/wmt14 --split=test --step=best

Answers are those of a beam of 4. Source: Raffel et al. 2020, arXiv:1910.10683, section 3.7.
"""

from configs import finetune_t5


def get_config(preset: str = "t5_1_1_small"):
    config = finetune_t5.get_config(preset)
    config.data.update(task="wmt14_en_de", input_length=256, target_length=256)
    config.decoding.update(method="beam", num_beams=4, length_penalty=0.6)
    config.evaluate.max_decoded_examples = 0
    config.checkpoint.best_metric = "bleu"
    return config
