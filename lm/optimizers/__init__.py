"""How parameters follow their gradients: direction, size, decay and rate, each one link of a chain.

  gradient -> clip -> direction -> + decay * weights -> * -rate(n) * multiplier -> update

The direction is the optimizer's (Adafactor, AdamW, ..), the rate the schedule's. Which weights
decay, which learn slower and which are frozen is said by regular expressions over their paths.
"""

from __future__ import annotations

from lm.optimizers.chain import make_optimizer
from lm.optimizers.config import OptimizerConfig
from lm.optimizers.param_groups import check_groups, multipliers, trained_count
from lm.optimizers.run_length import RunLength, num_updates
from lm.optimizers.schedules import SCHEDULES
from lm.optimizers.transforms import OPTIMIZERS, adafactor
