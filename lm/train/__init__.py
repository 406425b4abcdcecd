"""The training loop: pre-training, fine-tuning and distillation differ in loss and data only.

setup                 the start of a run: checks, data, loss, optimizer, the state to resume from
loop                  one update, and what follows some of them: logs, evaluations, checkpoints
guard                 detecting bad updates, and when to roll back
early_stopping        ending a run that no longer improves
profiling             tracing some updates
signals               stopping after SIGTERM or SIGINT
watchdog              ending a process that hangs or lost another host
data                  tokenizer, examples and teacher cache
live_teacher          the teacher of a distillation, and the student's own answers
teacher_cache_writer  writing a teacher's logits to disk once
"""

from lm.train.data import find_teacher_cache
from lm.train.early_stopping import EarlyStopping
from lm.train.guard import Diverged, Guard
from lm.train.loop import Loop, TrainSetup
from lm.train.profiling import parse_profile
from lm.train.setup import (
    LOSSES,
    Update,
    check,
    initial_params,
    make_setup,
    make_strategy,
    make_update,
    planned_cost,
    step_flops,
    train,
)
from lm.train.signals import Signals, Unfinished
from lm.train.teacher_cache_writer import CacheWriter
from lm.train.watchdog import Watchdog, detect_lost_host, exit_now
