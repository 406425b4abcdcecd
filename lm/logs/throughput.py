"""Rates and sizes: tokens per second, MFU, what a device can do at most, memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

# Published dense bfloat16 FLOP/s of one jax device, by a part of its device_kind; first match wins.
PEAK_FLOPS = (
    ("TPU v3", 61.5e12),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
)


class ThroughputMeter:
    """Tokens per second, MFU and step time between two log points.

    flops_per_step: of one update over all devices, padding included, since it is computed.
    peak_flops: FLOP/s of all devices together. devices: their number. clock: () -> seconds.
    The first interval holds the compilation and is not measured: the first `rates` gives {}.
    Call it when an update has really ended (its loss was fetched), or it times the dispatch.
    """

    def __init__(
        self,
        *,
        flops_per_step: float,
        peak_flops: float,
        devices: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._flops, self._peak, self._devices = flops_per_step, peak_flops, devices
        self._clock, self._since = clock, None

    def start(self, step: int) -> None:
        """Measure from here on: after the first update, an evaluation or a checkpoint."""
        self._since = (step, self._clock())

    def measure(self, step: int, tokens: float) -> dict[str, float]:
        """step_seconds, tokens_per_second, that per device and mfu since the last call of this or
        of `start`.

        tokens: inputs and targets since then, padding not counted.
        {} where there was no such call, or no update since.
        """
        since, now = self._since, self._clock()
        self._since = (step, now)
        if since is None or step <= since[0]:
            return {}
        seconds = (now - since[1]) / (step - since[0])
        return {
            "step_seconds": seconds,
            "tokens_per_second": tokens / (now - since[1]),
            "tokens_per_second_per_device": tokens / (now - since[1]) / self._devices,
            "mfu": self._flops / seconds / self._peak,
        }


def peak_flops(devices: Sequence) -> float:
    """FLOP/s of these jax devices (alike) together: the published dense bfloat16 rate, or measured.

    A device that is not in PEAK_FLOPS is measured for about 0.3 s. CPU devices of one process share
    its cores, so they count once a process: the sum is the machine's, however many are faked.
    """
    first = devices[0]
    for kind, flops in PEAK_FLOPS:
        if kind in first.device_kind:
            return flops * len(devices)
    cpu = first.platform == "cpu"
    parts = {device.process_index for device in devices} if cpu else devices
    return measured_flops(first) * len(parts)


def measured_flops(device) -> float:
    """FLOP/s of a square matrix product on this jax device: float32 on CPU, else bfloat16.

    The median of the repetitions that fit in 0.3 s.
    """
    import jax

    size, dtype = (1024, "float32") if device.platform == "cpu" else (8192, "bfloat16")
    square = jax.device_put(np.ones((size, size), jax.numpy.dtype(dtype)), device)
    multiply = jax.jit(lambda x: x @ x)
    multiply(square).block_until_ready()
    seconds = []
    while len(seconds) < 3 or sum(seconds) < 0.3:
        start = time.perf_counter()
        multiply(square).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def memory_peak(devices: Sequence) -> dict[str, float]:
    """The most memory used so far, in GiB: "device_memory_peak_gib", of the fullest of those of
    these jax devices that are this process's, where they count it (GPU, TPU), or else
    "process_memory_peak_gib", resident, of the process.
    """
    import jax

    here = jax.process_index()
    found = [device.memory_stats() or {} for device in devices if device.process_index == here]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    if peaks:
        return {"device_memory_peak_gib": max(peaks) / 2**30}
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"process_memory_peak_gib": used / 2**30}
