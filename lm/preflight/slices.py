"""TPU slices and GPUs by name: what a chip can do, how many there are, how Cloud names them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which is one jax device; a v4 or v5p chip is a megacore of two cores.

    network: bytes/s that it can send in a collective over all its links, one direction each. A
    Slice's chip counts only the links that the slice's shape connects, 0 for a single chip.
    """

    name: str
    device_kind: str
    flops: float  # bfloat16 FLOP/s, dense
    memory: int  # bytes of HBM that a program may use
    network: float = math.inf
    link: float = 0.0  # bytes/s of one link in one direction
    cores: int = 1  # that a chip adds to the number in a slice's name
    compiler: str = ""  # the chip's configuration for the TPU compiler
    gke_accelerator: str = ""  # the value of the label cloud.google.com/gke-tpu-accelerator
    machine: str = ""  # GKE's machine type, without the number of chips
    runtime_version: str = ""  # of a TPU VM
    accelerator: str = ""  # gcloud's accelerator type, without the number


# flops: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; link: "TPU specs" in
# jax-ml.github.io/scaling-book/tpus, which agrees with the pages' sums over both directions (v5e
# 400 GB/s, v6e 800 GB/s, v5p 1200 GB/s a chip). memory: what the compiler of libtpu 0.0.42 reports,
# less than the pages' 32, 16, 95 and 32 GiB. Labels and machines:
# docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus. Runtime versions:
# docs.cloud.google.com/tpu/docs/runtimes.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            *("v4", "TPU v4", 275e12, int(30.75 * GIB), 270e9, 45e9, 2, "megacore"),
            *("tpu-v4-podslice", "ct4p-hightpu", "tpu-ubuntu2204-base", "v4"),
        ),
        Chip(
            *("v5e", "TPU v5 lite", 197e12, int(15.75 * GIB), 200e9, 50e9, 1, "default"),
            *("tpu-v5-lite-podslice", "ct5lp-hightpu", "v2-alpha-tpuv5-lite", "v5litepod"),
        ),
        Chip(
            *("v5p", "TPU v5", 459e12, int(95.74 * GIB), 600e9, 100e9, 2, "megacore"),
            *("tpu-v5p-slice", "ct5p-hightpu", "v2-alpha-tpuv5", "v5p"),
        ),
        Chip(
            *("v6e", "TPU v6 lite", 918e12, int(31.25 * GIB), 400e9, 100e9, 1, "default"),
            *("tpu-v6e-slice", "ct6e-standard", "v2-alpha-tpuv6e", "v6e"),
        ),
    )
}

# flops: as logs.PEAK_FLOPS. network: NVLink in one direction, half of the 900 GB/s of NVIDIA's
# MLPerf system files (h100, h200); the a100's 300 GB/s was not checked. memory: three quarters of
# the card's, jax's default share (docs.jax.dev/en/latest/gpu_memory_allocation.html).
GPUS = {
    chip.name: chip
    for chip in (
        Chip("a100", "A100", 312e12, 60_000_000_000, 300e9),
        Chip("h100", "H100", 989e12, 60_000_000_000, 450e9),
        Chip("h200", "H200", 989e12, 105_750_000_000, 450e9),
    )
}

# Shapes that Cloud rents, in chips; the same pages.
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
DEEP = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))
DEEP += ((8, 8, 16), (8, 16, 16))
TOPOLOGIES = {"v4": DEEP, "v5e": FLAT, "v6e": FLAT}
TOPOLOGIES["v5p"] = (*DEEP, (16, 16, 16), (16, 16, 24))


@dataclasses.dataclass(frozen=True)
class Slice:
    """Linked chips of one kind in a shape that Cloud rents; named as v5e-8, v5p-128."""

    name: str
    chip: Chip
    topology: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.topology)

    @property
    def host_chips(self) -> int:
        """Chips of a host (a TPU VM, a node of GKE): 4, but up to 8 on a single v5e or v6e host."""
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
        """gcloud's name of it, as v5litepod-8 or v5p-128."""
        return f"{self.chip.accelerator}-{self.chips * self.chip.cores}"

    @property
    def gke(self) -> dict[str, str]:
        """A node's labels gke-tpu-accelerator and gke-tpu-topology, and its machine_type."""
        return {
            "gke-tpu-accelerator": self.chip.gke_accelerator,
            "gke-tpu-topology": "x".join(map(str, self.topology)),
            "machine_type": f"{self.chip.machine}-{self.host_chips}t",
        }

    @property
    def runtime_version(self) -> str:
        """The software version of its TPU VMs."""
        return self.chip.runtime_version

    @property
    def compiler_options(self) -> dict:
        """Arguments of jax.experimental.topologies.get_topology_desc."""
        return {
            "topology_name": f"{self.chip.name}:{'x'.join(map(str, self.topology))}",
            "chip_config_name": self.chip.compiler,
            "chips_per_host_bounds": list(self.host_topology),
            "wrap": list(rings(self.topology)),
        }


def rings(topology: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Which axes are rings: all of v4 and v5p from a cube of 64 chips up, those of 16 of v5e, v6e.

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

    v4 and v5p count cores, two a chip. Raises: ValueError with the nearest names.
    """
    match = re.fullmatch(r"(v5litepod|[a-z0-9]+)-(\d{1,9})", text.strip().lower())
    name = match[1].replace("v5litepod", "v5e") if match else ""
    if name not in CHIPS:
        names = [item.name for chip in CHIPS for item in sizes(chip)]
        near = difflib.get_close_matches(text.lower(), names, n=2) or ["v5e-8", "v5p-128"]
        raise ValueError(
            f"--slice={text} is not a TPU slice; the chips are {', '.join(CHIPS)}, and a slice is "
            f"named as {' or '.join(near)}."
        )
    offered, count = sizes(name), int(match[2])
    for item in offered:
        if item.chips * item.chip.cores == count:
            return item
    distance = lambda item: abs(math.log(item.chips * item.chip.cores / (count or 1)))
    near = sorted(offered, key=distance)
    unit = "two cores a chip" if CHIPS[name].cores == 2 else "chips"
    raise ValueError(
        f"--slice={text} is not a size that Cloud rents ({name} counts {unit}); the nearest are "
        f"{near[0].name} and {near[1].name}."
    )


def parse_target(text: str) -> Slice | None:
    """Parses a slice, GPUs as h100-8, or "local" (None), the devices of this machine.

    Raises: ValueError as parse_slice.
    """
    name, _, count = text.strip().lower().partition("-")
    if name == "local":
        return None
    if name not in GPUS:
        return parse_slice(text)
    counts = [1, 2, 4, *range(8, 8 * 128 + 1, 8)]
    if not count.isdecimal() or int(count) not in counts:
        raise ValueError(
            f"--slice={text} is not a number of GPUs that fills hosts; use 1, 2, 4 or a multiple "
            f"of 8."
        )
    return Slice(f"{name}-{count}", GPUS[name], (int(count),))
