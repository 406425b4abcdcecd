"""Checkpoints that verify themselves: {state, data position, config} as one atomic step.

Orbax commits a step atomically, but neither checksums array data nor falls back to an older step;
this package does both.

store      Checkpoints: save, and restore the newest step that verifies
checksums  integer checksums of arrays
metadata   the facts stored beside the arrays: paths, dtypes, shapes, checksums, seal
retention  which checkpoints are kept
hosts      agreement between several hosts that read one checkpoint
"""

from lm.checkpoints.checksums import aligned_empty, host_checksum, leaf_checksum, tree_checksums
from lm.checkpoints.config import CheckpointConfig
from lm.checkpoints.metadata import Mismatch, flatten
from lm.checkpoints.retention import rank_steps
from lm.checkpoints.store import Checkpoints
