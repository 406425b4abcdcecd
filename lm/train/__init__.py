"""The only loop: pre-training, fine-tuning and distillation differ in loss and data alone.

start     what a run begins with: checks, tokens, loss, optimizer, the state to go on from
loop      the story of an update, and of what follows some of them
guard     which updates were bad, when to go back
patience  when the best is too long ago
signals   a wish to stop
watchdog  ends that cannot wait
"""

from lm.train.guard import Diverged, Guard
from lm.train.loop import Loop, Work
from lm.train.patience import Patience
from lm.train.signals import Signals, Unfinished
from lm.train.start import (
    LOSSES,
    Update,
    check,
    first_params,
    layout,
    make_update,
    make_work,
    planned,
    step_flops,
    traced,
    train,
)
from lm.train.watchdog import Watchdog, company, leave

__all__ = [
    "LOSSES",
    "Diverged",
    "Guard",
    "Loop",
    "Patience",
    "Signals",
    "Unfinished",
    "Update",
    "Watchdog",
    "Work",
    "check",
    "company",
    "first_params",
    "layout",
    "leave",
    "make_update",
    "make_work",
    "planned",
    "step_flops",
    "traced",
    "train",
]
