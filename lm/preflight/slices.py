"""TPU slices by their Cloud names: what a chip can do, how many there are, how to ask for them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which is one jax device; v4 and v5p as a megacore of two cores.

    network: bytes/s that it sends at most in a collective, over all its links in one direction; of
    a Slice's chip, over those that the slice's shape lets it use, 0 where it is alone.
    """

    name: str
    device_kind: str
    flops: float  # bfloat16 FLOP/s, dense
    memory: int  # bytes of HBM that a program may use
    bandwidth: float = math.inf  # bytes/s of HBM
    network: float = math.inf
    link: float = 0.0  # bytes/s of one link in one direction
    cores: int = 1  # what the number in a slice's name counts a chip as
    compiler: str = ""  # the chip's configuration for the TPU compiler
    gke_accelerator: str = ""  # the value of the label cloud.google.com/gke-tpu-accelerator
    machine: str = ""  # GKE's machine type, without the number of chips
    runtime_version: str = ""  # of a TPU VM
    accelerator: str = ""  # gcloud's accelerator type, without the number


# flops, HBM: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; link, one way: "TPU specs" in
# jax-ml.github.io/scaling-book/tpus, which agrees with the pages' sums over both directions (v5e
# 400 GB/s, v6e 800 GB/s, v5p 1200 GB/s a chip). memory: what the compiler of libtpu 0.0.42 says
# that it has, which is less than the pages' 32, 16, 95 and 32 GiB. Labels and machines:
# docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus. Runtime versions:
# docs.cloud.google.com/tpu/docs/runtimes.
GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            *("v4", "TPU v4", 275e12, int(30.75 * GIB), 1200e9, 270e9, 45e9, 2, "megacore"),
            *("tpu-v4-podslice", "ct4p-hightpu", "tpu-ubuntu2204-base", "v4"),
        ),
        Chip(
            *("v5e", "TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 200e9, 50e9, 1, "default"),
            *("tpu-v5-lite-podslice", "ct5lp-hightpu", "v2-alpha-tpuv5-lite", "v5litepod"),
        ),
        Chip(
            *("v5p", "TPU v5", 459e12, int(95.74 * GIB), 2765e9, 600e9, 100e9, 2, "megacore"),
            *("tpu-v5p-slice", "ct5p-hightpu", "v2-alpha-tpuv5", "v5p"),
        ),
        Chip(
            *("v6e", "TPU v6 lite", 918e12, int(31.25 * GIB), 1600e9, 400e9, 100e9, 1, "default"),
            *("tpu-v6e-slice", "ct6e-standard", "v2-alpha-tpuv6e", "v6e"),
        ),
    )
}

# flops: as logs.PEAK_FLOPS. HBM bytes/s, SXM, the a100 of 80 GB: as third parties quote NVIDIA's
# data sheets (modal.com/gpu-glossary/perf/memory-bandwidth). NVLink in one direction: half of the
# 900 GB/s of NVIDIA's MLPerf system files (h100, h200); the a100's 300 GB/s was not checked.
# memory: three quarters, which is what jax takes if it is not told otherwise
# (docs.jax.dev/en/latest/gpu_memory_allocation.html).
GPUS = {
    chip.name: chip
    for chip in (
        Chip("a100", "A100", 312e12, 60_000_000_000, 2039e9, 300e9),
        Chip("h100", "H100", 989e12, 60_000_000_000, 3350e9, 450e9),
        Chip("h200", "H200", 989e12, 105_750_000_000, 4800e9, 450e9),
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
    """Chips of one kind that links join, in a shape that Cloud rents; name: as v5e-8, v5p-128."""

    name: str
    chip: Chip
    topology: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Their number."""
        return math.prod(self.topology)

    @property
    def host_chips(self) -> int:
        """Chips of a host (a TPU VM, a node of GKE): 4; of v5e and v6e up to 8 where it is one."""
        if self.chip.name in GPUS:
            return min(8, self.chips)
        return self.chips if len(self.topology) == 2 and self.chips <= 8 else 4

    @property
    def hosts(self) -> int:
        """Hosts of the slice, each of which runs the same command."""
        return self.chips // self.host_chips

    @property
    def host_topology(self) -> tuple[int, int, int]:
        """The shape of one host's chips."""
        return {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}[self.host_chips]

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Which axes are rings."""
        return rings(self.topology)

    @property
    def accelerator_type(self) -> str:
        """gcloud's word for it, as v5litepod-8 or v5p-128."""
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
        """The software of its TPU VMs."""
        return self.chip.runtime_version

    @property
    def compiler_options(self) -> dict:
        """What the TPU compiler is told of it (jax.experimental.topologies)."""
        return {
            "topology_name": f"{self.chip.name}:{'x'.join(map(str, self.topology))}",
            "chip_config_name": self.chip.compiler,
            "chips_per_host_bounds": list(self.host_topology),
            "wrap": list(self.wrap),
        }


def rings(topology: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Which axes are rings: those of whole cubes of v4 and v5p, and those of 16 of v5e and v6e.

    Source: accelerator_to_spec_map.py of AI-Hypercomputer/maxtext.
    """
    if len(topology) == 2:
        return (*(size == 16 for size in topology), False)
    return (math.prod(topology) >= 64,) * 3


def sizes(chip: str) -> list[Slice]:
    """The slices of a kind of chip, smallest first. chip: a key of CHIPS."""
    return [_slice(CHIPS[chip], shape) for shape in TOPOLOGIES[chip]]


def _slice(chip: Chip, shape: tuple[int, ...]) -> Slice:
    # Along a ring both links of a chip carry as much; along a line the one of them decides.
    axes = zip(shape, rings(shape), strict=False)
    links = sum(2 if ring else size > 1 for size, ring in axes)
    placed = dataclasses.replace(chip, network=chip.link * links)
    return Slice(f"{chip.name}-{math.prod(shape) * chip.cores}", placed, shape)


def slice_named(text: str) -> Slice:
    """The slice that Cloud calls v5e-8 (or v5litepod-8), v5p-128, v6e-256, v4-32.

    As there, v4 and v5p count cores, two a chip. Raises ValueError with the nearest names.
    """
    found = re.fullmatch(r"(v5litepod|[a-z0-9]+)-(\d{1,9})", text.strip().lower())
    name = found[1].replace("v5litepod", "v5e") if found else ""
    if name not in CHIPS:
        known = [one.name for chip in CHIPS for one in sizes(chip)]
        near = difflib.get_close_matches(text.lower(), known, n=2) or ["v5e-8", "v5p-128"]
        raise ValueError(
            f"--slice={text} is no TPU slice; the chips are {', '.join(CHIPS)}, and a slice is "
            f"named as {' or '.join(near)}."
        )
    offered, count = sizes(name), int(found[2])
    numbers = [one.chips * one.chip.cores for one in offered]
    if count in numbers:
        return offered[numbers.index(count)]
    near = sorted(offered, key=lambda one: abs(math.log(one.chips * one.chip.cores / (count or 1))))
    counts = "two cores a chip" if CHIPS[name].cores == 2 else "chips"
    raise ValueError(
        f"--slice={text} is no size that is rented ({name} counts {counts}); the nearest are "
        f"{near[0].name} and {near[1].name}."
    )


def target_named(text: str) -> Slice | None:
    """A slice, or GPUs as h100-8, or None for "local", the devices of this machine.

    Raises ValueError as slice_named.
    """
    name, _, count = text.strip().lower().partition("-")
    if name == "local":
        return None
    if name not in GPUS:
        return slice_named(text)
    known = [1, 2, 4, *range(8, 8 * 128 + 1, 8)]
    if not count.isdecimal() or int(count) not in known:
        raise ValueError(f"--slice={text} is no number of GPUs; use 1, 2, 4 or a multiple of 8.")
    return Slice(f"{name}-{count}", GPUS[name], (int(count),))
