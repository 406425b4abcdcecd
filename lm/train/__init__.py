"""The only loop: pre-training, fine-tuning and distillation differ in loss and data alone.

start     what a run begins with: checks, tokens, loss, optimizer, the state to go on from
teaching  the teacher beside the loop, what it takes, and the answers of the student
taught    a teacher asked once about all batches: its cache, written and found
loop      the story of an update, and of what follows some of them
guard     which updates were bad, when to go back
patience  when the best is too long ago
signals   a wish to stop
watchdog  ends that cannot wait
"""

from lm.train.early_stopping import EarlyStopping
from lm.train.guard import Diverged, Guard
from lm.train.loop import Loop, TrainSetup
from lm.train.setup import (
    LOSSES,
    Update,
    check,
    initial_params,
    make_setup,
    make_strategy,
    make_update,
    parse_profile,
    planned_cost,
    step_flops,
    train,
)
from lm.train.signals import Signals, Unfinished
from lm.train.teacher_cache_writer import CacheWriter, find_teacher_cache
from lm.train.watchdog import Watchdog, detect_lost_host, exit_now
