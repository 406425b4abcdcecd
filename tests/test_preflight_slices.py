"""Laws of the names of slices: as Cloud writes them, with as many chips and hosts as it rents."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from lm import logs
from lm.preflight import slices

EVERY = [one for chip in slices.CHIPS for one in slices.sizes(chip)]

# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: name, chips, hosts that run it, topology.
CLOUD = [
    ("v5litepod-1", 1, 1, (1, 1)),
    ("v5litepod-8", 8, 1, (2, 4)),
    ("v5litepod-16", 16, 4, (4, 4)),
    ("v5litepod-256", 256, 64, (16, 16)),
    ("v6e-4", 4, 1, (2, 2)),
    ("v6e-8", 8, 1, (2, 4)),
    ("v6e-256", 256, 64, (16, 16)),
    ("v4-8", 4, 1, (2, 2, 1)),
    ("v4-32", 16, 4, (2, 2, 4)),
    ("v5p-8", 4, 1, (2, 2, 1)),
    ("v5p-128", 64, 16, (4, 4, 4)),
    ("v5p-12288", 6144, 1536, (16, 16, 24)),
]


@pytest.mark.parametrize(("name", "chips", "hosts", "topology"), CLOUD)
def test_a_slice_has_the_chips_and_hosts_that_cloud_says(name, chips, hosts, topology):
    found = slices.parse_slice(name)
    assert (found.chips, found.hosts, found.topology) == (chips, hosts, topology)
    assert found.accelerator_type == name


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
def test_every_name_names_itself_again(one):
    assert slices.parse_slice(one.name) == one
    assert slices.parse_slice(one.accelerator_type) == one
    assert slices.parse_slice(f" {one.name.upper()} ") == one
    assert slices.parse_target(one.name) == one


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
def test_hosts_share_a_slice_evenly_and_tile_it(one):
    assert one.hosts * one.host_chips == one.chips
    assert math.prod(one.host_topology) == one.host_chips
    for whole, part in zip(one.topology, one.host_topology, strict=False):
        assert whole % part == 0


@pytest.mark.parametrize("chip", slices.CHIPS)
def test_sizes_grow_and_no_chip_sends_more_than_all_its_links(chip):
    offered = slices.sizes(chip)
    assert [one.chips for one in offered] == sorted({one.chips for one in offered})
    network = [one.chip.network for one in offered]
    assert network == sorted(network) and network[-1] == slices.CHIPS[chip].network
    for one in offered:
        assert (one.chip.network == 0) == (one.chips == 1)


def test_a_ring_carries_twice_what_a_line_does():
    line, ring = slices.parse_slice("v5e-64"), slices.parse_slice("v5e-256")
    assert (slices.rings(line.topology), slices.rings(ring.topology)) == (
        (False,) * 3,
        (True, True, False),
    )
    assert ring.chip.network == 2 * line.chip.network


def test_mfu_in_logs_and_here_is_over_the_same_peak():
    for chip in slices.CHIPS.values():
        first = next(
            flops for kind, flops in logs.throughput.PEAK_FLOPS if kind in chip.device_kind
        )
        assert first == chip.flops
    for chip in slices.GPUS.values():
        assert dict(logs.throughput.PEAK_FLOPS)[chip.device_kind] == chip.flops


def test_gke_and_gcloud_are_told_what_their_pages_name():
    # docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, and tpu/docs/runtimes.
    found = slices.parse_slice("v5e-8")
    assert found.gke == {
        "gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "gke-tpu-topology": "2x4",
        "machine_type": "ct5lp-hightpu-8t",
    }
    assert found.runtime_version == "v2-alpha-tpuv5-lite"
    assert slices.parse_slice("v5e-16").gke["machine_type"] == "ct5lp-hightpu-4t"
    assert slices.parse_slice("v4-8").gke["gke-tpu-accelerator"] == "tpu-v4-podslice"
    assert slices.parse_slice("v5p-128").gke["gke-tpu-topology"] == "4x4x4"
    assert slices.parse_slice("v6e-1").gke["machine_type"] == "ct6e-standard-1t"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e-9", "v5e-8"),
        ("v5e-0", "v5e-1"),
        ("v5p-1", "v5p-8"),
        ("v5p-100", "two cores a chip"),
        ("v6e-300", "v6e-256"),
        ("v7-8", "v6e-8"),
        ("tpu", "v5e-8"),
        ("v5e", "v5e-8"),
        ("", "v5e-8"),
        ("h100-3", "multiple of 8"),
        ("h100", "multiple of 8"),
        ("v5e-8; rm", "not a TPU slice"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest_right_one(name, words):
    with pytest.raises(ValueError, match=words) as caught:
        slices.parse_target(name)
    assert f"--slice={name}" in str(caught.value) and str(caught.value).count(".") <= 1


def test_local_is_no_slice_and_gpus_are_eight_a_host():
    assert slices.parse_target("local") is None
    found = slices.parse_target("H100-16")
    assert (found.name, found.chips, found.hosts) == ("h100-16", 16, 2)


def test_the_launcher_gets_names_without_jax():
    code = "import sys; from lm.preflight import slices; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
