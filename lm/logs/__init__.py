"""What a run says while it runs: scalars, events, a bar or lines, where its time goes, facts.

files     rows of JSON on disk: appended whole or not at all, torn last lines dropped
board     the same scalars as TensorBoard reads them
scalars   Logs: metrics.jsonl, events.jsonl, the board, and progress on the terminal
ledger    goodput.jsonl: every second of a run has one kind
rates     tokens per second, MFU, memory
manifest  run.json: what made the run
"""

from lm.logs.board import TENSORBOARD
from lm.logs.files import Appended, read, write_atomically
from lm.logs.ledger import GOODPUT, KINDS, OUTSIDE, USEFUL, Ledger, goodput
from lm.logs.manifest import MANIFEST, command, commit, versions, write_manifest
from lm.logs.rates import Meter, measured_flops, memory, peak_flops
from lm.logs.scalars import EVENTS, METRICS, Logs, Silent

__all__ = [
    "EVENTS",
    "GOODPUT",
    "KINDS",
    "MANIFEST",
    "METRICS",
    "OUTSIDE",
    "USEFUL",
    "TENSORBOARD",
    "Appended",
    "Ledger",
    "Logs",
    "Meter",
    "Silent",
    "command",
    "commit",
    "goodput",
    "measured_flops",
    "memory",
    "peak_flops",
    "read",
    "versions",
    "write_atomically",
    "write_manifest",
]
