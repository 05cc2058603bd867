"""Predicted layouts in the simulator: steps with jitter and stragglers, scaling curves, what a failure leaves.

weak     the batch grows with the data-parallel ranks
strong   the batch stays: fewer micro-batches each, a larger bubble, less to hide communication behind
fp4      gradients and parameters between data-parallel ranks as NVFP4 codes instead of bf16
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fp4dist.cluster.simulate import Noise, Step, Work, simulate
from fp4dist.cluster.timing import Prediction, predict
from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Layout, Link, Precision, Topology
from fp4dist.spec.run import ModelConfig

Wire = Literal["bf16", "fp4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is simulated, apart from the number of GPUs."""

    model: ModelConfig
    topology: Topology
    layout: Layout
    precision: Precision
    gbs: int
    seq: int
    noise: Noise = dataclasses.field(default_factory=Noise)

    def predict(self, gpus: int) -> Prediction:
        """The planner's view of the same job."""
        return predict(
            self.model,
            self.topology,
            gpus,
            self.layout,
            precision=self.precision,
            gbs=self.gbs,
            seq=self.seq,
            order=self.layout.order,
        )

    def step(self, gpus: int, wire: Wire = "bf16") -> Step:
        """One simulated step."""
        return simulate(work_of(self.predict(gpus), gpus, wire, self.model.num_layers), self.noise)


def work_of(prediction: Prediction, gpus: int, wire: Wire, layers: int) -> Work:
    """The simulator's input for a predicted layout of a model of `layers`.

    Ranks of a tensor- and context-parallel group, or of an expert group where that is larger, move in lockstep.
    """
    parts, layout = prediction.parts, prediction.layout
    lockstep = max(layout.tp * layout.cp, layout.etp * layout.ep)
    if gpus % (layout.pp * lockstep):
        raise ConfigError(
            f"simulate: {gpus} GPUs are not a multiple of pp * {lockstep} ranks that work in lockstep (tp * cp or ep)"
        )
    chunks = layout.pp * layout.vpp
    forward, first_forward, last_forward = _chunks(parts.chunk_forward_s, layers, chunks)
    backward, first_backward, last_backward = _chunks(parts.chunk_backward_s, layers, chunks)
    return Work(
        pp=layout.pp,
        vpp=layout.vpp,
        micro_batches=parts.micro_batches,
        pipelines=gpus // layout.pp // lockstep,
        lockstep=lockstep,
        forward_s=(forward,) * layout.pp,
        backward_s=(backward,) * layout.pp,
        first_forward_s=first_forward,
        first_backward_s=first_backward,
        last_forward_s=parts.last_extra_forward_s + last_forward,
        last_backward_s=parts.last_extra_backward_s + last_backward,
        send_s=parts.p2p_s,
        reduce_s=parts.reduce_fp4_s if wire == "fp4" else parts.reduce_s,
        gather_s=parts.gather_fp4_s if wire == "fp4" else parts.gather_s,
        shared_link=parts.p2p_link == parts.data_link and layout.pp > 1,
        optimizer_s=parts.optimizer_s + parts.host_s,
    )


def _chunks(average_s: float, layers: int, chunks: int) -> tuple[float, float, float]:
    """(time of a chunk, what the first one takes more, what the last one takes more) from the mean over all chunks.

    One or two layers short of equal chunks, the last and the first chunk have one less: head and embedding count as
    layers, as published layouts of 126 layers in 64 chunks do.
    """
    short = -layers % chunks
    if short not in (1, 2):
        return average_s, 0.0, 0.0
    layer = average_s * chunks / layers
    return layer * (layers + short) / chunks, -layer if short == 2 else 0.0, -layer


# -- scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One job of a scaling curve."""

    gpus: int
    gbs: int
    wire: Wire
    step_s: float
    tokens_per_s: float
    efficiency: float  # tokens/s/GPU relative to the smallest job with the bf16 wire


def curve(case: Case, gpus: Sequence[int], kind: Literal["weak", "strong"]) -> list[Point]:
    """Both wires at each number of GPUs. weak: case.gbs is the batch of the smallest job.

    Numbers of GPUs whose batch does not divide are left out of a strong curve.
    """
    points: list[Point] = []
    base = 0.0
    for count in sorted(gpus):
        gbs = case.gbs * count // min(gpus) if kind == "weak" else case.gbs
        scaled = dataclasses.replace(case, gbs=gbs)
        if not _divides(scaled, count):
            continue
        for wire in ("bf16", "fp4"):
            step = scaled.step(count, wire).step_s
            rate = gbs * case.seq / step
            base = base or rate / count
            points.append(
                Point(gpus=count, gbs=gbs, wire=wire, step_s=step, tokens_per_s=rate, efficiency=rate / count / base)
            )
    return points


def _divides(case: Case, gpus: int) -> bool:
    layout = case.layout
    if gpus % layout.copy or gpus % (layout.etp * layout.ep * layout.pp):
        return False
    replicas = layout.dp(gpus) * layout.micro_batch
    return case.gbs % replicas == 0 and (layout.vpp == 1 or case.gbs // replicas % layout.pp == 0)


def sizes(smallest: int, largest: int) -> list[int]:
    """smallest, twice that, ... up to largest."""
    found = [smallest]
    while found[-1] * 2 <= largest:
        found.append(found[-1] * 2)
    return found


# -- failures


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One answer to a failure."""

    failure: str
    answer: str
    gpus: int  # that still work
    share: float  # of the throughput before


Replan = Callable[["Case", int], Layout | None]  # the planner's best layout of a job on so many GPUs


def failures(case: Case, gpus: int, wire: Wire = "bf16", replan: Replan | None = None) -> list[Outcome]:
    """What each failure domain takes away, and every answer to it, the best one first within a failure."""
    before = _rate(case, gpus, wire)
    plans: dict[tuple[int, int], Layout | None] = {}
    found: list[Outcome] = []
    for failure, answers in _failures(case, gpus):
        outcomes = []
        for answer, changed, left in answers:
            rate = _rate(changed, left, wire) if left else 0.0
            outcomes.append(Outcome(failure=failure, answer=answer, gpus=left, share=rate / before))
        for _, changed, left in answers:
            if replan is None or not 0 < left < gpus:
                continue
            if (left, changed.gbs) not in plans:
                plans[left, changed.gbs] = replan(changed, left)
            best = plans[left, changed.gbs]
            if best is not None and best != case.layout:
                share = _rate(dataclasses.replace(changed, layout=best), left, wire) / before
                words = f"replan: {best.label()}, batch {changed.gbs}"
                outcomes.append(Outcome(failure=failure, answer=words, gpus=left, share=share))
        found += sorted(outcomes, key=lambda o: -o.share)
    return found


def _rate(case: Case, gpus: int, wire: Wire) -> float:
    return case.gbs * case.seq / case.step(gpus, wire).step_s


Answer = tuple[str, Case, int]


def _failures(case: Case, gpus: int) -> Iterator[tuple[str, list[Answer]]]:
    t = case.topology
    spare = [(f"one of the domain's {t.spare_nodes} spare nodes takes over, restart", case, gpus)] * bool(t.spare_nodes)
    node = "tray" if t.nodes_per_domain > 1 else "node"
    yield f"GPU or {node}", [*spare, *_shrink(case, gpus, t.host.gpus)]
    if t.host.nics and gpus > t.gpus_per_domain:
        slow = _with(case, across=_slower(t.across, 0.5))
        yield "NIC", [("keep going, two GPUs share a NIC", slow, gpus), *spare, *_shrink(case, gpus, t.host.gpus)]
    if t.switches > 1:
        slow = _with(case, inside=_slower(t.inside, (t.switches - 1) / t.switches))
        without = f"keep going with {t.switches - 1} of {t.switches} switch trays"
        yield "NVLink switch tray", [(without, slow, gpus), *_shrink(case, gpus, t.usable_per_domain)]
    if t.nodes_per_domain > 1 and gpus > t.usable_per_domain:
        yield "rack", _shrink(case, gpus, t.usable_per_domain)


def _shrink(case: Case, gpus: int, lost: int) -> list[Answer]:
    """Leave out the model copies that a failure touches, with fewer samples a step or with as many as before."""
    copy, before = case.layout.copy, gpus // case.layout.copy
    found: list[Answer] = []
    left = (gpus - lost) // copy
    smaller = dataclasses.replace(case, gbs=case.gbs * left // before)
    if 0 < left < before and case.gbs * left % before == 0 and _divides(smaller, left * copy):
        idle = gpus - lost - left * copy
        words = f"{left} of {before} copies go on with a batch of {smaller.gbs}, {idle} GPUs idle"
        found.append((words, smaller, left * copy))
    for copies in range(left, 0, -1):
        if _divides(case, copies * copy):
            idle = gpus - lost - copies * copy
            found.append(
                (f"{copies} of {before} copies go on with the same batch, {idle} GPUs idle", case, copies * copy)
            )
            break
    return found or [("stop until it is repaired", case, 0)]


def _with(case: Case, **links: Link) -> Case:
    return dataclasses.replace(case, topology=dataclasses.replace(case.topology, **links))


def _slower(link: Link, factor: float) -> Link:
    return dataclasses.replace(link, gb_per_s=link.gb_per_s * factor)
