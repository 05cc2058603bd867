"""Several runs of the training program, one after another, by the ranks of one job: what tools/jobs.py starts.

    torchrun --nproc-per-node 8 tools/job_runs.py plan.json [--until SECONDS]

plan.json is a list of {"config": name or path, "sets": [...], "folder": path, "trace": false}. Every run trains its
steps as launch/pretrain.py does, without evaluations and checkpoints, and leaves in its folder:

    metrics.jsonl   a line a step: loss, grad_norm, seconds (of the host, which waits for every step's gradients),
                    tokens, bytes_sent and canary where the run compresses something
    trace.json      where asked for: what the profiler saw on the wire in the last step without a canary, whose time
                    means nothing then: faults (a compressed bucket that travels in high precision too), NCCL's kernels
    case.json       when it has ended: peak_bytes (the largest of all ranks), fp4_share, graphs, random_tokens, failure

A run that fp4dist refuses is told in its case.json, and the next begins; what fails in another way ends the job. Where
a run's token files do not exist, its ranks read random tokens (Zipf's law). No run is begun when the clock (time.time)
has passed --until. A job's start, imports and connections are paid for once.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fp4dist import env
from fp4dist.comm.compression import StepTraffic
from fp4dist.comm.ledger import Account
from fp4dist.comm.trace import Trace, judge, profiled
from fp4dist.errors import Fp4DistError
from fp4dist.spec.load import load_run
from fp4dist.spec.run import RunConfig
from fp4dist.train import communication, data, loop
from fp4dist.train.engine import Engine
from fp4dist.train.world import World, open_world


def main() -> int:
    """A rank of the job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--until", type=float, default=float("inf"), help="begin no run after this time.time()")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO if env.rank() == 0 else logging.WARNING, format="%(message)s")
    env.ensure_launch_variables()
    if torch.cuda.is_available():
        torch.cuda.set_device(env.local_rank())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    for case in json.loads(args.plan.read_text(encoding="utf-8")):
        if _late(args.until):
            break
        run_case(case["config"], case["sets"], Path(case["folder"]), trace=case.get("trace", False))
    dist.destroy_process_group()
    return 0


def _late(until: float) -> bool:
    """Whether the clock of rank 0, which decides for all, has passed `until`."""
    late = torch.tensor([int(time.time() > until)], device="cuda" if torch.cuda.is_available() else "cpu")
    dist.broadcast(late, 0)
    return bool(late.item())


def run_case(config: str, sets: list[str], folder: Path, trace: bool = False) -> None:
    """Train one run and write its case.json; every rank of the job takes part."""
    folder.mkdir(parents=True, exist_ok=True)
    failure, found = None, {}
    try:
        found = _train(loop.resolve_dtype(load_run(config, sets)), folder, trace)
    except Fp4DistError as e:  # checked alike on all ranks
        failure = f"{type(e).__name__}: {str(e).splitlines()[0]}"
    if dist.get_rank() == 0:
        (folder / "case.json").write_text(json.dumps({"failure": failure, **found}) + "\n", encoding="utf-8")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    dist.barrier()


def _train(config: RunConfig, folder: Path, trace: bool) -> dict[str, Any]:
    """The steps of one run; what case.json tells of it."""
    with open_world(config) as world:
        on_gpu = world.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(world.device)
        engine, applied = loop.build_engine(config, world)
        batches = batches_of(config, world)
        tokens = config.train.global_batch_size * config.model.seq_length
        at = _traced_step(config) if trace else None
        with (folder / ("metrics.jsonl" if world.is_first else f"rank{world.rank}.jsonl")).open("w") as file:
            for step in range(1, config.train.steps + 1):
                applied.set_step(step - 1, config.train.steps)
                with profiled() if step == at else nullcontext() as seen:
                    result, seconds = loop.timed_step(engine, applied, step, batches)
                if seen is not None:
                    _judge(seen, engine, result.traffic, folder)
                sent, canaries = communication.told(result.traffic)
                row = {"step": step, "loss": result.loss, "grad_norm": result.grad_norm, "seconds": seconds,
                       "tokens": tokens, "bytes_sent": sent, "canary": canaries}  # fmt: skip
                file.write(json.dumps(row) + "\n")
                file.flush()
        peak = torch.tensor([torch.cuda.max_memory_allocated() if on_gpu else 0.0], device=world.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        engine.close()
        return {
            "peak_bytes": int(peak.item()) or None,
            "fp4_share": applied.to_json()["fp4_share_of_block_linear_flops"],
            "graphs": getattr(engine, "graphs", None),
            "random_tokens": not has_data(config),
        }


def _traced_step(config: RunConfig) -> int:
    """The last step, or the one before where a canary doubles its traffic."""
    every, steps = config.comm.canary.every if config.comm is not None else 0, config.train.steps
    return steps - 1 if every and (steps - 1) % every == 0 and steps > 1 else steps


def _judge(seen: Trace, engine: Engine, traffic: StepTraffic | None, folder: Path) -> None:
    """Write trace.json: what all ranks found wrong, and rank 0's collectives and kernels."""
    compression, faults = engine.compression, []
    if compression is not None and traffic is not None:
        booked = traffic.accounts.get("grad_reduce", Account())
        faults = judge(
            seen.collectives,
            compression.decisions,
            booked,
            mpu.get_data_parallel_world_size(with_context_parallel=True),
        )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, faults)
    if dist.get_rank() == 0:
        told = {
            "faults": [f"rank {rank}: {fault}" for rank, found in enumerate(everyone) for fault in found],
            "collectives": [list(call) for call in seen.collectives],
            "kernels": {name: {"count": count, "us": us} for name, (count, us) in seen.kernels.items()},
        }
        (folder / "trace.json").write_text(json.dumps(told) + "\n", encoding="utf-8")


def has_data(config: RunConfig) -> bool:
    """Whether the token files of `data.train` exist or can be made."""
    prefixes = [entry for entry in config.data.train if not entry.replace(".", "", 1).isdigit()]
    return config.data.prepare is not None or all(Path(f"{prefix}.bin").is_file() for prefix in prefixes)


def batches_of(config: RunConfig, world: World) -> Iterator[data.Batch]:
    """This rank's micro-batches: the run's own, or random ones."""
    if not has_data(config):
        return islice(random_batches(config), world.dp_rank, None, world.dp_size)
    data.ensure_prepared(config)
    data.check_token_files(config)
    place = {"dp_rank": world.dp_rank, "dp_size": world.dp_size, "cp_rank": world.cp_rank, "cp_size": world.cp_size}
    return data.train_iterator(data.build_datasets(config, world.dp_size), config, consumed_samples=0, **place)


def random_batches(config: RunConfig) -> Iterator[data.Batch]:
    """Tokens of frequency proportional to 1 / rank, the same in every run of this configuration."""
    shape = (config.train.micro_batch_size, config.model.seq_length + 1)
    generator = torch.Generator().manual_seed(config.run.seed)
    frequency = 1.0 / torch.arange(1, config.model.vocab_size + 1)
    positions = torch.arange(shape[1] - 1).expand(shape[0], -1).contiguous()
    while True:
        text = torch.multinomial(frequency, shape[0] * shape[1], replacement=True, generator=generator).view(shape)
        yield data.Batch(
            text[:, :-1].contiguous(), text[:, 1:].contiguous(), torch.ones_like(positions).float(), positions
        )


if __name__ == "__main__":
    sys.exit(main())
