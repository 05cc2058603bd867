"""`python -m fp4dist.cluster preflight`: collect facts of this node, or judge those of all nodes."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from fp4dist.cluster import facts, preflight
from fp4dist.cluster.checks.expect import Expect
from fp4dist.cluster.faults import exit_code
from fp4dist.cluster.topology import load_topology
from fp4dist.errors import ConfigError

HELP = "check nodes before a job: versions, NVLink fabric, IMEX, NICs, GPUs, environment, data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--topology", help="shipped name or path; not needed with --collect")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="write this node's facts to DIR/HOST and end")
    parser.add_argument("--wait-imex", type=float, default=0, metavar="S", help="at most, for the IMEX domain to be UP")
    parser.add_argument("--facts", type=Path, metavar="DIR", help="judge the captures in DIR; default: this node, now")
    parser.add_argument("--hosts", type=Path, help="file with a host a line, in rank order")
    parser.add_argument("--gpus-per-node", type=int, help="ranks of a node; default the topology's")
    parser.add_argument("--segment", type=int, help="nodes that share a NVLink domain; default: as many as the job has")
    parser.add_argument("--config", help="run file: its hash and data are compared over nodes")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one key; repeatable")
    parser.add_argument("--kubernetes", action="store_true", help="IMEX comes from a ComputeDomain")
    parser.add_argument(
        "--megatron", default="", metavar="ARGS", help="arguments of Megatron-LM's script, if that runs"
    )
    parser.add_argument("--allow-degraded", action="store_true", help="a degraded NVLink fabric is only a warning")
    parser.add_argument("--json", action="store_true", help="print faults as JSON")


def run(args: argparse.Namespace) -> int:
    """0 without a fatal fault, else the class of the first one to repair (20 to 30)."""
    facts.wait_for_imex(args.wait_imex)
    if args.collect is not None:
        found = facts.collect(args.config, tuple(args.set))
        facts.save(found, args.collect)
        print(f"preflight: facts of {found.host} are in {args.collect / found.host}")
        return 0
    nodes = facts.load(args.facts) if args.facts is not None else [facts.collect(args.config, tuple(args.set))]
    faults = preflight.judge(nodes, _expect(args, len(nodes)))
    if args.json:
        print(json.dumps([f._asdict() | {"kind": int(f.kind)} for f in faults], indent=2))
    else:
        print(preflight.table(faults, len(nodes)))
    return exit_code(faults)


def _expect(args: argparse.Namespace, nodes: int) -> Expect:
    if args.topology is None:
        raise ConfigError("preflight: give --topology NAME, or --collect DIR to write facts only")
    topology = load_topology(args.topology)
    hosts = args.hosts.read_text(encoding="utf-8").split() if args.hosts else []
    # a single node of a pod or a desk cannot see its rack; its fabric and IMEX must be in order all the same
    whole = min(nodes if args.facts else topology.nodes_per_domain, topology.nodes_per_domain)
    return Expect(
        topology=topology,
        gpus_per_node=args.gpus_per_node or topology.host.gpus,
        segment=args.segment or whole,
        hosts=tuple(hosts),
        kubernetes=args.kubernetes,
        megatron=tuple(shlex.split(args.megatron)),
        allow_degraded=args.allow_degraded,
    )
