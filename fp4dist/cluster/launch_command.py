"""`python -m fp4dist.cluster launch`: a run file and a cluster become launch files."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import get_args

from fp4dist.cluster import hostfile
from fp4dist.cluster.hostlist import expand
from fp4dist.cluster.job import Job, Launcher
from fp4dist.cluster.launch import layout_of, nodes_per_domain, write
from fp4dist.cluster.topology import load_topology, place
from fp4dist.errors import ConfigError
from fp4dist.spec.load import load_run

HELP = "write Slurm, Kubernetes, DeepSpeed and torchrun files for a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--config", required=True, help="run file, as `plan` writes it")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one key; repeatable")
    parser.add_argument("--topology", required=True, help="shipped name or path of a topology")
    parser.add_argument("--gpus", type=int, required=True, help="ranks of the job")
    parser.add_argument("--out", type=Path, help="folder for the files; default runs/<name>/launch")
    parser.add_argument("--name", help="of the job; default from the run")
    parser.add_argument("--launcher", choices=get_args(Launcher), default="srun", help="what Slurm starts on the nodes")
    parser.add_argument("--hosts", help="host list such as gb-r01-t[01-16],..., or a file with a host a line, in order")
    parser.add_argument("--port", type=int, default=29500, help="of the rendezvous")
    parser.add_argument("--time", default="24:00:00", help="limit of a Slurm job")
    for key in ("account", "partition", "qos"):
        parser.add_argument(f"--{key}", help="of Slurm")
    parser.add_argument("--container", help="image for pyxis (Slurm)")
    parser.add_argument("--image", default="fp4dist:latest", help="image for Kubernetes")
    parser.add_argument(
        "--resource", action="append", default=[], help="further Kubernetes resource, such as rdma/ib=4"
    )
    parser.add_argument("--no-bench", action="store_true", help="leave the timed collectives out of preflight")
    parser.add_argument("--allow-degraded", action="store_true", help="run over NICs alone where NVLink is degraded")
    parser.add_argument("--nvls", action="store_true", help="NVLink SHARP multicast, on every rank")


def run(args: argparse.Namespace) -> int:
    """Write the files and say what to do with them."""
    job, warnings = job_of(args)
    folder = args.out or Path("runs") / job.name / "launch"
    paths = write(job, folder)
    print(job.title)
    for warning in warnings:
        print(f"warning: {warning}")
    for path in paths:
        print(f"  {path}")
    print(f"start: {_start(job, folder)}")
    return 0


def job_of(args: argparse.Namespace) -> tuple[Job, tuple[str, ...]]:
    """The job that the command line means, and the placement's warnings."""
    config = load_run(args.config, args.set)
    topology, layout = load_topology(args.topology), layout_of(config)
    warnings = place(topology, args.gpus, layout).warnings
    _check_batch(config.train.global_batch_size, config.train.micro_batch_size, layout.dp(args.gpus))
    try:
        job = Job(
            name=args.name or _tidy(config.run.name),
            topology=topology,
            layout=layout,
            gpus=args.gpus,
            nodes_per_domain=nodes_per_domain(topology, args.gpus, layout),
            config=args.config,
            topology_file=args.topology if args.topology.endswith((".yaml", ".yml")) else "",
            overrides=tuple(args.set),
            launcher=args.launcher,
            hosts=tuple(_hosts(args.hosts)),
            port=args.port,
            time=args.time,
            account=args.account,
            partition=args.partition,
            qos=args.qos,
            container=args.container,
            image=args.image,
            resources=tuple(args.resource),
            bench=not args.no_bench,
            allow_degraded=args.allow_degraded,
            nvls=args.nvls,
        )
    except ValueError as e:
        raise ConfigError(f"launch: {e}") from e
    return job, warnings


def _check_batch(global_batch: int, micro_batch: int, dp: int) -> None:
    if global_batch % (micro_batch * dp):
        raise ConfigError(
            f"train.global_batch_size = {global_batch} is not a multiple of train.micro_batch_size * data parallel ="
            f" {micro_batch} * {dp}: all ranks run equally many micro-batches; change one of them or --gpus"
        )


def _tidy(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "run"


def _hosts(text: str | None) -> list[str]:
    """A host list, a DeepSpeed hostfile, or a file with a host a line."""
    if text is None:
        return []
    if not Path(text).is_file():
        return expand(text)
    content = Path(text).read_text(encoding="utf-8")
    if "slots=" in content:
        return list(hostfile.parse_hostfile(content))
    return [line.strip() for line in content.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _start(job: Job, folder: Path) -> str:
    if job.nodes == 1:
        return f"{folder / job.name}.sh"
    return f"sbatch {folder / job.name}.sbatch"
