"""A task of your own: files of JSONL or TSV, or a TFDS dataset, and what is made of their columns.

python -m lm train --config=configs/own_task.py:runs/pretrain --workdir=runs/own
"""

from configs import finetune


def get_config(preset: str = "tiny"):
    config = finetune.get_config(preset)
    config.data.custom_tasks = dict(
        en_de=dict(
            source="data/{split}.tsv",  # train.tsv, and validation.tsv where there is one
            inputs="translate English to German: {en}",
            targets="{de}",
            metrics=("bleu", "chrf"),
        )
    )
    config.data.task = "en_de"
    return config
