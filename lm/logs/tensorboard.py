"""Scalars as TensorBoard reads them: event files, written here and now.

tensorboardX's own writer hands its events to a thread; when the disk is full the thread dies, its
queue fills up, and the next scalar waits for ever.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping

from lm import storage
from lm.logs import jsonl

TENSORBOARD = "tensorboard"


class TensorBoardWriter:
    """An event file of its own in workdir/tensorboard.

    step: updates already done; a reader forgets what earlier files say of later ones.
    """

    def __init__(self, workdir: str | os.PathLike, step: int):
        directory = storage.as_path(workdir) / TENSORBOARD
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{step}"
        self._file = jsonl.AppendedFile(directory / name)
        self._add(file_version="brain.Event:2")
        if step:
            self.forget(step)

    def forget(self, step: int) -> None:
        """Tell readers to drop all that was said of updates after `step`."""
        from tensorboardX.proto import event_pb2

        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=step + 1, session_log=started)

    def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
        """Add the scalars, each under split/name."""
        from tensorboardX.proto import summary_pb2

        value = summary_pb2.Summary.Value
        values = [value(tag=f"{split}/{k}", simple_value=float(v)) for k, v in scalars.items()]
        self._add(step=step, summary=summary_pb2.Summary(value=values))

    def _add(self, **fields) -> None:
        """One record: its length, the length's sum, the event, the event's sum."""
        from tensorboardX import record_writer
        from tensorboardX.proto import event_pb2

        event = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
        length, total = struct.pack("<Q", len(event)), record_writer.masked_crc32c
        sums = [struct.pack("<I", total(part)) for part in (length, event)]
        self._file.add(length + sums[0] + event + sums[1])

    def flush(self) -> None:
        """Have all that was added in its place."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
