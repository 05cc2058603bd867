"""Seconds that one layer takes for one micro-batch, forward and backward, by cause."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot

from fp4dist.cluster.constants import Constants
from fp4dist.cluster.precision import OPERAND_BYTES, QUANTIZE_BYTES, Gemms, Policy
from fp4dist.cluster.shapes import MLP_KINDS, Block, Linear
from fp4dist.cluster.topology import Placement, Span
from fp4dist.spec.cluster import Gpu, Layout, Link, Precision

# W of board power for each peak bf16 TFLOP/s at which a family's rates are taken as they are: GB200, H100
_REFERENCE_POWER = {"blackwell": 1200 / 2500, "hopper": 700 / 989}
_TILE = 128 * 256  # outputs that one multiprocessor computes at a time
_SPLIT = 4096  # products of a sum from which on libraries cut it, to fill the multiprocessors
# Heads 64 wide reach three quarters of the FLOP/s of 128 (H100): their exponentials take the time of 64 columns more
_WIDE, _EXPONENTIALS = 128, 64
_ATTENTION_BACKWARD = 2.5  # times the forward FLOPs: five GEMMs for two
# What a large message reaches of a link: all-reduce on 72 GPUs 847 to 873 of 900 GB/s; rings 0.98 of the NICs
_INSIDE, _ACROSS = 0.96, 0.98
# Of NVLink, where a collective spans racks with a NIC for each GPU, and of each further hop of its rings: from sums
# of 0.5 to 4 GB over 1,440 GB200 of 20 racks (151 to 346 GB/s of bus rate, 435 by size alone).
_THROUGH, _HOP_US = 0.485, 1.5
_CALL_US = 12.0  # of a collective besides its steps: launch, and ranks meeting
QUANTIZE_TIME = (
    1.35  # of quantizing kernels over their bytes at an elementwise kernel's speed (H100: 1.1 to 2.4 untuned)
)
_MESSAGE = 2048.0  # bytes that a token's copy costs an all-to-all beside its own: headers, indices, short transfers
_EXPERT_KERNELS = 14  # of each expert on a rank: its GEMMs and quantizers, forward and backward
_EMULATED_KERNELS = 4  # of a GEMM: quantizers, amaxs and their scalars
_ACROSS_EXPOSED = 0.6  # of an all-to-all over NICs: jobs whose experts cross domains overlap it with computing
_OF_A_COPY = 0.9  # what elementwise kernels reach of a copy's bandwidth, where that was measured
_GB, _US, _TERA = 1e9, 1e-6, 1e12


class Seconds(dict[str, float]):
    """Cause -> seconds; what is not there is 0."""

    def __missing__(self, cause: str) -> float:
        return 0.0

    def add(self, other: Seconds) -> None:
        """Sum cause by cause."""
        for cause, seconds in other.items():
            self[cause] += seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Sustained rates of one GPU under the fitted constants."""

    gpu: Gpu
    inside: Link
    across: Link
    constants: Constants

    @property
    def power(self) -> float:
        """Factor on all tensor-core rates: more power for each peak FLOP sustains higher clocks."""
        reference = _REFERENCE_POWER.get(self.gpu.family)
        if reference is None:
            return 1.0
        return (self.gpu.power_w / self.gpu.peak.bf16 / reference) ** self.constants.power

    def flops(self, precision: Precision) -> float:
        """FLOP/s of a large GEMM."""
        kind = {"bf16": "bf16", "nvfp4": "fp4"}.get(precision, "fp8")
        measured = getattr(self.gpu.gemm, kind) if self.gpu.gemm is not None else 0.0
        share = measured or self.constants.gemm(precision) * self._peak(kind)
        return share * _TERA * self.power

    def _peak(self, kind: str) -> float:
        """Half of an FP4 GEMM's time goes with its peak, half with what feeds it, built for twice the FP8 peak."""
        peak = self.gpu.peak
        return 2 / (1 / peak.fp4 + 1 / (2 * peak.fp8)) if kind == "fp4" and peak.fp8 else getattr(peak, kind)

    def waves(self, rows: float, columns: float, depth: float) -> float:
        """Factor on a GEMM's time: on average half of the last wave of tiles is idle; deep sums are cut in several."""
        return 1 + 0.5 * self.gpu.units * _TILE / (rows * columns * max(1.0, depth / _SPLIT))

    def attention(self, width: int) -> float:
        """FLOP/s of attention kernels with heads of `width`: exponentials take as long for narrow heads as for wide."""
        share = (_WIDE + _EXPONENTIALS) / _WIDE * width / (width + _EXPONENTIALS)
        return share * self.constants.attention * self.gpu.peak.bf16 * _TERA * self.power

    @property
    def bandwidth(self) -> float:
        """Bytes/s of elementwise kernels."""
        copied = self.gpu.copy_gb_s
        return (_OF_A_COPY * copied if copied else self.constants.memory * self.gpu.bandwidth_gb_s) * _GB

    @property
    def gap(self) -> float:
        """Seconds between kernels; none on a CPU, where operations are long."""
        return self.constants.gap_us * _US if self.gpu.family != "cpu" else 0.0

    def gather(self, span: Span, size: float) -> float:
        """Seconds to all-gather (or reduce-scatter) `size` bytes, the whole of them, over a group of ranks.

        Each member of a domain carries its share over its own NIC; the two levels overlap, so the slower one counts.
        """
        if span.size == 1:
            return 0.0
        reach = _INSIDE if span.across == 1 else _THROUGH
        inside = size * (span.inside - 1) / span.inside / (reach * self.inside.gb_per_s * _GB)
        # a ring leaves each domain once through each of its NICs
        across = size * (span.size - 1) / span.size / span.inside / (_ACROSS * self.across.gb_per_s * _GB)
        across *= span.across > 1
        latency = (span.inside - 1) * self.inside.latency_us / 2 + (span.across - 1) * self.across.latency_us / 2
        ring = (span.inside - 1) * (span.across - 1) * _HOP_US  # NCCL's rings pass every rank of every domain
        return max(inside, across) + (latency + ring + _CALL_US) * _US

    def exchange(self, span: Span, items: float, width: float, copies: float) -> float:
        """Seconds of an all-to-all in which a rank sends `items` of `width` bytes, each to `copies` ranks at most.

        Across domains an item travels once for each remote domain that wants it, inside once for each rank.
        """
        if span.size == 1:
            return 0.0
        item = width + _MESSAGE
        inside = items * copies * item * (span.inside - 1) / span.inside / (_INSIDE * self.inside.gb_per_s * _GB)
        remote = span.across * (1 - (1 - 1 / span.across) ** copies) * (span.across - 1) / span.across
        across = _ACROSS_EXPOSED * items * item * remote / (_ACROSS * self.across.gb_per_s * _GB)
        latency = self.inside.latency_us + (self.across.latency_us if span.across > 1 else 0.0)
        return max(inside, across) * self.constants.expert + (latency + _CALL_US) * _US


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """Seconds of one micro-batch."""

    forward: Seconds
    backward: Seconds

    @property
    def total(self) -> float:
        """Both passes."""
        return sum(self.forward.values()) + sum(self.backward.values())


def layer_time(
    layer: tuple[Block, ...], number: int, machine: Machine, placement: Placement, policy: Policy, seq: int
) -> LayerTime:
    """One layer on one rank, recomputation included."""
    forward, backward = Seconds(), Seconds()
    again = 0.0
    for block in layer:
        f, b = _block_time(block, number, machine, placement, policy, seq)
        again += _again(block, f, placement.layout)
        forward.add(f)
        backward.add(b)
    if again:
        backward["recompute"] += again
    return LayerTime(forward=forward, backward=backward)


def _again(block: Block, forward: Seconds, layout: Layout) -> float:
    """What backward repeats of a block's forward pass; selective: norms and activation functions."""
    if layout.recompute == "full" or (layout.recompute == "mlp" and block.kind in MLP_KINDS):
        return layout.recomputed * sum(forward.values())
    return 0.6 * forward["elementwise"] + 0.4 * forward["gaps"] if layout.recompute == "selective" else 0.0


def _block_time(
    block: Block, number: int, machine: Machine, placement: Placement, policy: Policy, seq: int
) -> tuple[Seconds, Seconds]:
    layout = placement.layout
    tokens = layout.micro_batch * seq / layout.cp
    forward, backward = Seconds(), Seconds()
    fused = _fused(block, machine, policy, number)
    for linear in block.linears:
        gemms = policy.gemms(linear, number)
        _linear_time(linear, gemms, machine, placement, tokens, forward, backward, fused=fused and linear.is_expert)
    core = tokens * (block.core_flops * seq + block.scan_flops) / layout.tp / machine.attention(block.core_width)
    forward["attention"] += core
    backward["attention"] += core * _ATTENTION_BACKWARD
    scanned = block.scan_bytes / machine.constants.scan
    split = block.split_bytes - fused * block.fusible_bytes
    moved = tokens * (block.whole_bytes + split + scanned) / layout.tp / machine.bandwidth
    forward["elementwise"] += 0.4 * moved
    backward["elementwise"] += 0.6 * moved
    local = max((linear.copies for linear in block.linears if linear.is_expert), default=0) / layout.ep
    launched = (block.kernels + _EXPERT_KERNELS * (min(1.0, local) if fused else local)) * machine.gap
    forward["gaps"] += 0.4 * launched
    backward["gaps"] += 0.6 * launched
    _tensor_time(block, number, machine, placement, policy, tokens, forward, backward)
    _context_time(block, machine, placement, tokens, core, forward, backward)
    _expert_time(block, machine, placement, tokens, forward, backward)
    return forward, backward


def _fused(block: Block, machine: Machine, policy: Policy, number: int) -> bool:
    """Whether experts run as grouped GEMMs that hold the gated activation and its quantization.

    Transformer Engine has that for MXFP8 on Blackwell alone (its pull requests 2769 and 3315, since 2.14).
    """
    gemms = [policy.gemms(linear, number) for linear in block.linears if linear.is_expert]
    narrow = all(g.fprop == g.dgrad == g.wgrad == "mxfp8" for g in gemms)
    return bool(gemms) and narrow and block.fusible_bytes > 0 and machine.gpu.family == "blackwell"


def _linear_time(
    linear: Linear,
    gemms: Gemms,
    machine: Machine,
    placement: Placement,
    tokens: float,
    forward: Seconds,
    backward: Seconds,
    *,
    fused: bool = False,
) -> None:
    """Three GEMMs at their tensor cores' rate, what they move beside that, and the quantizers of x and dY.

    fused   an expert's: the activation's output and gradient leave the GEMM before them as codes
    """
    k, n, rows, copies = _local(linear, placement, tokens)
    product, output, weight = 2.0 * rows * k * n, rows * n, k * n * copies
    for name, target in (("fprop", forward), ("dgrad", backward), ("wgrad", backward)):
        precision: Precision = getattr(gemms, name)
        b = OPERAND_BYTES[precision]
        moved = {
            "fprop": b * (rows * k + weight) + 2 * output,
            "dgrad": b * (output + weight) + 2 * rows * k,
            "wgrad": b * (output + rows * k) + 8 * weight,
        }[name]
        height, width, depth = {"fprop": (rows, n, k), "dgrad": (rows, k, n), "wgrad": (n * copies, k, rows / copies)}[
            name
        ]
        waves = machine.waves(height, width, depth)
        # multiplying and moving overlap, not perfectly: between the larger of the two and their sum
        target["gemm"] += hypot(product / machine.flops(precision) * waves, moved / machine.bandwidth)
        target["gaps"] += machine.gap * (1 + (precision != "bf16") + _EMULATED_KERNELS * any(gemms.emulated))
    x, dy = gemms.quantized
    scale = QUANTIZE_TIME / machine.bandwidth
    if not (fused and linear.cut == "expert_row"):
        forward["quantize"] += rows * k * (gemms.emulated[0] or QUANTIZE_BYTES[x] * scale)
    if not (fused and linear.cut == "expert_column"):
        backward["quantize"] += output * (gemms.emulated[1] or QUANTIZE_BYTES[dy] * scale)


def _local(linear: Linear, placement: Placement, tokens: float) -> tuple[float, float, float, float]:
    """(inputs, outputs, rows over all copies, copies) of one rank."""
    layout = placement.layout
    if linear.is_expert:
        rows = tokens / layout.tp * linear.copies * linear.share * layout.etp
        k = linear.inputs / (layout.etp if linear.cut == "expert_row" else 1)
        n = linear.outputs / (layout.etp if linear.cut == "expert_column" else 1)
        return k, n, rows, max(1.0, linear.copies / layout.ep)
    k = linear.inputs / (layout.tp if linear.cut == "row" else 1)
    n = linear.outputs / (layout.tp if linear.cut == "column" else 1)
    # a matrix that is not cut works on this rank's part of the sequence
    return k, n, tokens / (layout.tp if linear.cut == "none" else 1), 1.0


def _tensor_time(
    block: Block,
    number: int,
    machine: Machine,
    placement: Placement,
    policy: Policy,
    tokens: float,
    forward: Seconds,
    backward: Seconds,
) -> None:
    """Sequence-parallel gathers carry codes, sums travel in bf16; wgrad gathers x again."""
    layout = placement.layout
    span, share = placement.span("tp"), machine.constants.tensor
    if span.size > 1:
        for linear in block.linears:
            if linear.cut not in ("column", "row"):
                continue
            width = OPERAND_BYTES[policy.gemms(linear, number).quantized[0 if linear.cut == "column" else 1]]
            gathered = machine.gather(
                span, tokens * width * (linear.inputs if linear.cut == "column" else linear.outputs)
            )
            summed = machine.gather(span, tokens * 2.0 * (linear.inputs if linear.cut == "column" else linear.outputs))
            if linear.cut == "column":  # fprop gathers x; dgrad sums dX, wgrad gathers x again
                forward["tp"] += share * gathered
                backward["tp"] += share * (summed + gathered)
            else:  # fprop sums Y; backward gathers dY
                forward["tp"] += share * summed
                backward["tp"] += share * gathered
    if layout.etp > 1 and block.routed:
        part = machine.gather(placement.span("etp"), tokens / layout.tp * layout.etp * block.routed * 2.0)
        forward["tp"] += 2 * share * part
        backward["tp"] += 2 * share * part


def _context_time(
    block: Block,
    machine: Machine,
    placement: Placement,
    tokens: float,
    core: float,
    forward: Seconds,
    backward: Seconds,
) -> None:
    """Keys and values pass all context-parallel ranks, their gradients on the way back too; attention hides a part."""
    span = placement.span("cp")
    if span.size == 1 or not block.key_value:
        return
    layout = placement.layout
    whole = machine.gather(span, tokens * layout.cp * block.key_value * 2.0 / layout.tp)
    share = machine.constants.tensor
    steps = (layout.cp - 1) * machine.gap * 4  # attention in pieces
    forward["cp"] += max(share * whole, whole - core) + steps
    backward["cp"] += max(share * 2 * whole, 2 * whole - core * _ATTENTION_BACKWARD) + steps


def _expert_time(
    block: Block, machine: Machine, placement: Placement, tokens: float, forward: Seconds, backward: Seconds
) -> None:
    """Dispatch and combine in bf16, both ways."""
    span = placement.span("ep")
    if span.size == 1 or not block.routed:
        return
    layout = placement.layout
    router = next(linear for linear in block.linears if linear.is_expert)
    copies = max(1, round(router.copies * router.share))
    once = machine.exchange(span, tokens / layout.tp, block.routed / copies * 2.0, copies)
    forward["ep"] += 2 * once
    backward["ep"] += 2 * once
