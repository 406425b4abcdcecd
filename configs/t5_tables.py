"""Pre-train with one of the objectives in Tables 4 to 7 of Raffel et al. 2020.

python -m lm train --config=configs/t5_tables.py:span_3 --workdir=runs/span_3

All else is the paper's baseline (T5 1.0 base, 2^19 updates of 128 rows), on Wikipedia instead of
C4. A row that stands in several tables has one name. The paper samples i.i.d. tokens one by one,
so that their number varies; here it is the rounded share. T5 has 100 sentinels and continues with
the ids of ordinary pieces if an example has more spans (half of 512 tokens hidden one by one are
128 spans on average); here rate_25 and rate_50 have as many sentinels as they may need.
Cost: 5.5e13 FLOPs per update with span_3, 2.9e19 in all: at least 8 hours on one H100 at its peak
    of 989 TFLOP/s. Time: not yet measured.
Score: not yet measured.
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
