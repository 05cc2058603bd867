"""What tools/bench_comm.py times: NCCL's collectives, Megatron's and DeepSpeed's ways, and the coded ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from qgz import WIDTH as QGZ_WIDTH
from torch import Tensor

from fp4dist.comm.codec import Noise
from fp4dist.comm.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from fp4dist.comm.exchange import Options
from fp4dist.comm.hierarchy import GroupTree
from fp4dist.comm.parts import Parts, decode_parts, encode_parts
from fp4dist.spec.wire import BF16_WIRE, Wire

WIRES = {
    "nvfp4 nearest": Wire(rounding="nearest"),
    "nvfp4 stochastic": Wire(rounding="stochastic"),
    "nvfp4 rht128 eden": Wire(),
    "fp8 nearest": Wire(kind="fp8", rounding="nearest"),
    "int4 nearest, long groups": Wire(kind="int4", rounding="nearest", chunk=8192),
}


@dataclass
class Method:
    """What is timed: `run` starts it and returns a handle or None, `result` is what it gave, `exact` what it should."""

    collective: str
    name: str
    run: Callable[[bool], Any]
    result: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    parts: Callable[[], dict[str, Callable[[], Any]]] | None = None
    prepare: Callable[[], Any] | None = None  # of one that works in place: its input anew


class Work:
    """A torch collective with `wait`."""

    def __init__(self, work: Any, then: Callable[[], Any] | None = None) -> None:
        self.work, self.then = work, then

    def wait(self) -> None:
        """Wait, then do what is left."""
        self.work.wait()
        if self.then:
            self.then()


def methods(
    n: int, device: torch.device, variants: list[Options], trees: dict[int, GroupTree], qgz: Any = None
) -> Iterator[Method]:
    """All of them for a payload of `n` bf16 elements on each rank; those that go through the codec in each variant.

    trees   by ranks of the inner level;  qgz   what tools/qgz.py has started, or None
    """
    options = variants[0]
    world, rank = dist.get_world_size(), dist.get_rank()
    n = n // (world * 128) * world * 128
    generator = torch.Generator(device).manual_seed(7)
    shared = torch.randn(n, device=device, generator=generator) if n <= 1 << 28 else None
    own = torch.Generator(device).manual_seed(100 + rank)
    x = torch.randn(n, device=device, generator=own, dtype=torch.bfloat16)
    if shared is not None:  # gradients of one model: correlated, and of very different sizes in different layers
        x = ((0.83 * x + 0.55 * shared) * torch.exp2(4 * torch.sin(torch.arange(n, device=device) / 1e5))).bfloat16()
        del shared
    shard = torch.empty(n // world, dtype=torch.bfloat16, device=device)
    noise = Noise(seed=1, step=2, bucket=3)

    def exact_shard() -> Tensor:
        out = torch.empty(n // world, device=device)
        dist.reduce_scatter_tensor(out, x.float())
        return out / world

    def exact_all() -> Tensor:
        total = x.float()
        dist.all_reduce(total)
        return total / world

    if device.type != "cuda":
        exact_shard = lambda: exact_all().view(world, -1)[rank]  # noqa: E731

    x32 = x.float()
    out32 = torch.empty(n // world, device=device)
    if device.type == "cuda":
        yield Method("reduce-scatter", "NCCL fp32", lambda a: _op(dist.reduce_scatter_tensor, a, out32, x32),
                     lambda: out32 / world, exact_shard)  # fmt: skip
        yield Method("reduce-scatter", "NCCL bf16", lambda a: _op(dist.reduce_scatter_tensor, a, shard, x),
                     lambda: shard.float() / world, exact_shard)  # fmt: skip
    received = torch.empty_like(x)
    yield Method(
        "reduce-scatter", "bf16 all-to-all, fp32 sum",
        lambda a: _op(dist.all_to_all_single, a, received, x,
                      then=lambda: shard.copy_(received.view(world, -1).sum(dim=0, dtype=torch.float32))),
        lambda: shard.float() / world, exact_shard,
    )  # fmt: skip
    for (name, wire), options in product(WIRES.items(), variants):
        yield Method(
            "reduce-scatter", name + named(options, variants),
            lambda a, wire=wire, options=options: reduce_scatter(shard, x, wire, noise, async_op=a, options=options),
            shard.float, exact_shard,
            lambda wire=wire: _breakdown(shard, x, wire, noise, world, rank),
        )  # fmt: skip
    for (inside, tree), (name, wire) in product(trees.items(), WIRES.items()):
        yield Method(
            "reduce-scatter", f"{name}, {inside} x {world // inside}",
            lambda a, t=tree, w=wire: t.reduce_scatter(shard, x, BF16_WIRE, w, noise, async_op=a, options=options),
            shard.float, exact_shard,
        )  # fmt: skip
    for inside, tree in trees.items():
        yield Method(
            "reduce-scatter", f"nvfp4 rht128 eden twice, {inside} x {world // inside}",
            lambda a, t=tree: t.reduce_scatter(shard, x, Wire(), Wire(), noise, async_op=a, options=options),
            shard.float, exact_shard,
        )  # fmt: skip
    if qgz is not None:
        half, found = x.half().view(-1, QGZ_WIDTH), [shard]

        def quantized(_: bool) -> None:
            found[0] = qgz(half)

        yield Method("reduce-scatter", "DeepSpeed qgZ fp16", quantized, lambda: found[0].float(), exact_shard)
    y, y32 = x.clone(), x32.clone()
    if device.type == "cuda":
        yield Method(
            "all-reduce",
            "NCCL fp32",
            lambda a: _op(dist.all_reduce, a, y32),
            lambda: y32 / world,
            exact_all,
            prepare=lambda: y32.copy_(x),
        )
    yield Method("all-reduce", "NCCL bf16" if device.type == "cuda" else "gloo bf16",
                 lambda a: _op(dist.all_reduce, a, y), lambda: y.float() / world, exact_all,
                 prepare=lambda: y.copy_(x))  # fmt: skip
    for name, options in product(("nvfp4 nearest", "nvfp4 rht128 eden"), variants):
        yield Method(
            "all-reduce", name + named(options, variants),
            lambda a, wire=WIRES[name], options=options: all_reduce(y, wire, noise, async_op=a, options=options),
            y.float, exact_all, prepare=lambda: y.copy_(x),
        )  # fmt: skip
    for (inside, tree), name in product(trees.items(), ("nvfp4 nearest", "nvfp4 rht128 eden")):
        yield Method(
            "all-reduce", f"{name}, {inside} x {world // inside}",
            lambda a, t=tree, w=WIRES[name]: t.all_reduce(y, BF16_WIRE, w, noise, async_op=a, options=options),
            y.float, exact_all, prepare=lambda: y.copy_(x),
        )  # fmt: skip
    gathered, mine = torch.empty_like(x), x.view(world, -1)[rank].contiguous()

    def exact_gather() -> Tensor:
        dist.all_gather_into_tensor(gathered, mine)
        return gathered.float()

    yield Method("all-gather", "bf16", lambda a: _op(dist.all_gather_into_tensor, a, gathered, mine),
                 gathered.float, exact_gather)  # fmt: skip
    yield Method("all-gather", "nvfp4 nearest",
                 lambda a: all_gather(gathered, mine, WIRES["nvfp4 nearest"], noise, async_op=a, options=options),
                 gathered.float, exact_gather)  # fmt: skip

    def exact_swap() -> Tensor:
        dist.all_to_all_single(gathered, x)
        return gathered.float()

    yield Method("all-to-all", "bf16", lambda a: _op(dist.all_to_all_single, a, gathered, x),
                 gathered.float, exact_swap)  # fmt: skip
    rows, rows_out = x.view(-1, 128), gathered.view(-1, 128)
    yield Method("all-to-all", "nvfp4 nearest",
                 lambda a: all_to_all(rows_out, rows, WIRES["nvfp4 nearest"], noise, async_op=a, options=options),
                 gathered.float, exact_swap)  # fmt: skip


def named(options: Options, variants: list[Options]) -> str:
    """What tells a variant apart."""
    words = [f"{options.pieces} pieces"] if len({v.pieces for v in variants}) > 1 else []
    words += [f"{options.sms or 'all'} SMs"] if len({v.sms for v in variants}) > 1 else []
    words += ["urgent"] if options.urgent else []
    words += ["gathered"] if options.pairs == "all_gather" else []
    return " " + " ".join(words) if words else ""


def _op(collective: Callable[..., Any], async_op: bool, *tensors: Tensor, then: Callable[[], Any] | None = None) -> Any:
    work = Work(collective(*tensors, async_op=True), then)
    if not async_op:
        work.wait()
    return work


def _breakdown(
    shard: Tensor, x: Tensor, wire: Wire, noise: Noise, world: int, rank: int
) -> dict[str, Callable[[], Any]]:  # fmt: skip
    """Encoding all that leaves, its transfer, and decoding all that comes, each alone."""
    slices = x.view(world, -1)
    leaving = Parts.of([slices[i] for i in range(world) if i != rank], wire)
    message = encode_parts(leaving, noise, rank)
    received = torch.empty_like(message)
    sizes = [0 if i == rank else message.numel() // (world - 1) for i in range(world)]
    out, own = Parts.of([shard], wire), Parts.of([slices[rank]], wire)
    others = [i for i in range(world) if i != rank]
    received.copy_(message)
    return {
        "encode": lambda: encode_parts(leaving, noise, rank, out=message),
        "wire": lambda: dist.all_to_all_single(received, message, sizes, sizes),
        "decode": lambda: decode_parts(out, received.view(world - 1, -1), noise, others, own, 1 / world),
    }
