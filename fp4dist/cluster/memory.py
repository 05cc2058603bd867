"""How much memory a layout needs on its fullest GPU, and what would make it fit.

The upper estimate counts gradients in fp32 (Megatron's main_grad), quantized copies of weights beside the bf16 ones,
routed tokens with an imbalance, and a reserve for the allocator, NCCL and workspaces. The lower one (`lean`) is what
well-kept jobs are seen to run in: gradients in bf16, FP8 weights without a bf16 copy, balanced experts, a small
reserve. What fits the upper one fits; what does not fit the lower one does not; between them a layout is called tight.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from fp4dist.cluster.precision import Kind, Policy, kinds
from fp4dist.cluster.shapes import MLP_KINDS, Block, Shape
from fp4dist.cluster.topology import Placement
from fp4dist.spec.cluster import Layout, Precision, Topology

LEAN_RESERVE_GB, LEAN_RESERVE_SHARE = 4.0, 0.03
RESERVE_GB = 6.0  # context, NCCL channels and buffers of all groups, cuBLAS and attention workspaces
RESERVE_SHARE = 0.04  # of the device: what the caching allocator loses to fragments
IMBALANCE = 1.25  # tokens of the fullest rank of an all-to-all over their mean
HOST_SHARE = 0.6  # of a node's memory for activations; the rest is for data, checkpoints, the system
RECOMPUTE_STEPS = (0.125, 0.25, 0.5, 0.75, 1.0)
OFFLOAD_STEPS = (0.25, 0.5, 0.75, 1.0)
_FULL_WINDOW = 1  # layers that full recomputation holds in detail
_COLUMNS: dict[Precision, float] = {
    "bf16": 0.0,
    "fp8": 1.0,
    "mxfp8": 2 * 33 / 32,
    "nvfp4": 2 * 0.5625,
}  # kept codes of w
_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """GB (1e9 bytes) on the fullest GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float  # gathered weights of FSDP, all-to-all buffers
    reserve: float
    capacity: float

    @property
    def total(self) -> float:
        """All of it, the reserve included."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "reserve")
        return sum(getattr(self, name) for name in names)

    @property
    def fits(self) -> bool:
        """Whether it stays below what the device has."""
        return self.total <= self.capacity

    @property
    def missing(self) -> float:
        """GB over the capacity; negative: room left."""
        return self.total - self.capacity


@lru_cache(maxsize=4096)
def memory(shape: Shape, placement: Placement, policy: Policy, *, gbs: int, seq: int, lean: bool = False) -> Memory:
    """The estimate for `gbs` samples a step of `seq` tokens: the upper one, or the lower one."""
    layout, topology = placement.layout, placement.topology
    dense, experts = stage_parameters(shape, layout)
    data = placement.span("data").size
    edp = placement.span("edp").size
    codes, plain = _COLUMNS[policy.wire], 2.0
    if lean and policy.wire == "fp8":
        plain = 0.0
    imbalance = 1.0 if lean else IMBALANCE
    shard, eshard = (layout.fsdp, min(layout.fsdp, edp)) if layout.fsdp > 1 else (1, 1)
    held = dense / shard + experts / eshard
    stage = _stage_activations(shape, placement, policy, gbs, seq, imbalance)
    tokens = layout.micro_batch * seq / layout.cp
    logits = tokens * shape.head.outputs / layout.tp * (2 + 4 if lean else 2 + 4 + 4)  # a fused loss, or fp32 copies
    return Memory(
        weights=(plain * held + codes * (dense + experts if layout.fsdp == 1 else held)) / _GB,
        gradients=(2 if lean else 4) * held / _GB,
        optimizer=12 * (dense / data + experts / edp) / _GB,
        activations=stage / _GB,
        logits=logits / _GB,
        buffers=_buffers(shape, layout, tokens, imbalance) / _GB,
        reserve=_reserve(topology, lean),
        capacity=topology.gpu.memory_gb,
    )


def _reserve(topology: Topology, lean: bool) -> float:
    if topology.gpu.family == "cpu":
        return 0.5
    fixed, share = (LEAN_RESERVE_GB, LEAN_RESERVE_SHARE) if lean else (RESERVE_GB, RESERVE_SHARE)
    return fixed + share * topology.gpu.memory_gb


def stage_parameters(shape: Shape, layout: Layout) -> tuple[float, float]:
    """(others, experts) of the fullest stage on one rank: its share of the layers and one of the two tables."""
    dense = experts = 0.0
    for block, count in shape.counted:
        d, e = _cut(block, layout)
        dense, experts = dense + count * d, experts + count * e
    table = shape.model.vocab_size * shape.model.hidden_size / layout.tp
    tables = table * (1 if layout.pp > 1 or shape.model.tie_embeddings else 2)
    deepest = ceil(len(shape.layers) / (layout.pp * layout.vpp)) * layout.vpp / len(shape.layers)
    return dense * deepest + tables, experts * deepest


def _cut(block: Block, layout: Layout) -> tuple[float, float]:
    dense, experts = float(block.parameters), 0.0
    for linear in block.linears:
        if linear.is_expert:
            experts += linear.parameters / (layout.ep * layout.etp)
        else:
            dense += linear.parameters / (1 if linear.cut == "none" else layout.tp)
    return dense, experts


def _buffers(shape: Shape, layout: Layout, tokens: float, imbalance: float) -> float:
    """Two layers' gathered weights and one's gradients under FSDP; both ends of an all-to-all."""
    largest = 2 * max(sum(_cut(block, layout)) for block, _ in shape.counted)
    tables = shape.model.vocab_size * shape.model.hidden_size / layout.tp
    gathered = (2 * largest + tables) * (2 + 4) if layout.fsdp > 1 else 0.0
    routed = max(block.routed for block, _ in shape.counted)
    return gathered + (3 * imbalance * tokens / layout.tp * routed * 2 if layout.ep > 1 else 0.0)


def _stage_activations(
    shape: Shape, placement: Placement, policy: Policy, gbs: int, seq: int, imbalance: float
) -> float:
    """Bytes that the first stage keeps: its chunks' activations of all micro-batches in flight."""
    layout = placement.layout
    groups = kinds(shape, policy)
    tokens = layout.micro_batch * seq / layout.cp
    depth = ceil(len(shape.layers) / (layout.pp * layout.vpp))
    chunk = depth * layers_bytes(groups, policy, layout, imbalance) / len(shape.layers)
    micro = max(1, gbs // (layout.micro_batch * layout.dp(placement.gpus)))
    held = min(in_flight_chunks(layout), micro * layout.vpp)
    plain = dataclasses.replace(layout, recompute="none", offload=0.0)
    detail = _FULL_WINDOW * max(activation_bytes(kind.layer, kind.number, policy, plain, imbalance) for kind in groups)
    kept = held * chunk
    if layout.recompute in ("full", "mlp"):
        kept += detail
    elif layout.offload:
        kept = kept * (1 - layout.offload) + 2 * detail
    return tokens * kept


def layers_bytes(groups: tuple[Kind, ...], policy: Policy, layout: Layout, imbalance: float = IMBALANCE) -> float:
    """Bytes that all layers keep of a token of this rank, were none offloaded."""
    return sum(kind.count * activation_bytes(kind.layer, kind.number, policy, layout, imbalance) for kind in groups)


def in_flight_chunks(layout: Layout) -> int:
    """Forward passes of chunks that the first stage has done when its first backward begins (1F1B, interleaved)."""
    if layout.pp == 1:
        return 1
    if layout.vpp == 1:
        return layout.pp
    return 2 * (layout.pp - 1) + (layout.vpp - 1) * layout.pp + 1


def activation_bytes(
    layer: tuple[Block, ...], number: int, policy: Policy, layout: Layout, imbalance: float = IMBALANCE
) -> float:
    """Bytes that one layer keeps of a token of this rank (before the sequence is cut by tp: that is counted here)."""
    if layout.recompute == "full":
        rest = dataclasses.replace(layout, recompute="none")
        kept = activation_bytes(layer, number, policy, rest, imbalance) if layout.recomputed < 1 else 0.0
        return layout.recomputed * 2.0 * policy_width(layer) / layout.tp + (1 - layout.recomputed) * kept
    total = 0.0
    for block in layer:
        if layout.recompute == "mlp" and block.kind in MLP_KINDS:
            total += block.saved_whole / layout.tp
            continue
        uneven = imbalance if block.routed and layout.ep > 1 else 1.0
        saved = block.saved_split - (block.cheap if layout.recompute == "selective" else 0.0)
        whole = block.saved_whole
        if layout.recompute == "selective":
            whole = whole / 2  # norms and activation functions are made again from what they read
        total += whole / layout.tp + uneven * saved / layout.tp
        total += sum(
            _input_bytes(block, index, number, policy, layout, imbalance) for index in range(len(block.linears))
        )
    return total


def _input_bytes(block: Block, index: int, number: int, policy: Policy, layout: Layout, imbalance: float) -> float:
    """Of one linear's input. Selective recomputation makes the inputs of row-cut ones (activation functions) again."""
    linear = block.linears[index]
    if linear.role == "router":
        return 0.0
    row = linear.cut in ("row", "expert_row")
    if layout.recompute == "selective" and row and block.kind != "attention":
        return 0.0
    uneven = imbalance if linear.is_expert and layout.ep > 1 else 1.0
    width = linear.inputs * linear.copies * linear.share
    return uneven * policy.gemms(linear, number).saved_bytes * width / layout.tp


def policy_width(layer: tuple[Block, ...]) -> int:
    """The hidden width of a layer: what its first linear reads."""
    return layer[0].linears[0].inputs


@lru_cache(maxsize=4096)
def fitting(
    shape: Shape, placement: Placement, policy: Policy, *, gbs: int, seq: int, lean: bool = False
) -> tuple[Layout, Memory] | None:
    """The layout with the least recomputation or offloading with which it fits, cheapest first; None: nothing helps."""
    routed = any(block.routed for block, _ in shape.counted)
    for layout in _remedies(placement.layout, placement.topology, routed, parts=lean):
        if layout.offload and not _host_holds(shape, placement, layout, policy, seq):
            continue
        tried = memory(shape, dataclasses.replace(placement, layout=layout), policy, gbs=gbs, seq=seq, lean=lean)
        if tried.fits:
            return layout, tried
    return None


def _host_holds(shape: Shape, placement: Placement, layout: Layout, policy: Policy, seq: int) -> bool:
    """Whether the node's memory takes what its GPUs put there."""
    host = placement.topology.host
    tokens = layout.micro_batch * seq / layout.cp
    moved = layout.offload * tokens * layers_bytes(kinds(shape, policy), policy, layout)
    return moved * host.gpus <= HOST_SHARE * host.memory_gb * _GB


def _remedies(layout: Layout, topology: Topology, routed: bool, *, parts: bool) -> list[Layout]:
    """Recomputing what is cheap, then host memory where a fast link leads there, then everything.

    parts   single operations, and everything of a part of the layers, which Megatron can; else what our engines can:
            whole MLPs, whole layers
    """
    first = ("none", "selective") if parts else ("none", "mlp")
    found = [dataclasses.replace(layout, recompute=r, offload=0.0) for r in first]
    # pipelines keep many micro-batches, and experts' activations change their size: nobody offloads those
    if topology.host.c2c_gb_s and layout.pp == 1 and not routed:
        found += [dataclasses.replace(layout, recompute="selective", offload=o) for o in OFFLOAD_STEPS]
    shares = RECOMPUTE_STEPS if parts else RECOMPUTE_STEPS[-1:]
    return [*found, *(dataclasses.replace(layout, recompute="full", offload=0.0, recomputed=s) for s in shares)]


def advice(shape: Shape, placement: Placement, policy: Policy, *, gbs: int, seq: int) -> str:
    """What would make a layout fit that does not: the smallest change of one dimension."""
    layout = dataclasses.replace(placement.layout, recompute="full")
    options = [
        ("pp", dataclasses.replace(layout, pp=layout.pp * 2)),
        ("tp", dataclasses.replace(layout, tp=layout.tp * 2)),
        ("cp", dataclasses.replace(layout, cp=layout.cp * 2)),
        ("micro_batch", dataclasses.replace(layout, micro_batch=max(1, layout.micro_batch // 2))),
        ("fsdp", dataclasses.replace(layout, fsdp=max(2, layout.fsdp * 2))),
    ]
    if any(block.routed for block, _ in shape.counted):
        options.append(("ep", dataclasses.replace(layout, ep=layout.ep * 2)))
    for key, option in options:
        if placement.gpus % option.copy or placement.gpus % (option.ep * option.etp * option.pp):
            continue
        room = (placement.gpus // option.copy) * option.cp
        if option == layout or (option.fsdp > 1 and room % option.fsdp) or len(shape.layers) < option.pp:
            continue
        tried = memory(shape, dataclasses.replace(placement, layout=option), policy, gbs=gbs, seq=seq)
        if tried.fits:
            return f"{key} = {getattr(option, key)} with full recomputation would fit ({tried.total:.0f} GB)"
    return "no single change of tp, pp, cp, ep, fsdp or micro-batch fits"
