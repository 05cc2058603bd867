"""Kubernetes: a JobSet with one Job for each NVLink domain, and the ComputeDomain that gives its pods an IMEX channel.

JobSet (jobset.x-k8s.io/v1alpha2): replicatedJobs of one indexed Job each; `exclusive-topology` binds every Job to one
value of the node label nvidia.com/gpu.clique, which is (cluster UUID, clique) of the NVLink fabric. ComputeDomain
(resource.nvidia.com/v1beta1, NVIDIA's DRA driver): its ResourceClaimTemplate, claimed by every pod, starts the IMEX
daemons; the node's own nvidia-imex unit must be masked: two daemons collide. Each pod is one node: torchrun starts its
ranks.
"""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from fp4dist.cluster import slurm
from fp4dist.cluster.job import Job
from fp4dist.errors import ConfigError

CLIQUE = "nvidia.com/gpu.clique"
_JOB_INDEX = "jobset.sigs.k8s.io/job-index"


def manifests(job: Job) -> str:
    """All objects of the job as one YAML stream for `kubectl apply -f`."""
    objects = [*([compute_domain(job)] if job.multinode_nvlink else []), job_set(job)]
    head = f"# {job.title}\n# kubectl apply -f THIS_FILE. Written by `python -m fp4dist.cluster launch`.\n"
    return head + "---\n".join(yaml.dump(o, Dumper=_Dumper, sort_keys=False, width=120) for o in objects)


def compute_domain(job: Job) -> dict[str, Any]:
    """One for the whole job: its daemons form one IMEX domain in each clique."""
    return {
        "apiVersion": "resource.nvidia.com/v1beta1",
        "kind": "ComputeDomain",
        "metadata": {"name": job.name},
        "spec": {"numNodes": job.nodes, "channel": {"resourceClaimTemplate": {"name": f"{job.name}-channel"}}},
    }


def job_set(job: Job) -> dict[str, Any]:
    """The JobSet: as many Jobs as domains, as many pods in each as nodes."""
    split = job.multinode_nvlink  # an HGX box is a domain by itself: then one Job holds all pods
    jobs, pods = (job.domains, job.nodes_per_domain) if split else (1, job.nodes)
    metadata: dict[str, Any] = {"name": job.name}
    if split:
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": CLIQUE}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": job.name},
            "failurePolicy": {"maxRestarts": 20},  # each restart resumes from the newest checkpoint
            "replicatedJobs": [
                {
                    "name": "domain",
                    "replicas": jobs,
                    "template": {
                        "spec": {
                            "parallelism": pods,
                            "completions": pods,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,  # one lost pod restarts the set: ranks cannot be replaced singly
                            "template": {"spec": _pod(job, pods)},
                        }
                    },
                }
            ],
        },
    }


def _pod(job: Job, pods: int) -> dict[str, Any]:
    claims = [{"name": "imex", "resourceClaimTemplateName": f"{job.name}-channel"}] if job.multinode_nvlink else []
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 900,  # time to save after SIGTERM
        **({"nodeSelector": {"kubernetes.io/arch": _ARCH[job.topology.host.arch]}}),
        "containers": [
            {
                "name": "ranks",
                "image": job.image,
                "command": ["bash", "-c"],
                "args": [_script(job, pods)],
                "env": _environment(job),
                "resources": _resources(job),
                "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},  # RDMA pins memory
                "volumeMounts": [
                    {"name": "shm", "mountPath": "/dev/shm"},
                    {"name": "runs", "mountPath": "/workspace/runs"},
                ],
            }
        ],
        **({"resourceClaims": claims} if claims else {}),
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": f"{job.name}-runs"}},
        ],
    }


_ARCH = {"aarch64": "arm64", "x86_64": "amd64"}


def _script(job: Job, pods: int) -> str:
    """Node number: the Job's index times its pods plus the pod's; the first pod of the first Job is the master."""
    preflight = f"python -m fp4dist.cluster preflight {shlex.join(job.where)} --gpus-per-node {job.slots}"
    if job.multinode_nvlink:
        preflight += " --kubernetes --wait-imex 120"
    if job.allow_degraded:
        preflight += " --allow-degraded"
    start = slurm.torchrun(job, node_rank='"$node"', master='"$MASTER_ADDR"', port='"$MASTER_PORT"')
    return "\n".join(
        [
            "set -euo pipefail",
            "cd /workspace",
            f"node=$((JOB_INDEX * {pods} + JOB_COMPLETION_INDEX))",
            f"{preflight} --config {shlex.quote(job.config)}",
            f"exec {start}",
            "",
        ]
    )


def _environment(job: Job) -> list[dict[str, Any]]:
    index = {"fieldRef": {"fieldPath": f"metadata.labels['{_JOB_INDEX}']"}}
    fixed = {**job.variables, "MASTER_ADDR": f"{job.name}-domain-0-0.{job.name}", "MASTER_PORT": str(job.port)}
    return [{"name": "JOB_INDEX", "valueFrom": index}, *({"name": k, "value": v} for k, v in fixed.items())]


def _resources(job: Job) -> dict[str, Any]:
    limits: dict[str, str] = {} if job.cpu else {"nvidia.com/gpu": str(job.slots)}
    for text in job.resources:
        name, sign, count = text.partition("=")
        if not sign or not count.isdigit():
            raise ConfigError(f"--resource {text!r}: expected name=count, such as rdma/ib=4")
        limits[name] = count
    claims = {"claims": [{"name": "imex"}]} if job.multinode_nvlink else {}
    return {"limits": limits, **claims}


class _Dumper(yaml.SafeDumper):
    """Scripts as literal blocks."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
