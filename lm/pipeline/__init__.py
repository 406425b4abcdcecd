"""Token shards to batches: a function of (seed, step) alone, on any number of hosts and workers.

The whole path is random access (grain.MapDataset), so that the data position is the step: no
iterator state exists, and seeking takes constant time.

  config    which tasks, mixed at which rates, in batches of which shape
  packing   which pairs share a row
  teacher_cache  row of a batch -> the teacher's top-k logits, from disk
  parts     row number -> stored tokens -> a row of a batch
  batches   step -> row numbers -> batch, in this process or in workers
"""

from lm.pipeline.batches import (
    bucket_length,
    data_order_spec,
    heldout_batches,
    input_batches,
    num_heldout_batches,
    pad_rows,
    row_order,
    train_batches,
)
from lm.pipeline.config import DataConfig, mixing_rates
from lm.pipeline.packing import first_fit
from lm.pipeline.task_examples import Examples, TaskSplit, make_examples
from lm.pipeline.teacher_cache import TeacherCache, open_teacher_cache
