"""Slurm: the batch script of a job, and the cluster's block topology written and read back.

topology/block knows which nodes NVLink joins: one block a rack. `--segment=k` grants nodes in groups of k of one block;
the sorted host list and an arbitrary distribution then number the ranks rack after rack, so that the fastest axes of
the layout stay inside. Sources: Slurm's topology guide, topology.conf(5), topology.yaml(5), sbatch(1).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import yaml

from fp4dist.cluster import hostfile
from fp4dist.cluster.hostlist import compress, expand
from fp4dist.cluster.job import Job
from fp4dist.errors import ConfigError

_PAIR = re.compile(r"(\w+)=(\S+)")
_SAVE_S = 900  # before the time limit a run is told to save


class Block(NamedTuple):
    """Nodes that NVLink joins."""

    name: str
    nodes: tuple[str, ...]


# -- topology


def topology_conf(blocks: Sequence[Block], sizes: Sequence[int]) -> str:
    """topology.conf of the plugin topology/block. sizes: the base block and multiples of it by powers of two."""
    _check_blocks(blocks, sizes)
    lines = [f"BlockName={b.name} Nodes={compress(b.nodes)}" for b in blocks]
    return "\n".join([*lines, f"BlockSizes={','.join(map(str, sizes))}"]) + "\n"


def topology_yaml(blocks: Sequence[Block], sizes: Sequence[int], name: str = "nvlink") -> str:
    """topology.yaml, which Slurm 25.05 and later prefer to topology.conf."""
    _check_blocks(blocks, sizes)
    listed = [{"block": b.name, "nodes": compress(b.nodes)} for b in blocks]
    topology = {"topology": name, "cluster_default": True, "block": {"block_sizes": list(sizes), "blocks": listed}}
    return yaml.safe_dump([topology], sort_keys=False, width=120)


def parse_topology_conf(text: str) -> tuple[list[Block], list[int]]:
    """Blocks and block sizes of a topology.conf; names of parameters in any case, comments from # on."""
    blocks: list[Block] = []
    sizes: list[int] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = {key.lower(): value for key, value in _PAIR.findall(line.split("#")[0])}
        if "blockname" in words:
            if "nodes" not in words:
                raise ConfigError(f"topology.conf line {number}: block {words['blockname']} has no Nodes=")
            blocks.append(Block(words["blockname"], tuple(expand(words["nodes"]))))
        elif "blocksizes" in words:
            sizes = [int(s) for s in words["blocksizes"].split(",")]
        elif words:
            raise ConfigError(f"topology.conf line {number}: {line.strip()!r} is not of the plugin topology/block")
    _check_blocks(blocks, sizes)
    return blocks, sizes


def parse_topology_yaml(text: str) -> tuple[list[Block], list[int]]:
    """Blocks and block sizes of the first block topology of a topology.yaml."""
    try:
        data: Any = yaml.safe_load(text)
        found = next(t["block"] for t in data if "block" in t)
        blocks = [Block(b["block"], tuple(expand(b["nodes"]))) for b in found["blocks"]]
        sizes = [int(s) for s in found["block_sizes"]]
    except (yaml.YAMLError, StopIteration, KeyError, TypeError) as e:
        raise ConfigError(f"topology.yaml: no block topology in it ({type(e).__name__}: {e})") from e
    _check_blocks(blocks, sizes)
    return blocks, sizes


def _check_blocks(blocks: Sequence[Block], sizes: Sequence[int]) -> None:
    if not blocks or not sizes:
        raise ConfigError("block topology: it needs at least one block and the block sizes")
    base = sizes[0]
    for block in blocks:
        if len(block.nodes) < base:
            raise ConfigError(
                f"block {block.name}: {len(block.nodes)} nodes are fewer than the base block, {base}; lower BlockSizes"
            )
    for size in sizes[1:]:
        factor = size // base
        if size % base or factor & (factor - 1):
            raise ConfigError(f"BlockSizes {list(sizes)}: {size} is not {base} times a power of two")
    names = [node for block in blocks for node in block.nodes]
    if len(set(names)) != len(names):
        raise ConfigError("block topology: a node is in two blocks")


# -- the batch script


def sbatch(job: Job) -> str:
    """A batch script that checks the fabric, starts the run, and queues itself again while the run is not done."""
    return "\n".join([*_head(job), *_body(job)]) + "\n"


def _head(job: Job) -> list[str]:
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.slots}",
        *([] if job.cpu else [f"--gpus-per-node={job.slots}"]),
        *([f"--segment={job.nodes_per_domain}"] if job.topology.mnnvl else []),
        "--exclusive",
        "--mem=0",
        f"--time={job.time}",
        *(f"--{key}={value}" for key in ("account", "partition", "qos") if (value := getattr(job, key))),
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{_SAVE_S}",
        "--output=%x-%j.out",
    ]
    how = "# Submit it from the repository: sbatch THIS_FILE. Written by `python -m fp4dist.cluster launch`."
    return ["#!/usr/bin/env bash", f"# {job.title}", how, *(f"#SBATCH {option}" for option in options)]


def _body(job: Job) -> list[str]:
    return [
        "set -euo pipefail",
        'cd "$SLURM_SUBMIT_DIR"',
        "",
        *_exports(job.variables),
        "",
        "# Sorted, the nodes of a rack follow each other; ranks are numbered in this order.",
        'work="$SLURM_SUBMIT_DIR/runs/launch/$SLURM_JOB_ID"',
        'mkdir -p "$work"',
        'scontrol show hostnames "$SLURM_JOB_NODELIST" | sort -V >"$work/hosts"',
        'MASTER_ADDR=$(head -n 1 "$work/hosts")',
        f"export MASTER_ADDR MASTER_PORT={job.port}",
        *_container(job),
        "",
        *_preflight(job),
        "",
        *_start(job),
        "",
        *_WAIT,
    ]


def _exports(variables: dict[str, str]) -> list[str]:
    """Every rank checks by the last two that all of them arrived."""
    why = (
        "# Every rank compares what arrives with FP4DIST_ENV_HASH and stops where something is missing (exit code 22)."
    )
    return [why, *(f"export {name}={shlex.quote(value)}" for name, value in variables.items())]


def _container(job: Job) -> list[str]:
    if job.container is None:
        return ["container=()"]
    where = '"--container-mounts=$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR" "--container-workdir=$SLURM_SUBMIT_DIR"'
    return [f"container=(--container-image={shlex.quote(job.container)} {where})"]


def _preflight(job: Job) -> list[str]:
    nodes = ["--gpus-per-node", str(job.slots), "--segment", str(job.nodes_per_domain), "--config", job.config]
    judge = shlex.join([*job.where, *nodes])
    wait = " --wait-imex 120" if job.multinode_nvlink and not job.allow_degraded else ""
    degraded = " --allow-degraded" if job.allow_degraded else ""
    lines = [
        "# Facts of every node, judged together: exit codes 20 to 30 name the class of the fault.",
        'srun "${container[@]}" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \\',
        f'  python -m fp4dist.cluster preflight --collect "$work/facts" --config {shlex.quote(job.config)}{wait}',
        'srun "${container[@]}" --nodes=1 --ntasks=1 \\',
        f'  python -m fp4dist.cluster preflight --facts "$work/facts" --hosts "$work/hosts" {judge}{degraded}',
    ]
    if job.bench and not job.cpu:
        inside = job.nodes_per_domain * job.slots
        lines += [
            "",
            "# A short all-reduce and all-to-all over all ranks, against what the links should give.",
            f"{_all_ranks(job)} \\",
            f"  launch/rank.sh python -u launch/check_fabric.py {shlex.join(job.where)}"
            + (
                f" --expect-mnnvl --ranks-per-domain {inside}"
                if job.multinode_nvlink and not job.allow_degraded
                else ""
            ),
        ]
    return lines


def _all_ranks(job: Job) -> str:
    """One srun over all ranks in the order of the sorted hosts: an arbitrary distribution wants one line a rank."""
    hosts = 'SLURM_HOSTFILE="$work/ranks"'
    make = f'awk \'{{for (i = 0; i < {job.slots}; i++) print}}\' "$work/hosts" >"$work/ranks"'
    options = f"--ntasks={job.gpus} --distribution=arbitrary --kill-on-bad-exit=1 --cpu-bind=none"
    return f'{make}\n{hosts} srun "${{container[@]}}" {options}'


def _start(job: Job) -> list[str]:
    if job.launcher == "srun":
        return [f"{_all_ranks(job)} \\", f"  {shlex.join(job.command)} &"]
    one_a_node = (
        'SLURM_HOSTFILE="$work/hosts" srun "${container[@]}" --ntasks="$SLURM_NNODES" --distribution=arbitrary'
        " --kill-on-bad-exit=1 --cpu-bind=none"
    )
    if job.launcher == "deepspeed":
        lines = [f'sed \'s/$/ slots={job.slots}/\' "$work/hosts" >"$work/hostfile"', 'export HOSTFILE="$work/hostfile"']
        inner = hostfile.without_ssh(
            job.command,
            hostfile='"$HOSTFILE"',
            node_rank='"$SLURM_PROCID"',
            master='"$MASTER_ADDR"',
            port='"$MASTER_PORT"',
        )
    else:
        lines, inner = [], torchrun(job, node_rank='"$SLURM_PROCID"', master='"$MASTER_ADDR"', port='"$MASTER_PORT"')
    # expanded on the node, where SLURM_PROCID is its number
    return [*lines, "# shellcheck disable=SC2016", f"{one_a_node} \\", f"  bash -c {shlex.quote('exec ' + inner)} &"]


def torchrun(job: Job, *, node_rank: str, master: str, port: str) -> str:
    """A torchrun command line that starts one node; node_rank, master and port may be shell variables in quotes."""
    where = f"--nnodes {job.nodes} --node-rank {node_rank} --master-addr {master} --master-port {port}"
    return f"torchrun --nproc-per-node {job.slots} {where} --no-python {shlex.join(job.command)}"


_WAIT = """\
# Before the time limit the ranks get SIGTERM: they finish the step, save and end; the job is queued again and resumes.
run=$!
interrupted=false
trap 'interrupted=true; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
status=0
while true; do # a trap ends `wait` early
  wait "$run" && status=0 || status=$?
  kill -0 "$run" 2>/dev/null || break
done
if $interrupted && ((status == 0)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status\"""".splitlines()


def segment_of(nodes: int, usable: int) -> int:
    """The largest k for `--segment`: it divides `nodes` and is at most the `usable` nodes of a block."""
    return max(k for k in range(1, min(nodes, usable) + 1) if nodes % k == 0)


def blocks_of(hosts: Iterable[str], per_block: int) -> list[Block]:
    """Hosts in order, cut into blocks of `per_block`: how a site without discovery may begin."""
    listed = list(hosts)
    cuts = range(0, len(listed), per_block)
    return [Block(f"rack{i + 1:02d}", tuple(listed[first : first + per_block])) for i, first in enumerate(cuts)]
