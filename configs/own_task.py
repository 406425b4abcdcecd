"""Fine-tune on your own task: files of JSONL or TSV, or a TFDS dataset, and templates.

python -m lm train --config=configs/own_task.py:runs/pretrain --workdir=runs/own

Cost: that of configs/finetune.py on two CPU cores, about a minute for 300 updates.
Score: depends on your data; not yet measured.
"""

from configs import finetune


def get_config(preset: str = "tiny"):
    config = finetune.get_config(preset)
    config.data.custom_tasks = dict(
        en_de=dict(
            source="data/{split}.tsv",  # train.tsv, and validation.tsv if it exists
            inputs="translate English to German: {en}",
            targets="{de}",
            metrics=("bleu", "chrf"),
        )
    )
    config.data.task = "en_de"
    return config
