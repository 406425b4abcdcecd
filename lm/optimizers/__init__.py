"""Optimizers: from gradients to updates.

gradient -> clip -> optimizer -> + weight decay -> * -learning rate * multiplier -> update

config        OptimizerConfig, the section optimizer
chain         make_optimizer: the whole chain, with frozen parameters
transforms    OPTIMIZERS: Adafactor, AdamW, Muon, Lion
schedules     SCHEDULES: the learning rate by update
param_groups  multipliers by regular expressions over paths; matrix axes
run_length    lengths in updates, percent, epochs or tokens
"""

from __future__ import annotations

from lm.optimizers.chain import make_optimizer
from lm.optimizers.config import OptimizerConfig
from lm.optimizers.param_groups import check_groups, multipliers, trained_count
from lm.optimizers.run_length import DurationConfig, LengthConfig, RunLength
from lm.optimizers.schedules import SCHEDULES
from lm.optimizers.transforms import OPTIMIZERS, adafactor
