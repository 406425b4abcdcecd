"""What a run says while it runs: scalars, events, a bar or lines, where its time goes, facts.

files     rows of JSON on disk: appended whole or not at all, torn last lines dropped
board     the same scalars as TensorBoard reads them
scalars   Logs: metrics.jsonl, events.jsonl, the board, and progress on the terminal
ledger    goodput.jsonl: every second of a run has one kind
rates     tokens per second, MFU, memory
manifest  run.json: what made the run
"""

from lm.logs.jsonl import AppendedFile, read, write_atomically
from lm.logs.manifest import MANIFEST, command, commit, versions, write_manifest
from lm.logs.tensorboard import TENSORBOARD
from lm.logs.throughput import ThroughputMeter, measured_flops, memory_peak, peak_flops
from lm.logs.time_ledger import GOODPUT, KINDS, OUTSIDE, USEFUL, TimeLedger, goodput
from lm.logs.writer import EVENTS, METRICS, NullLog, RunLog
