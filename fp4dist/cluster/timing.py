"""Seconds of a training step: layers, pipeline, what communication is not hidden, optimizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import floor, log2

from fp4dist.cluster.constants import Constants, fitted
from fp4dist.cluster.layer_time import QUANTIZE_TIME, LayerTime, Machine, Seconds, layer_time
from fp4dist.cluster.memory import Memory, fitting, layers_bytes, memory, stage_parameters
from fp4dist.cluster.precision import QUANTIZE_BYTES, Policy, kinds, policy
from fp4dist.cluster.shapes import Shape, shape_of
from fp4dist.cluster.topology import Placement, Span, place
from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Layout, Link, Order, Precision, Recompute, Topology
from fp4dist.spec.recipe import Recipe
from fp4dist.spec.run import ModelConfig

_OPTIMIZER_BYTES = 30.0  # of a parameter: gradient, master and two moments read, three written, the bf16 weight written
_LOSS_BYTES = 10.0  # of a logit: bf16 written, read for the maximum and the sum, gradient written and read twice
_STEP_SECONDS = 2e-3  # the loop's own work; and again half of it for each doubling of the ranks that must meet
_HIDDEN_HOPS = 0.75  # of pipeline messages outside the bubble
_END_KERNELS = 40
_CODE_WIRE = 0.5625 + 16 / 2**20  # bytes of an element that travels as codes
_ORDERS: tuple[Order, ...] = ("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """What a pipeline simulation needs. Seconds of one rank; bytes of one message.

    chunk_forward_s, chunk_backward_s        one model chunk of a stage, one micro-batch
    last_extra_forward_s, last_extra_backward_s   the last chunk's head and loss
    reduce_s, gather_s                       gradients and parameters over data-parallel ranks, in bf16, nothing hidden
    reduce_fp4_s, gather_fp4_s               the same as NVFP4 codes
    reduce_saved_s                           of the step, by coded gradients; 0 where weights are sharded as well
    """

    micro_batches: int
    chunk_forward_s: float
    chunk_backward_s: float
    last_extra_forward_s: float
    last_extra_backward_s: float
    p2p_bytes: float
    p2p_s: float
    p2p_link: str
    reduce_s: float
    gather_s: float
    reduce_fp4_s: float
    gather_fp4_s: float
    reduce_saved_s: float
    data_link: str
    optimizer_s: float
    host_s: float
    checkpoint_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One layout: `breakdown` holds seconds of a step by cause and sums to `step_time_s`."""

    layout: Layout
    placement: Placement
    step_time_s: float
    tflops_per_gpu: float
    tokens_per_s_per_gpu: float
    memory: Memory  # the upper estimate
    lean: Memory  # the lower one
    breakdown: dict[str, float]
    parts: StepParts
    error: float  # of the model, 90 % quantile on rows left out


def predict(
    model: ModelConfig,
    topology: Topology,
    gpus: int,
    layout: Layout,
    *,
    precision: Precision | None = None,
    recipe: Recipe | None = None,
    gbs: int,
    seq: int,
    order: Order | None = None,
    recompute: Recompute | None = None,
    safe: bool = False,
    constants: Constants | None = None,
) -> Prediction:
    """Step time and memory of one layout.

    order       of the ranks; None: the faster of the two
    recompute   None: the cheapest of recomputation and offloading with which the layout fits
    safe        fits by the upper estimate of memory; else by the lower one, as well-kept jobs are run
    Raises ConfigError where the layout does not divide the job, the batch or the model.
    """
    shape = shape_of(model)
    rules = policy(precision, recipe, len(shape.layers), topology.gpu)
    calibration = fitted()
    best: Prediction | None = None
    for candidate in (order,) if order else _orders(layout):
        placement = place(topology, gpus, dataclasses.replace(layout, order=candidate))
        check_divisions(model, placement.layout, gpus, gbs, seq)
        chosen = _with_recompute(shape, placement, rules, gbs, seq, recompute, safe)
        found = _predict(shape, chosen, rules, gbs, seq, constants or calibration.constants, calibration.error)
        if best is None or found.step_time_s < best.step_time_s:
            best = found
    assert best is not None
    return best


def _orders(layout: Layout) -> tuple[Order, ...]:
    """Both where both are possible."""
    free = layout.pp == 1 or layout.ep * layout.etp in (1, layout.tp * layout.cp)
    return _ORDERS if layout.pp > 1 and free else _ORDERS[:1]


def _with_recompute(
    shape: Shape, placement: Placement, rules: Policy, gbs: int, seq: int, recompute: Recompute | None, safe: bool
) -> Placement:
    if recompute is not None:
        return dataclasses.replace(placement, layout=dataclasses.replace(placement.layout, recompute=recompute))
    found = fitting(shape, placement, rules, gbs=gbs, seq=seq, lean=not safe)
    layout = found[0] if found else dataclasses.replace(placement.layout, recompute="full", offload=0.0)
    return dataclasses.replace(placement, layout=layout)


def check_divisions(model: ModelConfig, layout: Layout, gpus: int, gbs: int, seq: int) -> None:
    """Raises ConfigError, naming the first rule that is broken."""
    dp = layout.dp(gpus)
    rules = [
        (gbs % (dp * layout.micro_batch) == 0, f"gbs = {gbs} is not a multiple of dp * micro-batch = {dp} * "
         f"{layout.micro_batch}"),
        (layout.cp == 1 or seq % (2 * layout.cp) == 0, f"seq = {seq} is not a multiple of 2 * cp = {2 * layout.cp}"),
        (model.num_attention_heads % layout.tp == 0, f"{model.num_attention_heads} heads do not divide by tp ="
         f" {layout.tp}"),
        (layout.pp * layout.vpp <= model.num_layers + 2, f"pp * vpp = {layout.pp * layout.vpp} chunks are more than"
         f" {model.num_layers} layers and two ends"),
    ]  # fmt: skip
    if layout.ep > 1 or layout.etp > 1:
        moe = model.moe
        rules.append((moe is not None, f"ep = {layout.ep}, etp = {layout.etp} need a model with experts"))
        experts = moe.num_experts if moe else layout.ep
        rules.append((experts % layout.ep == 0, f"{experts} experts do not divide by ep = {layout.ep}"))
    for holds, text in rules:
        if not holds:
            raise ConfigError(f"layout {layout.label()}: {text}")


def _predict(
    shape: Shape, placement: Placement, rules: Policy, gbs: int, seq: int, constants: Constants, error: float
) -> Prediction:
    topology, layout = placement.topology, placement.layout
    machine = Machine(gpu=topology.gpu, inside=topology.inside, across=topology.across, constants=constants)
    scene = _Scene(shape, placement, rules, gbs, seq, machine)
    breakdown = scene.breakdown()
    step = sum(breakdown.values())
    tokens = gbs * seq / placement.gpus
    return Prediction(
        layout=layout,
        placement=placement,
        step_time_s=step,
        tflops_per_gpu=tokens * shape.flops_per_token(seq) / step / 1e12,
        tokens_per_s_per_gpu=tokens / step,
        memory=memory(shape, placement, rules, gbs=gbs, seq=seq),
        lean=memory(shape, placement, rules, gbs=gbs, seq=seq, lean=True),
        breakdown=dict(breakdown),
        parts=scene.parts(),
        error=error,
    )


class _Scene:
    """One layout's costs, each computed once."""

    def __init__(self, shape: Shape, placement: Placement, rules: Policy, gbs: int, seq: int, machine: Machine) -> None:
        self.shape, self.placement, self.rules = shape, placement, rules
        self.seq, self.machine, self.layout = seq, machine, placement.layout
        self.micro_batches = gbs // (placement.layout.dp(placement.gpus) * placement.layout.micro_batch)
        self.tokens = placement.layout.micro_batch * seq / placement.layout.cp
        self.layers = self._layers()
        self.head = self._head()
        self.dense, self.experts = stage_parameters(shape, placement.layout)

    def _layers(self) -> list[tuple[LayerTime, int]]:
        """Each kind of layer, and how many there are."""
        return [
            (layer_time(kind.layer, kind.number, self.machine, self.placement, self.rules, self.seq), kind.count)
            for kind in kinds(self.shape, self.rules)
        ]

    def _head(self) -> LayerTime:
        """Head, loss and further-token layers, which the last stage runs."""
        machine, layout = self.machine, self.layout
        shape, extra = self.shape, 1 + self.shape.mtp
        width = shape.head.outputs / layout.tp
        product = 2 * self.tokens * shape.head.inputs * width / machine.flops("bf16") * extra
        loss = self.tokens * width * _LOSS_BYTES / machine.bandwidth * extra
        gaps = _END_KERNELS * machine.gap
        forward = Seconds({"gemm": product, "elementwise": 0.5 * loss, "gaps": 0.4 * gaps})
        backward = Seconds({"gemm": 2 * product, "elementwise": 0.5 * loss, "gaps": 0.6 * gaps})
        for _ in range(shape.mtp):
            forward.add(self.layers[-1][0].forward)
            backward.add(self.layers[-1][0].backward)
        return LayerTime(forward=forward, backward=backward)

    @property
    def mean_layer(self) -> float:
        """Seconds of the mean layer, both passes."""
        return sum(count * layer.total for layer, count in self.layers) / len(self.shape.layers)

    def slowest_stage(self) -> float:
        """Seconds a micro-batch keeps the busiest stage.

        Layers that divide by the chunks are dealt evenly, and the head comes on top of the last stage. Otherwise stages
        are filled in whole layers so that the busiest has as little as possible, the head counted.
        """
        layout, n, mean, head = self.layout, len(self.shape.layers), self.mean_layer, self.head.total
        if layout.pp == 1:
            return n * mean + head
        if n % (layout.pp * layout.vpp) == 0:
            return n // layout.pp * mean + head
        least = n / layout.pp * mean
        limits = {k * mean for k in range(n // layout.pp, n + 1)} | {k * mean + head for k in range(n + 1)}
        for limit in sorted(x for x in limits if x >= max(least, head)):
            room = floor((limit - head) / mean + 1e-9) + (layout.pp - 1) * floor(limit / mean + 1e-9)
            if room >= n:
                return limit
        return n * mean + head

    def breakdown(self) -> Seconds:
        """Seconds of a step by cause."""
        out = Seconds()
        layout, m = self.layout, self.micro_batches
        for times, count in (*self.layers, (self.head, 1)):
            for passes in (times.forward, times.backward):
                for cause, seconds in passes.items():
                    out[cause] += seconds * count * m / layout.pp
        useful = sum(out.values()) / m
        stage = self.slowest_stage()
        out["imbalance"] = m * max(0.0, stage - useful)
        if layout.pp > 1:
            hop = self._hop()
            # fewer micro-batches than stages: the first passes all pp * vpp chunks, each further one adds a chunk
            idle = max((layout.pp - 1) / layout.vpp, layout.pp - m + (m - 1) / layout.vpp)
            out["bubble"] = idle * useful
            out["pp"] = 2 * (layout.pp - 1) * hop + (1 - _HIDDEN_HOPS) * 2 * m * layout.vpp * hop
        out["dp"] = self._exposed_data(stage)
        out["optimizer"] = self._optimizer()
        out["step"] = self._step()
        offload = self._offload(useful)
        if offload:
            out["offload"] = offload
        return out

    def _step(self) -> float:
        """Gradient norm, loss over ranks, waiting for the slowest rank, the loop."""
        return _STEP_SECONDS * (1 + 0.5 * log2(self.placement.gpus)) if self.machine.gpu.family != "cpu" else 0.0

    def _hop(self) -> float:
        size = self.tokens * self.shape.model.hidden_size * 2.0 / self.layout.tp
        link = self._pipe_link
        return size / (link.gb_per_s * 1e9) + link.latency_us * 1e-6

    @property
    def _pipe_link(self) -> Link:
        span = self.placement.span("pp")
        return self.machine.across if span.across > 1 else self.machine.inside

    def data_seconds(self, gradient_bytes: float, parameter_bytes: float) -> tuple[float, float]:
        """(reduce-scatter of gradients, all-gather of parameters) of a step, nothing hidden."""
        data, edp = self.placement.span("data"), self.placement.span("edp")

        def both(b: float) -> float:
            return self.machine.gather(data, self.dense * b) + self.machine.gather(edp, self.experts * b)

        return both(gradient_bytes), both(parameter_bytes)

    @property
    def _parameter_bytes(self) -> float:
        return 1.0 if self.rules.wire == "fp8" else 2.0

    def _exposed_data(self, stage: float) -> float:
        """What backward of the last micro-batches and forward of the first do not hide."""
        if self.layout.fsdp > 1:
            return self._exposed_shards(stage)
        reduce, gather = self.data_seconds(2.0, self._parameter_bytes)
        return self._uncovered(reduce, 2 / 3, stage) + self._uncovered(gather, 1 / 3, stage)

    def _uncovered(self, seconds: float, part: float, stage: float) -> float:
        """What a `part` of the computing beside it leaves of a transfer."""
        m, layout = self.micro_batches, self.layout
        window = stage * min(m, layout.pp) * ((layout.vpp - 1) / layout.vpp if layout.pp > 1 else 1.0)
        return max(self.machine.constants.data * seconds, seconds - part * window)

    def _saved_by_codes(self, reduce: float, small: float) -> float:
        """Of the step, by gradients that take `small` seconds as codes instead of `reduce`."""
        if self.layout.fsdp > 1:
            return 0.0
        stage = self.slowest_stage()
        return self._uncovered(reduce, 2 / 3, stage) - self._uncovered(small, 2 / 3, stage)

    def _exposed_shards(self, stage: float) -> float:
        """Weights gathered twice and gradients scattered in every micro-batch; then over what holds equal shards."""
        share, m, f = self.machine.constants.data, self.micro_batches, self.layout.fsdp
        data = self.placement.span("data")
        inside = min(f, data.inside)
        group = Span(inside=inside, across=max(1, f // inside))
        count = self.dense + self.experts
        # layer by layer, so that each pays the latency; what arrives in bf16 is quantized every time
        layers = len(self.shape.layers)
        micro = layers * (
            2 * self.machine.gather(group, count / layers * self._parameter_bytes)
            + self.machine.gather(group, count / layers * 2.0)
        )
        again = 2 * m * count * QUANTIZE_BYTES[self.rules.wire] * QUANTIZE_TIME / self.machine.bandwidth
        again *= self._parameter_bytes > 1
        outer = Span(
            inside=max(1, data.inside // inside), across=max(1, data.size // f // max(1, data.inside // inside))
        )
        last = 2 * self.machine.gather(outer, count / f * 2.0)
        return m * max(share * micro, micro - stage) + max(share * last, last - stage / 2) + again

    def _optimizer(self) -> float:
        data, edp = self.placement.span("data").size, self.placement.span("edp").size
        count = self.dense / data + self.experts / edp
        quantized = self.dense + self.experts if self.rules.wire != "bf16" else 0.0
        codes = quantized * QUANTIZE_BYTES[self.rules.wire] * QUANTIZE_TIME
        if self.layout.fsdp > 1:
            codes /= self.layout.fsdp
        return (count * _OPTIMIZER_BYTES + codes) / self.machine.bandwidth

    def _offload(self, useful: float) -> float:
        """Activations on their way to host memory and back, where computing does not hide them."""
        layout, host = self.layout, self.placement.topology.host
        if not layout.offload or not host.c2c_gb_s:
            return 0.0
        kept = (
            layers_bytes(kinds(self.shape, self.rules), self.rules, layout) * self.tokens * layout.offload / layout.pp
        )
        moved = kept / (host.c2c_gb_s * 1e9)
        return self.micro_batches * max(0.05 * moved, 2 * moved - useful)

    def parts(self) -> StepParts:
        """For a pipeline simulation."""
        layout = self.layout
        chunks = layout.pp * layout.vpp
        reduce, gather = self.data_seconds(2.0, 2.0)
        small_reduce, small_gather = self.data_seconds(_CODE_WIRE, _CODE_WIRE)
        span = self.placement.span("data")
        return StepParts(
            micro_batches=self.micro_batches,
            chunk_forward_s=sum(n * sum(x.forward.values()) for x, n in self.layers) / chunks,
            chunk_backward_s=sum(n * sum(x.backward.values()) for x, n in self.layers) / chunks,
            last_extra_forward_s=sum(self.head.forward.values()),
            last_extra_backward_s=sum(self.head.backward.values()),
            p2p_bytes=self.tokens * self.shape.model.hidden_size * 2.0 / layout.tp,
            p2p_s=self._hop() if layout.pp > 1 else 0.0,
            p2p_link="network" if self.placement.span("pp").across > 1 else "nvlink",
            reduce_s=reduce,
            gather_s=gather,
            reduce_fp4_s=small_reduce,
            gather_fp4_s=small_gather,
            reduce_saved_s=self._saved_by_codes(reduce, small_reduce),
            data_link="network" if span.across > 1 else "nvlink",
            optimizer_s=self._optimizer(),
            host_s=self._step(),
            checkpoint_bytes=14.0 * self.shape.parameters / self.placement.gpus,
        )
