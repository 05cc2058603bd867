#!/usr/bin/env python
"""Check a started job's ranks together: equal environments, NVLink across nodes in use, collectives fast enough.

    torchrun --nproc-per-node 2 launch/check_fabric.py --topology h100_hgx
    srun ... launch/rank.sh python -u launch/check_fabric.py --topology gb200_nvl72 --expect-mnnvl

Exit codes: 0 in order, 20 NCCL left multi-node NVLink out, 22 ranks with different environments, 30 collectives too
slow, 2 something else to correct.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from fp4dist import env
from fp4dist.cluster.checks.fabric import fallback
from fp4dist.cluster.faults import Fault, exit_code
from fp4dist.cluster.topology import load_topology
from fp4dist.comm import fabric
from fp4dist.errors import Fp4DistError
from fp4dist.train.world import check_environments


def main() -> int:
    """Join the job, check, leave."""
    args = _parse()
    try:
        topology = load_topology(args.topology)
        env.ensure_launch_variables()
        env.check_signature()
        log = _nccl_log() if args.expect_mnnvl else None
        device = _join()
        check_environments()
        rates = fabric.measure(device, args.megabytes)
    except (Fp4DistError, OSError) as e:
        print(f"rank {env.rank()}: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
        return getattr(e, "exit_code", 2)
    ranks = dist.get_world_size()
    faults: list[Fault] = [] if args.no_band else fabric.judge(rates, topology, ranks)
    if log is not None:
        inside = ranks if ranks <= topology.gpus_per_domain else args.ranks_per_domain
        faults += fallback(log.read_text(encoding="utf-8", errors="replace"), f"rank {env.rank()}", inside)
    if env.rank() == 0:
        print(f"check_fabric: {ranks} ranks, all-reduce {rates.all_reduce:.1f}, all-to-all {rates.all_to_all:.1f} GB/s")
        for fault in faults:
            print(fault.line())
    dist.destroy_process_group()
    return exit_code(faults)


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=plain)
    parser.add_argument("--topology", required=True, help="shipped name or path")
    parser.add_argument("--megabytes", type=int, default=256, help="of each collective")
    parser.add_argument("--expect-mnnvl", action="store_true", help="NVLink must join nodes; read from NCCL's log")
    parser.add_argument("--ranks-per-domain", type=int, default=1, help="of the job in one NVLink domain")
    parser.add_argument("--no-band", action="store_true", help="print the rates, do not judge them")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    return parser.parse_args()


def _nccl_log() -> Path:
    """Where NCCL of this process writes what it decides at init."""
    path = Path(tempfile.mkdtemp(prefix="fp4dist-")) / f"nccl-{env.rank()}.log"
    env.log_nccl_init(str(path))
    return path


def _join() -> torch.device:
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", env.local_rank())
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")  # without a device: NCCL starts after the environments were compared
    return device


if __name__ == "__main__":
    sys.exit(main())
