"""Collectives against a simulation in one process with the reference codec, bit for bit; on gloo and on GPUs.

python -m tests.comm.bits 2                               # two GPUs
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fp4dist.comm.codec import Noise
from fp4dist.comm.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    recv,
    reduce_scatter,
    reduce_scatter_parts,
    send,
)
from fp4dist.comm.exchange import Options
from fp4dist.comm.hierarchy import GroupTree
from fp4dist.comm.parts import Parts, decode_parts, encode_parts
from fp4dist.errors import WireError
from fp4dist.spec.wire import BF16_WIRE, Wire

NOISE = Noise(seed=5, step=6, bucket=7)
WIRES = (Wire(), Wire(signs="per_rank"), Wire(kind="fp8"), BF16_WIRE)


def simulated(every: Tensor, r: int, wire: Wire, noise: Noise, dtype: torch.dtype) -> Tensor:
    """What rank `r` must get of a reduce-scatter (mean) of `every` [W, W n], on the CPU."""
    world = len(every)
    out = torch.empty(every.shape[1] // world, dtype=dtype)
    sources = [Parts.of(list(x.view(world, -1)), wire) for x in every]
    each = sources[0].records // world
    others = [i for i in range(world) if i != r]
    messages = torch.stack([encode_parts(sources[i], noise, i, ((r * each, (r + 1) * each),)) for i in others])
    own = Parts.of([every[r].view(world, -1)[r]], wire)
    decode_parts(Parts.of([out], wire), messages, noise, others, own, 1 / world, own_at=r)
    return out


def check_all(device: torch.device, sizes: Sequence[int], wires: Sequence[Wire] = WIRES) -> list[str]:
    """What differs. Compiling takes a few seconds for each wire and type."""
    world, rank = dist.get_world_size(), dist.get_rank()
    faults: list[str] = []
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    every = torch.empty(0)
    for n in sizes:
        for dtype in (torch.bfloat16, torch.float32) if device.type == "cpu" else (torch.bfloat16,):
            generator = torch.Generator().manual_seed(n)
            every = torch.randn(world, world * n, generator=generator).to(dtype)
            mine = every[rank].to(device)
            for wire in wires:
                want = simulated(every, rank, wire, NOISE, torch.float32)
                for pieces in (1, 3):
                    pairs = "all_to_all" if pieces == 1 else "all_gather"
                    options = Options(pieces=pieces, sms=None if pieces == 1 else 40, check=n == 9001, pairs=pairs)
                    what = f"{wire.label()} n {n} {dtype} pieces {pieces}"
                    out = torch.full((n,), -7.0, device=device)
                    with torch.cuda.stream(side) if side is not None else nullcontext():  # a stream of the caller's own
                        source = mine * 1
                        reduce_scatter(out, source, wire, NOISE, async_op=True, options=options).wait()
                        source.zero_()
                        found = out + 0
                    if side is not None:
                        side.synchronize()
                    if not torch.equal(found.cpu(), want):
                        faults.append(f"reduce_scatter {what}: {int((found.cpu() != want).sum())} differ")
                    x = mine.clone()
                    handle = all_reduce(x, wire, NOISE, options=options)
                    copies = [torch.empty_like(x) for _ in range(world)]
                    dist.all_gather(copies, x)
                    if not all(torch.equal(copies[0], c) for c in copies):
                        faults.append(f"all_reduce {what}: ranks differ")
                    exact = every.float().mean(0).to(device)
                    error = float((x.float() - exact).square().sum() / exact.square().sum())
                    if error > 0.02 or handle.bytes_sent != handle.bytes_formula:
                        faults.append(f"all_reduce {what}: NMSE {error}, bytes {handle.traffic}")
                    gathered = torch.empty(world * n, dtype=dtype, device=device)
                    all_gather(gathered, mine[:n].contiguous(), wire, NOISE, options=options)
                    parts = [Parts.of([torch.empty(n, dtype=dtype)], wire) for _ in range(world)]
                    for i in range(world):
                        sent = encode_parts(Parts.of([every[i, :n].contiguous()], wire), NOISE, i)
                        decode_parts(parts[i], sent[None], NOISE, [i])
                    if not torch.equal(gathered.cpu(), torch.cat([p.tensors[0] for p in parts])):
                        faults.append(f"all_gather {what}: differs")
                    rows = torch.empty(world, n, dtype=dtype, device=device)
                    all_to_all(rows, mine.view(world, n), wire, NOISE, options=options)
                    exact = every.view(world, world, n)[:, rank].to(device)
                    if float((rows - exact).float().square().mean()) > 0.02 or not torch.equal(rows[rank], exact[rank]):
                        faults.append(f"all_to_all {what}")
    if rank < 2:
        x = torch.arange(1000.0, device=device)
        if rank == 0:
            send(x, Wire(), NOISE, 1)
        else:
            out = torch.empty(1000, device=device)
            recv(out, Wire(), NOISE, 0)
            faults += [] if float((out - x).norm() / x.norm()) < 0.12 else ["recv"]
    uneven = [[torch.randn(5000 + 300 * i, device=device), torch.ones(7, device=device)] for i in range(world)]
    out = [torch.empty_like(t) for t in uneven[rank]]
    reduce_scatter_parts(out, uneven, Wire(), NOISE, op="mean")
    faults += [] if torch.allclose(out[1], torch.ones(7, device=device), atol=0.2) else ["parts"]
    tree = GroupTree.of_ranks(1)
    out = torch.empty(1024, device=device)
    x = every[rank, : world * 1024].float().to(device)
    tree.reduce_scatter(out, x, BF16_WIRE, Wire(), NOISE)
    exact = every[:, rank * 1024 : (rank + 1) * 1024].float().mean(0).to(device)
    faults += [] if float((out - exact).square().sum() / exact.square().sum()) < 0.012 else ["tree"]
    if world != 2:
        return faults
    try:  # one rank sends another format: of equal size, so only the header tells
        wire = Wire(rounding="nearest") if rank == 0 else Wire(rounding="stochastic")
        reduce_scatter(out, torch.ones(world * 1024, device=device), wire, NOISE, options=Options(check=True))
        faults.append("a foreign record was not found")
    except WireError as error:
        faults += [] if f"from rank {1 - rank}" in str(error) and "bucket 7" in str(error) else [str(error)]
    return faults


def main(rank: int, world: int, store: str) -> None:
    """One rank."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=world, device_id=device)
    faults = check_all(device, (4096 * 40, 9001), (Wire(), BF16_WIRE))
    print(f"rank {rank}:", "\n".join(faults) or "no difference", flush=True)
    dist.destroy_process_group()
    if faults:
        sys.exit(1)


def start(arguments: Sequence[str]) -> None:
    """Start the ranks."""
    world = int(arguments[0]) if arguments else torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, (world, f"{folder}/store"), world)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    start(sys.argv[1:])
