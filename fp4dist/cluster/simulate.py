"""One training step, event by event: pipeline passes, sends, gradient reduction, parameter gather, optimizer.

A *pipeline* is `pp` groups of ranks that hand micro-batches on to each other; the ranks of such a group (tensor and
context parallel, and experts' groups) wait for each other in every layer, so that a pass takes as long as its slowest
member. All pipelines run the same program, so one event stands for the same pass in all of them and carries a vector of
times, one per pipeline: 100,000 ranks cost as many events as one pipeline. Pipelines meet where gradients are reduced.

    compute   a stage runs its passes in the schedule's order, each when its input has arrived and the last one is done
    sends     start when the pass is done and the ports of both sides are free (first come, first served, in the order
              of the pipelines' mean times); they do not hold up the sender
    reduction of a chunk's gradients starts when the slowest pipeline has finished its last backward pass; gathers of a
              chunk's parameters are queued from the start of the step, and its first forward pass waits for them
    contention where sends use the link that reduction or gather is using, the two share it: a send takes twice as long,
              and the collective is prolonged by what was sent
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fp4dist.cluster.schedule import Pass, program
from fp4dist.errors import ConfigError
from fp4dist.spec.frozen import frozen

Times = NDArray[np.float64]  # seconds since the step began, [pipelines]


@frozen
class Work:
    """What one step consists of; times in seconds, without jitter and contention."""

    pp: int
    vpp: int = 1
    micro_batches: int  # of each pipeline
    pipelines: int = 1
    lockstep: int = 1  # ranks of a stage that wait for each other in every layer (tp * cp, or an expert group)
    forward_s: tuple[float, ...]  # of one micro-batch through one chunk, per stage; communication inside it included
    backward_s: tuple[float, ...]
    first_forward_s: float = 0.0  # more (or, with fewer layers, less) of the model's first chunk
    first_backward_s: float = 0.0
    last_forward_s: float = 0.0  # of its last chunk: head and loss
    last_backward_s: float = 0.0
    send_s: float = 0.0  # wire time of one activation (or its gradient) between stages
    send_latency_s: float = 0.0
    reduce_s: float = 0.0  # all gradients of a rank across pipelines; spread evenly over its chunks
    gather_s: float = 0.0  # all updated parameters of a rank, likewise
    shared_link: bool = False  # whether sends and the two collectives use the same link
    optimizer_s: float = 0.0  # after the last reduction, gradient norm included

    def __post_init__(self) -> None:
        for key in ("pp", "vpp", "micro_batches", "pipelines", "lockstep"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least 1")
        for key in ("forward_s", "backward_s"):
            if len(getattr(self, key)) != self.pp:
                raise ValueError(f"{key} has {len(getattr(self, key))} times, one for each of pp = {self.pp} stages")

    @property
    def ranks(self) -> int:
        """GPUs of the job."""
        return self.pp * self.pipelines * self.lockstep


@frozen
class Noise:
    """Who is slow, and how much every pass varies."""

    jitter: float = 0.0  # standard deviation of the logarithm of a pass's time on one rank
    slow_fraction: float = 0.0  # share of the ranks that are slow all the time
    slow_factor: float = 1.0  # by which their passes take longer
    seed: int = 0

    def __post_init__(self) -> None:
        if self.jitter < 0 or not 0 <= self.slow_fraction <= 1 or self.slow_factor < 1:
            raise ValueError(
                f"jitter = {self.jitter} must not be negative, slow_fraction = {self.slow_fraction} must lie in [0, 1]"
                f" and slow_factor = {self.slow_factor} must be at least 1"
            )


class Span(NamedTuple):
    """One pass of the first pipeline, for pictures."""

    stage: int
    what: Pass
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome of one simulated step."""

    step_s: float
    busy: float  # share of the step in which the average stage computes
    bubble_s: float  # waiting of the average stage for other stages, reductions and gathers left out
    exposed_s: float  # of reduction, gather and optimizer: what they add to the step
    events: int
    spans: list[Span] = field(default_factory=list)


def simulate(work: Work, noise: Noise = Noise()) -> Step:  # noqa: B008 (frozen)
    """Run one step of `work` under `noise`; the same arguments give the same step."""
    return _Simulation(work, noise).run()


class _Simulation:
    """State of the run: a heap of events, ordered by the pipelines' mean time, and who is busy until when."""

    def __init__(self, work: Work, noise: Noise) -> None:
        self.work, self.noise = work, noise
        self.rng = np.random.default_rng(noise.seed)
        self.programs = [program(s, work.pp, work.vpp, work.micro_batches) for s in range(work.pp)]
        self.slow = self._slow_stages()
        stages, zeros = range(work.pp), self._zeros
        self.next_pass = [0] * work.pp
        self.running = [False] * work.pp
        self.compute_free = [zeros() for _ in stages]
        self.out_free = [zeros() for _ in stages]
        self.in_free = [zeros() for _ in stages]
        self.link_busy_until = [zeros() for _ in stages]  # of reduction and gather
        self.busy_s = np.zeros(work.pp)
        self.first_start = [zeros() for _ in stages]
        self.gathered = self._gather_times()
        self.backwards_left = [[work.micro_batches] * work.vpp for _ in stages]
        self.arrived: dict[tuple[int, Pass], Times] = {}
        self.heap: list[tuple[float, int, int, Pass, Times]] = []  # mean end, number, stage, pass, ends
        self.count = 0
        self.spans: list[Span] = []
        self.last_compute = zeros()
        self.last_reduction = zeros()

    def _zeros(self) -> Times:
        return np.zeros(self.work.pipelines)

    def _slow_stages(self) -> NDArray[np.float64]:
        """[pp, pipelines]: the factor of the slowest member of each group."""
        w, n = self.work, self.noise
        if not n.slow_fraction:
            return np.ones((w.pp, w.pipelines))
        chosen = self.rng.random((w.pp, w.pipelines, w.lockstep)) < n.slow_fraction
        return np.where(chosen.any(axis=2), n.slow_factor, 1.0)

    def _gather_times(self) -> list[list[float]]:
        """When the parameters of each stage's chunks are there: one chunk after the other from the step's start."""
        w = self.work
        for stage in range(w.pp):
            self.link_busy_until[stage] += w.gather_s if w.shared_link else 0.0
        return [[w.gather_s * (chunk + 1) / w.vpp for chunk in range(w.vpp)] for _ in range(w.pp)]

    # -- the loop

    def run(self) -> Step:
        w = self.work
        for stage in range(w.pp):
            self._start_what_can(stage)
        while self.heap:
            _, _, stage, done, end = heapq.heappop(self.heap)
            self.running[stage] = False
            self._hand_on(stage, done, end)
            if not done.forward:
                self._reduce_if_last(stage, done.chunk, end)
            self._start_what_can(stage)
        if any(position < len(steps) for position, steps in zip(self.next_pass, self.programs, strict=True)):
            raise ConfigError("pipeline: the schedule waits for itself; this is a defect of the simulator")
        return self._outcome()

    def _start_what_can(self, stage: int) -> None:
        """Begin the stage's next pass if its input is there."""
        if self.running[stage] or self.next_pass[stage] == len(self.programs[stage]):
            return
        what = self.programs[stage][self.next_pass[stage]]
        ready = self._input(stage, what)
        if ready is None:
            return
        begin = np.maximum(self.compute_free[stage], ready)
        if self.next_pass[stage] == 0:
            self.first_start[stage] = begin
        duration = self._duration(stage, what)
        end = begin + duration
        self.next_pass[stage] += 1
        self.running[stage] = True
        self.compute_free[stage] = end
        self.busy_s[stage] += float(duration.mean())
        self.last_compute = np.maximum(self.last_compute, end)
        self.spans.append(Span(stage, what, float(begin[0]), float(end[0])))
        heapq.heappush(self.heap, (float(end.mean()), self._number(), stage, what, end))

    def _number(self) -> int:
        self.count += 1
        return self.count

    def _input(self, stage: int, what: Pass) -> Times | None:
        """When the pass can begin; None while that is not known."""
        first = stage == 0 and what.chunk == 0
        last = stage == self.work.pp - 1 and what.chunk == self.work.vpp - 1
        if (what.forward and first) or (not what.forward and last):
            ready: Times | None = self._zeros()
        else:
            ready = self.arrived.pop((stage, what), None)
        if ready is not None and what.forward and what.micro_batch == 0:
            return np.maximum(ready, self.gathered[stage][what.chunk])
        return ready

    def _duration(self, stage: int, what: Pass) -> Times:
        w, sigma = self.work, self.noise.jitter
        nominal = w.forward_s[stage] if what.forward else w.backward_s[stage]
        if stage == 0 and what.chunk == 0:
            nominal += w.first_forward_s if what.forward else w.first_backward_s
        if stage == w.pp - 1 and what.chunk == w.vpp - 1:
            nominal += w.last_forward_s if what.forward else w.last_backward_s
        if not sigma:
            return nominal * self.slow[stage]
        draws = self.rng.standard_normal((w.lockstep, w.pipelines), dtype=np.float32).max(axis=0)
        return nominal * self.slow[stage] * np.exp(sigma * draws - sigma * sigma / 2)

    # -- communication

    def _hand_on(self, stage: int, done: Pass, end: Times) -> None:
        """Send the result of a pass to the stage of the next chunk, forward, or of the one before, backward."""
        w = self.work
        model_chunk = done.chunk * w.pp + stage + (1 if done.forward else -1)
        if not 0 <= model_chunk < w.pp * w.vpp:
            return
        peer, wanted = model_chunk % w.pp, done._replace(chunk=model_chunk // w.pp)
        self.arrived[peer, wanted] = end if peer == stage else self._send(stage, peer, end)
        self._start_what_can(peer)

    def _send(self, source: int, target: int, ready: Times) -> Times:
        """When what is ready at `source` has arrived at `target`."""
        w = self.work
        begin = np.maximum(ready, np.maximum(self.out_free[source], self.in_free[target]))
        wire: Times | float = w.send_s
        if w.shared_link and w.send_s:
            contended = begin < self.link_busy_until[source]
            wire = np.where(contended, 2 * w.send_s, w.send_s)
            self.link_busy_until[source] = self.link_busy_until[source] + np.where(contended, w.send_s, 0.0)
        end = begin + wire
        self.out_free[source] = self.in_free[target] = end
        return end + w.send_latency_s

    def _reduce_if_last(self, stage: int, chunk: int, end: Times) -> None:
        """After a chunk's last backward pass its gradients are reduced over the pipelines, chunk after chunk."""
        w = self.work
        self.backwards_left[stage][chunk] -= 1
        if self.backwards_left[stage][chunk]:
            return
        begin = max(float(end.max()), float(self.link_busy_until[stage].max()))  # a collective waits for the slowest
        until = begin + w.reduce_s / w.vpp
        self.link_busy_until[stage] = np.full(w.pipelines, until)
        self.last_reduction = np.maximum(self.last_reduction, until)

    # -- the result

    def _outcome(self) -> Step:
        w = self.work
        compute = float(self.last_compute.max())
        reduced = max(compute, float(self.last_reduction.max()), *(float(t.max()) for t in self.link_busy_until))
        step = reduced + w.optimizer_s
        mean_busy = float(self.busy_s.mean())
        waits_for_gather = min(w.gather_s / w.vpp, compute)
        return Step(
            step_s=step,
            busy=mean_busy / step,
            bubble_s=max(0.0, compute - waits_for_gather - mean_busy),
            exposed_s=step - compute + waits_for_gather,
            events=self.count,
            spans=self.spans,
        )
