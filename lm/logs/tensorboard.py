"""Scalars as TensorBoard event files, written synchronously.

tensorboardX's writer uses a thread: when the disk is full the thread dies, its queue fills up and
the next scalar blocks for ever.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping

from lm import storage
from lm.logs import jsonl

TENSORBOARD = "tensorboard"


class TensorBoardWriter(jsonl.AppendedFile):
    """A new event file in workdir/tensorboard.

    step: updates already done; readers drop later events of earlier files.
    """

    def __init__(self, workdir: str | os.PathLike, step: int):
        directory = storage.as_path(workdir) / TENSORBOARD
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{step}"
        super().__init__(directory / name)
        self._add_event(file_version="brain.Event:2")
        if step:
            self.drop_after(step)

    def drop_after(self, step: int) -> None:
        """Mark that readers must drop the earlier events of updates after `step`."""
        from tensorboardX.proto import event_pb2

        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add_event(step=step + 1, session_log=restart)

    def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
        """Add the scalars under the tags split/name."""
        from tensorboardX.proto import summary_pb2

        value = summary_pb2.Summary.Value
        values = [value(tag=f"{split}/{k}", simple_value=float(v)) for k, v in scalars.items()]
        self._add_event(step=step, summary=summary_pb2.Summary(value=values))

    def _add_event(self, **fields) -> None:
        """Append one TFRecord: length, its checksum, the event, its checksum."""
        from tensorboardX import record_writer
        from tensorboardX.proto import event_pb2

        event = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        checksum = lambda data: struct.pack("<I", record_writer.masked_crc32c(data))
        self.add(length + checksum(length) + event + checksum(event))
