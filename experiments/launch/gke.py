"""A JobSet of Kubernetes with a job per slice and a pod per host; Kubernetes restarts them.

Fields: kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go; kubernetes/api, batch/v1 and
core/v1. Labels and google.com/tpu: docs.cloud.google.com/kubernetes-engine/docs/how-to/tpus. jax
finds the hosts by environment variables that GKE sets in TPU pods (jax/_src/clusters).
"""

from __future__ import annotations

import json

from experiments.launch import job as jobs
from experiments.launch import steps

RESTARTS = 100  # preemptions and failures after which the JobSet gives up
SPOT = "cloud.google.com/gke-spot"


def check(job: jobs.Job) -> None:
    """Raises ValueError if a field of the manifest is missing."""
    jobs.check_cloud(job)
    if not job.image:
        raise ValueError(
            "--image is missing; name the container image with this code, as "
            "--image=us-docker.pkg.dev/project/lm/lm (docs/cloud-tpu.md builds one)."
        )


def manifest(job: jobs.Job) -> dict:
    """The JobSet. A pod's exit code 2 or 3 ends it; any other failure restarts all pods."""
    tpus = job.tpus
    stops = [code for code in jobs.FINAL if code]
    rule = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "lm", "operator": "In", "values": stops},
    }
    template = {
        "parallelism": tpus.hosts,
        "completions": tpus.hosts,
        "backoffLimit": 0,  # a slice's pods live and die together
        "podFailurePolicy": {"rules": [rule]},
        "template": {"spec": pod(job)},
    }
    mistake = {
        "name": "mistake",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    one_job_a_pool = {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, "annotations": one_job_a_pool},
        "spec": {
            "failurePolicy": {"maxRestarts": RESTARTS, "rules": [mistake]},
            "replicatedJobs": [
                {"name": "slice", "replicas": job.slices, "template": {"spec": template}}
            ],
        },
    }


def pod(job: jobs.Job) -> dict:
    """The pod of a host: container, resources and node selector."""
    tpus, labels = job.tpus, ("gke-tpu-accelerator", "gke-tpu-topology")
    pairs = (one.partition("=") for one in job.environment)
    container = {
        "name": "lm",
        "image": job.image,
        # No shell: the signal that Kubernetes sends must reach Python, which saves and stops.
        "command": ["python", "-m", "lm", *job.arguments],
        "env": [{"name": name, "value": value} for name, _, value in pairs],
        "resources": {"limits": {"google.com/tpu": tpus.host_chips}},
    }
    made = {
        "restartPolicy": "Never",  # which podFailurePolicy requires
        "nodeSelector": {f"cloud.google.com/{label}": tpus.gke[label] for label in labels},
        "containers": [container],
    }
    if job.spot:
        made["nodeSelector"][SPOT] = "true"
        made["tolerations"] = [
            {"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    if job.service_account:
        made["serviceAccountName"] = job.service_account
    if job.slices > 1:  # between slices the traffic takes the nodes' own network
        made |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return made


def yaml(value, indent: str = "") -> str:
    """Formats dicts, lists and scalars as YAML with scalars as in JSON."""
    if not isinstance(value, dict | list) or not value:
        return f" {json.dumps(value)}\n"
    lines = "" if indent == "" else "\n"
    if isinstance(value, dict):
        for key, inner in value.items():
            lines += f"{indent}{key}:{yaml(inner, indent + '  ')}"
    else:
        for inner in value:
            lines += f"{indent}- {yaml(inner, indent + '  ').lstrip()}"
    return lines


def plan(job: jobs.Job) -> list[steps.Step]:
    """The command that applies the manifest."""
    words = ("kubectl", "apply", *job.extra, "--filename=-")
    return [steps.Step(words, stdin=yaml(manifest(job)))]


def launch(job: jobs.Job) -> int:
    """Submits the JobSet; returns kubectl's exit code."""
    (application,) = plan(job)
    if code := steps.run(application):
        return code
    selector = f"jobset.sigs.k8s.io/jobset-name={job.name}"
    steps.say(f"see it: kubectl get jobset {job.name}; kubectl logs -f --selector={selector}")
    steps.say(f"end it: kubectl delete jobset {job.name}")
    return 0
