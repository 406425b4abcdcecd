"""TPU slices and GPUs by name: what a chip can do, how many there are, how Cloud names them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which is one jax device; a v4 or v5p chip is a megacore of two cores.

    network: bytes/s that it sends in a collective over all its links, one direction each. The chip
    of a Slice counts only the links that the slice's shape connects, 0 for a single chip.
    """

    name: str
    device_kind: str
    flops: float  # bfloat16 FLOP/s, dense
    memory: int  # bytes of HBM that a program may use
    network: float = math.inf
    link: float = 0.0  # bytes/s of one link in one direction
    cores: int = 1  # cores that the number in a slice's name counts for a chip


# flops: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; link: "TPU specs" in
# jax-ml.github.io/scaling-book/tpus, which agrees with the pages' sums over both directions (v5e
# 400 GB/s, v6e 800 GB/s, v5p 1200 GB/s a chip). memory: what the compiler of libtpu 0.0.42 reports,
# less than the pages' 32, 16, 95 and 32 GiB.
CHIPS = {
    "v4": Chip("v4", "TPU v4", 275e12, int(30.75 * GIB), 270e9, 45e9, 2),
    "v5e": Chip("v5e", "TPU v5 lite", 197e12, int(15.75 * GIB), 200e9, 50e9),
    "v5p": Chip("v5p", "TPU v5", 459e12, int(95.74 * GIB), 600e9, 100e9, 2),
    "v6e": Chip("v6e", "TPU v6 lite", 918e12, int(31.25 * GIB), 400e9, 100e9),
}

# flops: as logs.PEAK_FLOPS. network: NVLink in one direction, half of the 900 GB/s of NVIDIA's
# MLPerf system files (h100, h200); the a100's 300 GB/s was not checked. memory: three quarters of
# the card's, jax's default share (docs.jax.dev/en/latest/gpu_memory_allocation.html).
GPUS = {
    "a100": Chip("a100", "A100", 312e12, 60_000_000_000, 300e9),
    "h100": Chip("h100", "H100", 989e12, 60_000_000_000, 450e9),
    "h200": Chip("h200", "H200", 989e12, 105_750_000_000, 450e9),
}

# Names of a chip in Google Cloud: gcloud's accelerator type without the number, the runtime version
# of its TPU VMs (docs.cloud.google.com/tpu/docs/runtimes), the accelerator label of GKE's nodes and
# their machine type without the number
# (docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus).
CLOUD_NAMES = {
    "v4": ("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu"),
    "v5e": ("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu"),
    "v5p": ("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu"),
    "v6e": ("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard"),
}

# Shapes that Cloud rents, in chips. Source: the same pages as flops.
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
DEEP = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))
DEEP += ((8, 8, 16), (8, 16, 16))
TOPOLOGIES = {"v4": DEEP, "v5e": FLAT, "v6e": FLAT}
TOPOLOGIES["v5p"] = (*DEEP, (16, 16, 16), (16, 16, 24))


@dataclasses.dataclass(frozen=True)
class Slice:
    """Linked chips of one kind in a shape that Cloud rents, or GPUs; named as v5e-8, h100-8."""

    name: str
    chip: Chip
    topology: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.topology)

    @property
    def host_chips(self) -> int:
        """Chips of a host: 4, but up to 8 on a single v5e or v6e host, and up to 8 GPUs."""
        if self.chip.name in GPUS:
            return min(8, self.chips)
        return self.chips if len(self.topology) == 2 and self.chips <= 8 else 4

    @property
    def hosts(self) -> int:
        """Number of hosts, each of which runs the same command."""
        return self.chips // self.host_chips

    @property
    def host_topology(self) -> tuple[int, int, int]:
        """The shape of one host's chips."""
        return {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}[self.host_chips]

    @property
    def accelerator_type(self) -> str:
        """gcloud's name of the slice, as v5litepod-8 or v5p-128."""
        return f"{CLOUD_NAMES[self.chip.name][0]}-{self.chips * self.chip.cores}"

    @property
    def runtime_version(self) -> str:
        """The software version of the slice's TPU VMs."""
        return CLOUD_NAMES[self.chip.name][1]

    @property
    def gke(self) -> dict[str, str]:
        """A node's labels gke-tpu-accelerator and gke-tpu-topology, and its machine_type."""
        _, _, accelerator, machine = CLOUD_NAMES[self.chip.name]
        return {
            "gke-tpu-accelerator": accelerator,
            "gke-tpu-topology": "x".join(map(str, self.topology)),
            "machine_type": f"{machine}-{self.host_chips}t",
        }

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Arguments of jax.experimental.topologies.get_topology_desc."""
        return {
            "topology_name": f"{self.chip.name}:{'x'.join(map(str, self.topology))}",
            "chip_config_name": "megacore" if self.chip.cores == 2 else "default",
            "chips_per_host_bounds": list(self.host_topology),
            "wrap": list(rings(self.topology)),
        }


def rings(topology: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Tells which axes are rings: of v4 and v5p all, from 64 chips up; of v5e and v6e those of 16.

    Source: accelerator_to_spec_map.py of AI-Hypercomputer/maxtext.
    """
    if len(topology) == 2:
        return (*(size == 16 for size in topology), False)
    return (math.prod(topology) >= 64,) * 3


def sizes(chip: str) -> list[Slice]:
    """Lists the slices of a kind of chip, smallest first. chip: a key of CHIPS."""
    return [_make_slice(CHIPS[chip], shape) for shape in TOPOLOGIES[chip]]


def _make_slice(chip: Chip, shape: tuple[int, ...]) -> Slice:
    # Along a ring a chip sends over both links; along a line the end chips have only one.
    axes = zip(shape, rings(shape), strict=False)
    links = sum(2 if ring else size > 1 for size, ring in axes)
    connected = dataclasses.replace(chip, network=chip.link * links)
    return Slice(f"{chip.name}-{math.prod(shape) * chip.cores}", connected, shape)


def parse_slice(text: str) -> Slice:
    """Parses Cloud's name of a slice: v5e-8 (or v5litepod-8), v5p-128, v6e-256, v4-32.

    Raises: ValueError with the names of the chip's slices, or of all chips.
    """
    name = text.strip().lower().replace("v5litepod", "v5e")
    chip = name.partition("-")[0]
    if chip not in CHIPS:
        raise ValueError(
            f"--slice={text} is not a TPU slice; the chips are {', '.join(CHIPS)}, and a slice is "
            "named as v5e-8, v6e-8 or v5p-128."
        )
    offered = {item.name: item for item in sizes(chip)}
    if name not in offered:
        unit = "two cores a chip" if CHIPS[chip].cores == 2 else "chips"
        raise ValueError(
            f"--slice={text} is not a TPU slice that Cloud rents ({chip} counts {unit}); use one "
            f"of {', '.join(offered)}."
        )
    return offered[name]


def parse_target(text: str) -> Slice | None:
    """Parses a slice, GPUs as h100-8, or "local" (None), the devices of this machine.

    Raises: ValueError as parse_slice, or if the GPUs do not fill hosts.
    """
    name, _, count = text.strip().lower().partition("-")
    if name == "local":
        return None
    if name not in GPUS:
        return parse_slice(text)
    if count not in map(str, (1, 2, 4, *range(8, 1025, 8))):
        raise ValueError(
            f"--slice={text} is not a number of GPUs that fills hosts; use 1, 2, 4 or a multiple "
            "of 8 up to 1024."
        )
    return Slice(f"{name}-{count}", GPUS[name], (int(count),))
