"""Which layouts a job could have, and which is fastest."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from fp4dist.cluster.memory import stage_parameters
from fp4dist.cluster.shapes import Shape, shape_of
from fp4dist.cluster.timing import Prediction, predict
from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Layout, Precision, Topology
from fp4dist.spec.recipe import Recipe
from fp4dist.spec.run import ModelConfig

_TENSOR = (1, 2, 4, 8)
_CONTEXT = (1, 2, 4, 8)
_PIPELINE = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 24, 32, 36, 64)
_EXPERT = (1, 2, 4, 8, 16, 32, 64, 128)
_CHUNKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
_MICRO = (1, 2, 4, 8)
_MULTIPLES = (2, 4, 8, 16, 32, 64, 128)
_SPANNING = 0.1
_STATE_BYTES = 2 + 2  # of a parameter at the very least: a weight and its gradient
_FEW_TOKENS = 512  # of a rank and micro-batch: below, kernels are too short to be worth splitting the sequence for


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked for."""

    model: ModelConfig
    topology: Topology
    gpus: int
    gbs: int
    seq: int
    precision: Precision | None = None
    recipe: Recipe | None = None
    fixed: tuple[tuple[str, int], ...] = ()  # dimensions that the user has decided: (("tp", 4), ("pp", 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One layout of a plan.

    quick   recomputing no more than a well-kept job must (the lower estimate of memory): what ranks it
    sure    recomputing enough, by whole MLPs or layers as our engines do, that the upper estimate fits too; None:
            nothing is enough, the layout is tight
    """

    quick: Prediction
    sure: Prediction | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Ranked layouts, the best first (`preference`), and how many were dropped for which reason."""

    job: Job
    ranked: tuple[Choice, ...]
    dropped: dict[str, int]
    runnable: Prediction | None  # the fastest that surely fits and that our engines run
    closest: Prediction | None  # of what does not fit, the one that lacks least

    @property
    def chosen(self) -> Prediction | None:
        """The one to take, of those that fit by the upper estimate."""
        sure = [choice.sure for choice in self.ranked if choice.sure is not None]
        return min(sure, key=preference) if sure else None


def plan(job: Job) -> Plan:
    """Every layout that divides the job and fits, by predicted step time (`preference`).

    Of layouts that differ only in chunks, micro-batch or order of ranks the fastest stands for all.
    """
    quick: dict[tuple[int, ...], Prediction] = {}
    sure: dict[tuple[int, ...], Prediction] = {}
    dropped: Counter[str] = Counter()
    closest: Prediction | None = None
    runnable: Prediction | None = None
    for layout in candidates(job, dropped):
        try:
            found = predict_layout(job, layout, safe=False)
        except ConfigError:
            dropped["does not divide the job"] += 1
            continue
        if not found.lean.fits:
            dropped["does not fit"] += 1
            closest = found if closest is None or found.lean.missing < closest.lean.missing else closest
            continue
        _keep(quick, found)
        plain = found.memory.fits and found.layout.recompute == "none"
        safe = found if plain else predict_layout(job, layout, safe=True)
        if not safe.memory.fits:
            continue
        _keep(sure, safe)
        better = runnable is None or preference(safe) < preference(runnable)
        if better and engines_run(job, safe.layout):
            runnable = safe
    if not quick and closest is None:
        closest = _barest(job)
    ranked = [Choice(quick=p, sure=sure.get(key)) for key, p in quick.items()]
    ranked.sort(key=lambda c: (preference(c.quick), c.quick.memory.total))
    return Plan(job=job, ranked=tuple(ranked), dropped=dict(dropped), runnable=runnable, closest=closest)


def _barest(job: Job) -> Prediction | None:
    """Where nothing comes near: the layout that lacks least."""
    found: list[Prediction] = []
    for layout in _splits(job, shape_of(job.model), bare=True):
        try:
            found.append(predict_layout(job, layout, safe=True))
        except ConfigError:
            continue
    return min(found, key=lambda p: p.lean.missing) if found else None


def enough_gpus(job: Job) -> int | None:
    """The smallest power-of-two multiple of the job's GPUs on which some layout surely fits, the batch grown alike."""
    for factor in _MULTIPLES:
        larger = dataclasses.replace(job, gpus=job.gpus * factor, gbs=job.gbs * factor)
        limit = job.topology.domains
        if limit is not None and larger.gpus > limit * job.topology.gpus_per_domain:
            return None
        for layout in candidates(larger, Counter()):
            try:
                if predict_layout(larger, layout, safe=True).memory.fits:
                    return larger.gpus
            except ConfigError:
                continue
    return None


def _keep(best: dict[tuple[int, ...], Prediction], found: Prediction) -> None:
    key = family(found.layout)
    if key not in best or found.step_time_s < best[key].step_time_s:
        best[key] = found


def predict_layout(job: Job, layout: Layout, *, safe: bool) -> Prediction:
    """The prediction of one layout of a job."""
    return predict(
        job.model,
        job.topology,
        job.gpus,
        layout,
        precision=job.precision,
        recipe=job.recipe,
        gbs=job.gbs,
        seq=job.seq,
        safe=safe,
    )


def preference(found: Prediction) -> float:
    """Seconds of a step, with a surcharge where a copy of the model spans domains.

    Such a layout must gain more than the model's own error: one slow link or lost node then stops more of the job.
    Where experts fill a domain, the pipeline has to lead out of it, and costs nothing extra.
    """
    axes = ("tp", "cp", "pp") if found.layout.ep == 1 else ("tp", "cp", "ep")
    spans = any(found.placement.span(axis).across > 1 for axis in axes)
    return found.step_time_s * (1 + _SPANNING * spans)


def engines_run(job: Job, layout: Layout) -> bool:
    """Whether our engines run it: layers, or layers and the two ends, fill the chunks evenly, nothing is offloaded, and
    weights are sharded only by ZeRO 3 over all data-parallel ranks.
    """
    model = job.model
    parts = layout.offload or layout.recompute == "selective" or layout.recomputed < 1
    if parts or layout.etp > 1 or model.query_groups % layout.tp or model.ffn_hidden_size % layout.tp:
        return False
    if layout.fsdp > 1:
        return layout.pp == layout.cp == layout.ep == 1 and layout.fsdp == layout.dp(job.gpus)
    return model.num_layers % (layout.pp * layout.vpp) == 0 or counts_ends(job, layout)


def counts_ends(job: Job, layout: Layout) -> bool:
    """Whether the layers come out even only with embedding and head as two more, and every chunk still has a layer."""
    chunks, layers = layout.pp * layout.vpp, job.model.num_layers
    return layers % chunks != 0 and (layers + 2) % chunks == 0 and layers + 2 > chunks


def family(layout: Layout) -> tuple[int, ...]:
    """What tells layouts apart that are worth listing both."""
    return layout.tp, layout.pp, layout.cp, layout.ep, layout.etp, layout.fsdp


def candidates(job: Job, dropped: Counter[str]) -> Iterator[Layout]:
    """Layouts that divide GPUs, batch, heads, layers and experts, and whose bare weights and gradients fit."""
    shape = shape_of(job.model)
    for split in _splits(job, shape):
        for chunks in _chunks(job, split):
            layout = dataclasses.replace(split, vpp=chunks)
            if any(getattr(layout, key) != value for key, value in job.fixed):
                continue
            for micro in _MICRO:
                if job.gbs % (micro * layout.dp(job.gpus)):
                    continue
                if layout.vpp > 1 and job.gbs // (micro * layout.dp(job.gpus)) % layout.pp:
                    continue  # interleaved micro-batches go around in groups of pp
                if micro > 1 and (layout.cp > 1 or micro * job.seq > 4 * job.model.seq_length):
                    continue  # more samples a pass, or a sample over several ranks: both at once gain nothing
                yield dataclasses.replace(layout, micro_batch=micro)
        if not any(job.gbs % (m * split.dp(job.gpus)) == 0 for m in _MICRO):
            dropped["global batch smaller than the data-parallel ranks"] += 1


def _splits(job: Job, shape: Shape, *, bare: bool = False) -> Iterator[Layout]:
    """bare: also those whose weights and gradients alone exceed the memory."""
    model, gpus, room = job.model, job.gpus, job.topology.gpu.memory_gb * 1e9
    for tp in _TENSOR:
        if model.num_attention_heads % tp or tp > job.topology.gpus_per_domain:
            continue
        for cp in _CONTEXT:
            if cp > 1 and (job.seq % (2 * cp * tp) or job.seq / cp / tp < _FEW_TOKENS):
                continue
            for pp in _PIPELINE:
                if gpus % (tp * cp * pp) or pp > model.num_layers + 2:
                    continue
                for ep, etp in _experts(job, pp):
                    base = Layout(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
                    for fsdp in _shards(job, base):
                        engine = "deepspeed" if fsdp > 1 else "megatron"  # ZeRO 3 is our engines' way to shard weights
                        layout = dataclasses.replace(base, fsdp=fsdp, engine=engine)
                        if bare or sum(stage_parameters(shape, layout)) / fsdp * _STATE_BYTES <= room:
                            yield layout


def _experts(job: Job, pp: int) -> Iterator[tuple[int, int]]:
    """(ep, etp): experts over ranks, and each of them cut, which pays only inside a node."""
    moe, ranks = job.model.moe, job.gpus // pp
    if moe is None:
        yield 1, 1
        return
    for ep in _EXPERT:
        for etp in (t for t in _TENSOR if t <= job.topology.host.gpus and moe.ffn_hidden_size % t == 0):
            if moe.num_experts % ep == 0 and ranks % (ep * etp) == 0:
                yield ep, etp


def _shards(job: Job, layout: Layout) -> Iterator[int]:
    """Whole weights; or, without a pipeline, sharded over a domain's ranks or over all that hold equal ones."""
    yield 1
    equal = layout.dp(job.gpus) * layout.cp
    if layout.pp > 1 or equal == 1 or job.model.moe is not None:
        return
    inside = min(equal, job.topology.usable_per_domain // (layout.tp * layout.cp) * layout.cp)
    yield from sorted({s for s in (inside, equal) if s > 1 and equal % s == 0})


def _chunks(job: Job, layout: Layout) -> Iterator[int]:
    """Chunks of a stage: those that come out even, with the two ends counted as layers or not."""
    if layout.pp == 1:
        yield 1
        return
    n = job.model.num_layers
    extra = job.model.beyond.mtp if job.model.beyond else 0
    counted = (n, n + 1, n + 2, n + 1 + extra, n + 2 + extra)
    for vpp in _CHUNKS:
        places = layout.pp * vpp
        if places <= n + 2 and any(c % places == 0 for c in counted):
            yield vpp
