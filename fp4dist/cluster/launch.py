"""A job as files: what an operator submits, applies or runs, complete and readable."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from fp4dist.cluster import hostfile, kubernetes, slurm
from fp4dist.cluster.job import Job
from fp4dist.cluster.topology import place
from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Layout, Topology
from fp4dist.spec.run import RunConfig


def layout_of(config: RunConfig) -> Layout:
    """The layout that a run file asks for."""
    p, engine = config.parallel, config.engine.kind
    return Layout(
        tp=p.tp,
        pp=p.pp,
        vpp=p.vpp,
        cp=p.cp,
        ep=p.ep,
        micro_batch=config.train.micro_batch_size,
        order=p.order,
        recompute=config.train.recompute,
        engine=engine,
    )


def nodes_per_domain(topology: Topology, gpus: int, layout: Layout) -> int:
    """Nodes that the job takes of each NVLink domain; raises ConfigError where domains would be filled unevenly."""
    placement = place(topology, gpus, layout)
    if placement.uneven:
        usable = topology.nodes_per_domain - topology.spare_nodes
        raise ConfigError(
            f"gpus = {gpus}: {gpus // topology.host.gpus} nodes cannot be spread evenly over domains of"
            f" {topology.nodes_per_domain} nodes ({topology.spare_nodes} spare); Slurm's --segment and ranks in order"
            f" need that: take a multiple of {usable * topology.host.gpus} GPUs"
        )
    return placement.segment


def files(job: Job) -> dict[str, str]:
    """File name -> text. Files that need host names come only with `job.hosts`; one node needs one script."""
    made = {f"{job.name}.environment.json": manifest(job)}
    if job.nodes == 1:
        made[f"{job.name}.sh"] = one_node(job)
    else:
        made[f"{job.name}.node.sh"] = node_script(job)
    made[f"{job.name}.sbatch"] = slurm.sbatch(job)
    if not job.cpu:
        made[f"{job.name}.kubernetes.yaml"] = kubernetes.manifests(job)
    if job.hosts and job.nodes > 1:
        made[f"{job.name}.hostfile"] = hostfile.hostfile(job.hosts, job.slots, job.title)
        made[f"{job.name}.deepspeed_env"] = hostfile.deepspeed_env(job.variables)
        made[f"{job.name}.deepspeed.sh"] = pdsh_script(job)
    if job.hosts and job.topology.mnnvl:
        blocks = slurm.blocks_of(job.hosts, job.nodes_per_domain)
        made["topology.conf"] = slurm.topology_conf(blocks, [job.nodes_per_domain])
        made["topology.yaml"] = slurm.topology_yaml(blocks, [job.nodes_per_domain])
    return made


def write(job: Job, folder: Path) -> list[Path]:
    """Write all files; scripts become executable. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in files(job).items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        if name.endswith((".sh", ".sbatch")):
            path.chmod(0o755)
        paths.append(path)
    return paths


def manifest(job: Job) -> str:
    """What every rank's environment holds and why, with the digest that ranks check."""
    reasons = {s.name: {"value": s.value, "why": s.why} for s in job.settings}
    data = {"job": job.title, "digest": job.variables["FP4DIST_ENV_HASH"], "variables": reasons}
    return json.dumps(data, indent=2) + "\n"


def one_node(job: Job) -> str:
    """A script that starts all ranks of one node with the `deepspeed` launcher, or torchrun."""
    if job.launcher == "torchrun":
        start = slurm.torchrun(job, node_rank="0", master="127.0.0.1", port='"$MASTER_PORT"')
    else:
        launcher = f'deepspeed --num_gpus {job.slots} --master_port "$MASTER_PORT" --no_python --no_local_rank'
        start = f"{launcher} {shlex.join(job.command)}"
    return _script(job, f"Run it in the repository: {job.name}.sh", [_port(job), f'exec {start} "$@"'])


def node_script(job: Job) -> str:
    """A script to start on every node without ssh, by whatever reaches them: it is told the node's number."""
    here = '"$(dirname "$0")"'
    deepspeed = hostfile.without_ssh(
        job.command, hostfile='"$hostfile"', node_rank='"$node"', master='"$master"', port='"$MASTER_PORT"'
    )
    torchrun = slurm.torchrun(job, node_rank='"$node"', master='"$master"', port='"$MASTER_PORT"')
    body = [
        "node=${1:?number of this node, from 0} master=${2:?address of node 0} launcher=${3:-" + _started_by(job) + "}",
        _port(job),
        'if [[ "$launcher" == torchrun ]]; then',
        f"  exec {torchrun}",
        "fi",
        f"hostfile={here}/{job.name}.hostfile",
        'if [[ ! -f "$hostfile" ]]; then # DeepSpeed needs names to count nodes; without ssh it calls none of them',
        "  hostfile=$(mktemp)",
        f'  for ((i = 0; i < {job.nodes}; i++)); do echo "node$i slots={job.slots}"; done >"$hostfile"',
        "fi",
        f"exec {deepspeed}",
    ]
    usage = (
        f"Run on every node, in the repository: {job.name}.node.sh NODE_NUMBER ADDRESS_OF_NODE_0 [deepspeed|torchrun]"
    )
    return _script(job, usage, body)


def pdsh_script(job: Job) -> str:
    """A script for one node with ssh to all others: `deepspeed` over pdsh."""
    words = hostfile.over_pdsh(job.command, hostfile="HOSTFILE", master=job.hosts[0], port=job.port)
    line = shlex.join(words).replace("HOSTFILE", '"$hostfile"', 1)
    body = [
        f'hostfile="$(cd "$(dirname "$0")" && pwd)/{job.name}.hostfile"',
        'if [[ ! -f "$hostfile" ]]; then',
        '  echo "$hostfile is missing; DeepSpeed would start on this node alone" >&2',
        "  exit 23",
        "fi",
        "# pdsh carries few variables; DeepSpeed adds the lines of this file to them",
        'export DS_ENV_FILE="${hostfile%.hostfile}.deepspeed_env"',
        f"exec {line}",
    ]
    return _script(job, f"Run on one node with ssh to all, in the repository: {job.name}.deepspeed.sh", body)


def _started_by(job: Job) -> str:
    return "torchrun" if job.launcher == "torchrun" else "deepspeed"


def _port(job: Job) -> str:
    return f"export MASTER_PORT=${{MASTER_PORT:-{job.port}}}"


def _script(job: Job, usage: str, body: list[str]) -> str:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in job.variables.items()]
    head = ["#!/usr/bin/env bash", f"# {job.title}", f"# {usage}", "set -euo pipefail"]
    why = "# The same on every rank: each compares it with FP4DIST_ENV_HASH."
    return "\n".join([*head, why, *exports, *body]) + "\n"
