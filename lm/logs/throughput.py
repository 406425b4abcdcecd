"""Tokens per second, MFU, the peak FLOP/s of devices, and peak memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Published dense bfloat16 FLOP/s of one jax device; the first substring of device_kind wins.
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
    """Measures tokens per second, MFU and step time between two log points.

    flops_per_step: model FLOPs of one update over all devices, padding included.
    peak_flops: FLOP/s of all `devices` together. clock: () -> seconds.
    The first `measure` returns {}: its interval includes the compilation.
    Dispatch is asynchronous, so call the methods after fetching the loss of an update.
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
        self._clock, self._start = clock, None  # (step, seconds)

    def start(self, step: int) -> None:
        """Start an interval, after the first update, an evaluation or a checkpoint."""
        self._start = (step, self._clock())

    def measure(self, step: int, tokens: float) -> dict[str, float]:
        """Measure the interval since the last `measure` or `start`, and start the next one.

        tokens: inputs and targets in the interval, without padding.
        Returns step_seconds, tokens_per_second, tokens_per_second_per_device and mfu; {} without
        a started interval or without an update in it.
        """
        start, now = self._start, self._clock()
        self._start = (step, now)
        if start is None or step <= start[0]:
            return {}
        seconds = now - start[1]
        step_seconds = seconds / (step - start[0])
        return {
            "step_seconds": step_seconds,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": tokens / seconds / self._devices,
            "mfu": self._flops / step_seconds / self._peak,
        }


def peak_flops(devices: Sequence) -> float:
    """Return the FLOP/s of identical jax devices together, from PEAK_FLOPS or measured.

    CPU devices of one process share its cores, so they count once per process.
    """
    first = devices[0]
    for kind, flops in PEAK_FLOPS:
        if kind in first.device_kind:
            return flops * len(devices)
    is_cpu = first.platform == "cpu"
    units = {device.process_index for device in devices} if is_cpu else devices
    return measured_flops(first) * len(units)


def measured_flops(device: Any) -> float:
    """Return the median FLOP/s of square matrix products on a jax device, within about 0.3 s.

    The products are in float32 on CPU, else in bfloat16.
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
    """Return the peak memory in GiB of the fullest local device, as {"device_memory_peak_gib"}.

    CPU devices do not report it: then {"process_memory_peak_gib"}, the peak resident memory.
    """
    import jax

    local = [device for device in devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() or {} for device in local]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    if peaks:
        return {"device_memory_peak_gib": max(peaks) / 2**30}
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"process_memory_peak_gib": resident / 2**30}
