"""Slices by name: their chips, hosts and names agree with the pages of Google Cloud."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from lm import logs
from lm.preflight import slices

ALL_SLICES = [item for chip in slices.CHIPS for item in slices.sizes(chip)]

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
def test_a_slice_has_the_chips_and_hosts_of_the_cloud_pages(name, chips, hosts, topology):
    actual = slices.parse_slice(name)
    assert (actual.chips, actual.hosts, actual.topology) == (chips, hosts, topology)
    assert actual.accelerator_type == name


def test_every_name_parses_to_its_slice():
    for expected in ALL_SLICES:
        assert slices.parse_slice(expected.name) == expected
        assert slices.parse_slice(expected.accelerator_type) == expected
        assert slices.parse_slice(f" {expected.name.upper()} ") == expected
        assert slices.parse_target(expected.name) == expected


def test_hosts_share_a_slice_evenly_and_tile_it():
    for item in ALL_SLICES:
        assert item.hosts * item.host_chips == item.chips
        assert math.prod(item.host_topology) == item.host_chips
        for size, host_size in zip(item.topology, item.host_topology, strict=False):
            assert size % host_size == 0


@pytest.mark.parametrize("chip", slices.CHIPS)
def test_sizes_grow_and_no_chip_sends_more_than_all_its_links(chip):
    offered = slices.sizes(chip)
    assert [item.chips for item in offered] == sorted({item.chips for item in offered})
    network = [item.chip.network for item in offered]
    assert network == sorted(network) and network[-1] == slices.CHIPS[chip].network
    for item in offered:
        assert (item.chip.network == 0) == (item.chips == 1)


def test_a_ring_carries_twice_the_bytes_of_a_line():
    line, ring = slices.parse_slice("v5e-64"), slices.parse_slice("v5e-256")
    assert (slices.rings(line.topology), slices.rings(ring.topology)) == (
        (False,) * 3,
        (True, True, False),
    )
    assert ring.chip.network == 2 * line.chip.network


def test_peak_flops_are_those_of_logs():
    for chip in slices.CHIPS.values():
        first = next(
            flops for kind, flops in logs.throughput.PEAK_FLOPS if kind in chip.device_kind
        )
        assert first == chip.flops
    for chip in slices.GPUS.values():
        assert dict(logs.throughput.PEAK_FLOPS)[chip.device_kind] == chip.flops


def test_gke_labels_and_runtime_versions_are_those_of_the_cloud_pages():
    # docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, and tpu/docs/runtimes.
    actual = slices.parse_slice("v5e-8")
    assert actual.gke == {
        "gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "gke-tpu-topology": "2x4",
        "machine_type": "ct5lp-hightpu-8t",
    }
    assert actual.runtime_version == "v2-alpha-tpuv5-lite"
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
def test_a_wrong_name_raises_with_the_offered_names(name, words):
    with pytest.raises(ValueError, match=words) as error:
        slices.parse_target(name)
    assert f"--slice={name}" in str(error.value) and str(error.value).count(".") <= 1


def test_local_is_no_slice_and_a_host_has_eight_gpus():
    assert slices.parse_target("local") is None
    actual = slices.parse_target("H100-16")
    assert (actual.name, actual.chips, actual.hosts) == ("h100-16", 16, 2)


def test_slices_import_no_jax():
    code = "import sys; from lm.preflight import slices; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
