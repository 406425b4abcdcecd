"""What a run writes while it trains: metrics, events, progress, goodput and its manifest.

jsonl        JSONL files: rows appended whole or not at all, torn last lines dropped
tensorboard  the scalars as a TensorBoard event file
writer       RunLog: metrics.jsonl, events.jsonl, TensorBoard, progress on the terminal
time_ledger  goodput.jsonl: what the wall time of a run was spent on
throughput   tokens per second, MFU, peak memory
manifest     run.json: command, commit, versions and data of a run
"""

from lm.logs.jsonl import AppendedFile, read, write_atomically
from lm.logs.manifest import MANIFEST, command, commit, versions, write_manifest
from lm.logs.tensorboard import TENSORBOARD
from lm.logs.throughput import ThroughputMeter, measured_flops, memory_peak, peak_flops
from lm.logs.time_ledger import GOODPUT, KINDS, OUTSIDE, USEFUL, TimeLedger, goodput
from lm.logs.writer import EVENTS, METRICS, NullLog, RunLog
