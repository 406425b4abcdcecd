"""Laws of the JobSet: the schema takes it, a pod is a host, a mistake is not run again."""

from __future__ import annotations

import copy
import json
import pathlib

import pytest

from experiments.launch import __main__ as launch
from experiments.launch import gke
from lm.preflight import slices

jsonschema = pytest.importorskip("jsonschema")
yaml = pytest.importorskip("yaml")

SCHEMA = json.loads(pathlib.Path(__file__).with_name("jobset.schema.json").read_text())
TRAIN = ["--", "train", "--config=configs/pretrain.py:tiny", "--workdir=gs://bucket/run"]


def made(*words: str, slice: str = "v5p-32") -> dict:
    words = ["--on=gke", f"--slice={slice}", "--image=us-docker.pkg.dev/p/lm/lm", *words, *TRAIN]
    return gke.manifest(launch.parse(words)[1])


def job(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


EVERYTHING = ("--spot", "--slices=2", "--env=A=it's: #1", "--env=B=", "--service-account=trainer")


@pytest.mark.parametrize("words", [(), EVERYTHING])
@pytest.mark.parametrize("slice", [one.name for chip in slices.CHIPS for one in slices.sizes(chip)])
def test_every_slice_has_a_manifest_that_the_schema_takes(slice, words):
    manifest = made(*words, slice=slice)
    jsonschema.validate(manifest, SCHEMA)
    assert yaml.safe_load(gke.yaml(manifest)) == manifest


def broken(manifest: dict):
    """Manifests with one fault each."""
    for path, value in (
        (("spec", "replicas"), 2),
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "maxRestarts"), "3"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
        (("spec", "replicatedJobs", 0, "parallelism"), 2),
        (("metadata", "name"), "My_Run"),
        (("apiVersion",), "batch/v1"),
    ):
        made = copy.deepcopy(manifest)
        place = made
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        yield path, made
    for path, value in (
        (("podFailurePolicy", "rules", 0, "onExitCodes", "values"), [0]),
        (("podFailurePolicy", "rules", 0, "onExitCodes", "operator"), "in"),
        (("template", "spec", "restartPolicy"), "OnFailure"),
        (("template", "spec", "nodeSelector", "gke-tpu-topology"), "2x4"),
        (("template", "spec", "containers", 0, "resources", "limits"), {"google.com/tpu": "4"}),
        (("template", "spec", "containers", 0, "command"), "python -m lm"),
    ):
        made = copy.deepcopy(manifest)
        place = job(made)
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        yield path, made


def test_the_schema_refuses_what_kubernetes_would_refuse():
    found = list(broken(made()))
    assert len(found) == 13
    for path, manifest in found:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(manifest, SCHEMA)
            pytest.fail(f"{path} passed")


@pytest.mark.parametrize(
    ("slice", "hosts", "chips", "topology"),
    [
        ("v5e-8", 1, 8, "2x4"),
        ("v5e-16", 4, 4, "4x4"),
        ("v5p-32", 4, 4, "2x2x4"),
        ("v6e-1", 1, 1, "1x1"),
    ],
)
def test_a_pod_is_a_host_and_a_job_is_a_slice(slice, hosts, chips, topology):
    """Hosts and chips: the tables of docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}."""
    manifest = made("--slices=3", slice=slice)
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert job(manifest)["parallelism"] == job(manifest)["completions"] == hosts
    (container,) = job(manifest)["template"]["spec"]["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": chips}}
    assert container["command"] == ["python", "-m", "lm", *TRAIN[1:]], "signals reach Python"
    selector = job(manifest)["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-topology"] == topology


def test_a_mistake_ends_it_and_all_else_starts_it_again():
    manifest = made()
    (rule,) = job(manifest)["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 3]
    (name,) = [one["name"] for one in job(manifest)["template"]["spec"]["containers"]]
    assert rule["onExitCodes"]["containerName"] == name
    policy = manifest["spec"]["failurePolicy"]
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert policy["rules"][0]["action"] == "FailJobSet" and len(policy["rules"]) == 1
    assert policy["maxRestarts"] == gke.RESTARTS and job(manifest)["backoffLimit"] == 0


def test_spot_is_asked_for_only_where_it_is_meant():
    pod = job(made())["template"]["spec"]
    assert gke.SPOT not in pod["nodeSelector"] and "tolerations" not in pod
    pod = job(made("--spot"))["template"]["spec"]
    assert pod["nodeSelector"][gke.SPOT] == "true" and pod["tolerations"][0]["key"] == gke.SPOT


@pytest.mark.parametrize(
    "value",
    [
        {"a": [], "b": {}, "c": None, "d": True, "e": 1.5, "f": "yes"},
        [["x", {"k": [1, {"m": "n"}]}], "a: b", "- c", "# d", "it's", "'\"\n\té"],
        {"deep": {"list": [{"a": 1, "b": [2, 3]}, {"c": {}}]}},
    ],
)
def test_what_is_written_is_read_as_it_was(value):
    assert yaml.safe_load(gke.yaml(value)) == value
