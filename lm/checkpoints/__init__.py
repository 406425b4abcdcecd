"""Checkpoints of {state, data position, config} that verify themselves.

Orbax commits a step atomically; this package adds checksums of arrays, and falls back to an older
step if one is damaged.

store      Checkpoints: save, and restore the newest step that verifies
checksums  integer checksums of arrays
metadata   the facts stored with the arrays: paths, dtypes, shapes, checksums, seal
retention  which checkpoints to keep
hosts      agreement between hosts that read one checkpoint
config     CheckpointConfig
"""

from lm.checkpoints.checksums import aligned_empty, host_checksum, leaf_checksum, tree_checksums
from lm.checkpoints.config import CheckpointConfig
from lm.checkpoints.metadata import Mismatch, flatten
from lm.checkpoints.retention import rank_steps
from lm.checkpoints.store import Checkpoints
