"""Token shards to batches: a function of (seed, step) alone, on any number of hosts and workers.

Everything is random access (grain.MapDataset), so the data position is the step: there is no
iterator state, and seeking takes constant time.

config         the tasks, their mixing rates, and the shape of a batch
packing        which pairs share a row
task_examples  row number -> stored tokens -> a row of a batch
teacher_cache  a teacher's stored outputs for the rows of each batch
batches        step -> row numbers -> batch, in this process or in workers
"""

from lm.pipeline.batches import (
    bucket_length,
    data_order_spec,
    heldout_batches,
    input_batches,
    num_heldout_batches,
    row_order,
    train_batches,
)
from lm.pipeline.config import DataConfig, mixing_rates
from lm.pipeline.packing import first_fit
from lm.pipeline.task_examples import Examples, TaskSplit, make_examples
from lm.pipeline.teacher_cache import TeacherCache, open_teacher_cache
