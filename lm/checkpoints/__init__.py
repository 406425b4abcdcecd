"""Checkpoints that prove themselves: {state, data position, config} as one atomic step.

Orbax commits a step whole or not at all, but neither checksums array data nor falls back to an
older step; both are done here. Every leaf has an integer checksum of its bits, and restore takes
the newest step that verifies and renames the others out of the way.
"""

from lm.checkpoints.checksums import aligned_empty, host_checksum, leaf_checksum, tree_checksums
from lm.checkpoints.metadata import Mismatch, flatten
from lm.checkpoints.retention import rank_steps
from lm.checkpoints.store import Checkpoints
