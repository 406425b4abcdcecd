"""The files that training writes: metrics, events, goodput, the manifest; and its progress.

jsonl        JSONL files, whose rows are appended completely or not at all
tensorboard  the scalars as a TensorBoard event file
writer       RunLog: metrics.jsonl, events.jsonl, TensorBoard, progress on the terminal
time_ledger  goodput.jsonl: how a run spent its wall time
throughput   tokens per second, MFU, peak memory
manifest     run.json: command, commit, versions and data of a run
"""

from lm.logs.jsonl import AppendedFile, read, write_atomically
from lm.logs.manifest import MANIFEST, command, commit, versions, write_manifest
from lm.logs.tensorboard import TENSORBOARD
from lm.logs.throughput import ThroughputMeter, measured_flops, memory_peak, peak_flops
from lm.logs.time_ledger import GOODPUT, KINDS, OUTSIDE, USEFUL, TimeLedger, goodput
from lm.logs.writer import EVENTS, METRICS, NullLog, RunLog
