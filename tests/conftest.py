"""Eight fake devices and a compilation cache, set before jax is imported by any test."""

from __future__ import annotations

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[1]

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "32"  # fewer and XLA's collectives deadlock on two cores
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
