"""The rows of Tables 4 to 7 of Raffel et al. 2020: which objective to pre-train with.

python -m lm train --config=configs/t5_tables.py:span_3 --workdir=runs/span_3

The paper's baseline otherwise (T5 1.0 base, 2^19 updates of 128 rows), on Wikipedia where the paper
has C4. Rows that stand in several tables have one name. The paper draws its i.i.d. tokens each by
itself, so that their number varies; here it is the rounded share. T5 has 100 sentinels, and goes on
into the ids of ordinary pieces where an example has more runs: half of 512 tokens hidden one by one
are 128 runs on average. Here a rate has as many sentinels as it may need.
"""

from configs import base, models
from lm import lookup

ROWS = {
    "prefix_lm": dict(name="prefix_lm"),  # Table 4
    "bert_style": dict(name="token_masking", replacement="mask_or_random", target="whole"),  # and 5
    "deshuffling": dict(name="deshuffling"),
    "mass_style": dict(name="token_masking", target="whole"),  # Table 5
    "baseline": dict(name="iid_replace"),  # replace corrupted spans; rate 15 %; i.i.d. of Table 7
    "drop": dict(name="drop"),
    "rate_10": dict(name="iid_replace", noise_density=0.10),  # Table 6
    "rate_15": dict(name="iid_replace", noise_density=0.15),
    "rate_25": dict(name="iid_replace", noise_density=0.25),
    "rate_50": dict(name="iid_replace", noise_density=0.50),
    "span_2": dict(mean_noise_span_length=2.0, placement="t5"),  # Table 7
    "span_3": dict(mean_noise_span_length=3.0, placement="t5"),
    "span_5": dict(mean_noise_span_length=5.0, placement="t5"),
    "span_10": dict(mean_noise_span_length=10.0, placement="t5"),
}
SENTINELS = {"rate_25": 128, "rate_50": 256}


def get_config(row: str = "baseline"):
    config = models.apply(base.get_config(), "t5_base")
    config.objective.update(lookup.lookup(ROWS, row, "the row after the config's colon"))
    config.tokenizer.num_extra_ids = SENTINELS.get(row, config.tokenizer.num_extra_ids)
    rows = config.tokenizer.vocab_size + config.tokenizer.num_extra_ids
    config.model.update(vocab_size=max(rows, config.model.vocab_size), dropout_rate=0.1)
    config.steps = 2**19
    config.data.task = "wikipedia"
    return config
