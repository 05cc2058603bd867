"""The run-time side of a `comm:` section: what travels how now, what it has cost, and whether it still may.

One Compression serves all adapters of a process. Before training they register what they send (`register`), then all
ranks agree and the table is printed (`confirm`). In a step (`begin_step` ... `finish_step`) they ask for their wire and
for noise, and book their bytes. Canaries and the guard work on reductions, whose exact result is one collective away.
Passes between steps (a probe of the gradient's noise, a search for what is not finite) reduce gradients exactly: what
they measure is not the wire, and error feedback must not spend on them what belongs to the next update.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fp4dist.comm.agreement import agree
from fp4dist.comm.canary import Finding
from fp4dist.comm.codec import Noise
from fp4dist.comm.exchange import Options
from fp4dist.comm.feedback import Feedback
from fp4dist.comm.hierarchy import GroupTree
from fp4dist.comm.ledger import Account, Ledger
from fp4dist.comm.levels import make_trees
from fp4dist.comm.policy import Decision, digest, levels, span_of, table
from fp4dist.errors import WireError
from fp4dist.spec.cluster import Topology
from fp4dist.spec.communication import CommConfig
from fp4dist.spec.wire import Wire

log = logging.getLogger("fp4dist")
STAGES = {  # of a noise key: collectives add 1 for their second coding
    "grad_reduce": 0,
    "param_gather": 2,
    "sp_reduce_scatter": 3,
    "pp_forward": 4,
    "pp_backward": 5,
    "ep_dispatch": 6,
    "ep_combine": 7,
}


class Kept(Protocol):
    """Something with tensors that belong to one rank."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take them back."""
        ...


@dataclass(slots=True)
class StepTraffic:
    """What a step has sent (this rank), and what was learned about it (equal on all ranks)."""

    accounts: dict[str, Account] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)


class Compression:
    """See the module.

    seed       of the run: half of every noise key
    topology   link speeds, for expected gains; None where config.topology is
    """

    def __init__(self, config: CommConfig, seed: int, topology: Topology | None = None) -> None:
        self.config, self.seed, self.topology = config, seed, topology
        self.ledger = Ledger()
        self.feedback = Feedback(config)
        self.kept: dict[str, Kept] = {"feedback": self.feedback}  # what each rank's own checkpoint file holds
        self.decisions: list[Decision] = []
        self.fallen: dict[str, str] = {}  # bucket -> why it has left its wire
        self.step = 0
        self._two_levels: dict[tuple[int, ...], int] = {}  # ranks of a group -> neighbours that share a domain
        self._trees: dict[tuple[int, ...], GroupTree] = {}
        self._canaries: list[str] = []  # buckets that can be compared
        self._findings: list[Finding] = []
        self.layout = ""  # of the run's ranks: what is kept fits no other
        self._begun = 0  # steps of this process
        self._between = False  # two steps

    # -- before training

    def register(self, decision: Decision, group: Any = None, *, comparable: bool = False) -> int:
        """Note a decision; its number, which keys the noise of what it is about.

        group        over which it is reduced;  comparable   its reductions can be canaries
        """
        if decision.place in {d.place for d in self.decisions if d.direction == decision.direction}:
            raise ValueError(f"{decision.direction} {decision.place} is registered twice")
        if decision.levels is not None:
            self._two_levels[tuple(dist.get_process_group_ranks(group))] = decision.levels[0]
        self.decisions.append(decision)
        if comparable and decision.wire is not None:
            self._canaries.append(decision.place)
        return len(self.decisions) - 1

    def confirm(self, group: Any = None) -> str:
        """All ranks of the job agree, or stop; a collective call. The table of this rank's decisions.

        group   ranks that must have the same buckets, such as the replicas; None: all of the job
        """
        ranks = dist.get_process_group_ranks(group) if group is not None else list(range(_world()))
        own = {f"decisions of ranks {ranks[0]}..{ranks[-1]} of {len(ranks)}": digest(self.config, self.decisions)}
        if _world() > 1:
            facts = {"hash of comm:": hashlib.sha256(repr(self.config).encode()).hexdigest()[:16]}
            agree(facts, self.config.timeout_s)
            if len(ranks) > 1:
                agree(own, self.config.timeout_s, what=f"comm of ranks {ranks[0]}", ranks=ranks)
        self.make_groups()
        lines = ["comm: what travels compressed", table(self.decisions)]
        coded = sum(d.coded for d in self.decisions if d.direction == "grad_reduce" and d.wire is not None)
        if self.config.validate and not self._canaries:
            lines.append("comm.validate: nothing to compare, no gradients of this rank are coded")
        return "\n".join([*lines, *self.feedback.report(coded)])

    def prepare(self, group: Any) -> None:
        """Note that reductions over `group` may be decided on after `confirm`, which makes the groups they need."""
        ranks = dist.get_process_group_ranks(group)
        two = levels(self.config, span_of(ranks, self.topology), "the data-parallel group")
        if two is not None:
            self._two_levels[tuple(ranks)] = two[0]

    def make_groups(self) -> None:
        """Process groups of reductions on two levels; a collective call of the whole job, before the first step."""
        wanted = {ranks: inside for ranks, inside in self._two_levels.items() if ranks not in self._trees}
        self._trees |= make_trees(wanted) if _world() > 1 else {}

    def tree(self, group: Any) -> GroupTree:
        """The two levels of a group for which a decision has them."""
        return self._trees[tuple(dist.get_process_group_ranks(group))]

    def retire(self, place: str) -> None:
        """Bucket `place` will not be reduced again: it takes no canary's turn, and no memory."""
        self._canaries = [other for other in self._canaries if other != place]
        self.feedback.drop(place)

    # -- in a step

    def begin_step(self, step: int) -> None:
        """`step` updates are behind the weights; noise, canaries and checks follow it."""
        self.ledger.close_step()  # of an evaluation
        self.step, self._between, self._begun = step, False, self._begun + 1

    def noise(self, direction: str, number: int) -> Noise:
        """The key of one message; `number` tells the messages of a direction in a step apart."""
        return Noise(seed=self.seed, step=self.step, bucket=number, stage=STAGES[direction])

    @property
    def options(self) -> Options:
        """How collectives run."""
        return Options(check=True if self.config.check else None, sms=self.config.sms)

    def wire_of(self, decision: Decision) -> Wire | None:
        """The wire that `decision` has now: none once the guard has taken it away, nor for gradients between steps."""
        if self._between and decision.direction == "grad_reduce":
            return None
        return None if decision.place in self.fallen else decision.wire

    @property
    def validating(self) -> bool:
        """Whether every reduction of this step is run both ways."""
        return 0 < self._begun <= self.config.validate  # not by `step`, which a roll-back takes back

    def watched(self, place: str) -> bool:
        """Whether `place` is to be reduced exactly as well in this step; equal on all ranks of its group."""
        if self.validating:
            return True
        every = self.config.canary.every
        if every == 0 or self.step % every or not self._canaries:
            return False
        return self._canaries[self.step // every % len(self._canaries)] == place

    def observe(self, finding: Finding) -> None:
        """Take a comparison; it is judged at the end of the step."""
        self._findings.append(finding)

    def finish_step(self, *, skipped: bool = False) -> StepTraffic:
        """End the step on all ranks together.

        skipped   its update was not made: what error feedback has kept of it is forgotten
        raises    WireError on all ranks when a validated reduction left the band
        """
        done, self._between = StepTraffic(accounts=self.ledger.close_step()), True
        every = self.config.canary.every
        if self.validating or (every > 0 and self.step % every == 0):
            done.findings = _everyone(self._findings)
            self._findings = []
            self._judge(done)
        if skipped:
            self.feedback.forget()
        self.feedback.close_step(self.step)
        return done

    def _judge(self, done: StepTraffic) -> None:
        band = self.config.canary.band
        worst: dict[str, Finding] = {}  # of one bucket's copies on tensor- and pipeline-parallel ranks
        for finding in done.findings:
            if finding.what not in worst or finding.badness(band) > worst[finding.what].badness(band):
                worst[finding.what] = finding
        done.findings = list(worst.values())
        outside = {f.what: why for f in done.findings if (why := f.why_outside(band)) is not None}
        if self.validating and outside:
            what, why = next(iter(outside.items()))
            raise WireError(
                f"comm.validate: step {self.step}, {worst[what].text()}: the coded and the exact reduction part"
                f" ({why}); {len(outside)} of {len(worst)} buckets do. Use a finer wire, or widen comm.canary.band if"
                " that is what this wire gives"
            )
        if not self.validating:
            done.messages += [f"comm: step {self.step}: {finding.text()}" for finding in done.findings]
        for what, why in outside.items():
            if self.config.guard and what not in self.fallen:
                self.fallen[what] = f"step {self.step}: {why}"
                self.feedback.drop(what)
                done.fallbacks.append(f"comm: {what} travels in high precision from the next step on: {why}")
        done.messages += done.fallbacks

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What all ranks share: the guard's decisions."""
        return {"fallen": dict(self.fallen)}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Take them back; messages for the log. What this process has decided since, before a roll-back, stays."""
        self.fallen = {str(k): str(v) for k, v in state["fallen"].items()} | self.fallen
        return [f"comm: {what} travels in high precision ({why})" for what, why in self.fallen.items()]


def closing_words(ledger: Ledger) -> list[str]:
    """What all ranks of the job have sent since this process began; a collective call."""
    everyone: list[Any] = [None] * _world()
    if _world() > 1:
        dist.all_gather_object(everyone, ledger.total)
    else:
        everyone = [ledger.total]
    sums: dict[str, Account] = {}
    for accounts in everyone:
        for direction, account in accounts.items():
            sums.setdefault(direction, Account()).add(account)
    return [
        f"comm: {direction}: all ranks sent {a.coded:,} bytes coded and {a.exact:,} in high precision; the engine would"
        f" have sent {a.plain:,}; canaries and validation {a.extra:,}"
        for direction, a in sums.items()
    ]


def summary(accounts: dict[str, Account]) -> dict[str, dict[str, int]]:
    """Accounts as plain data."""
    return {direction: asdict(account) for direction, account in accounts.items()}


def _everyone(findings: Sequence[Finding]) -> list[Finding]:
    """The findings of all ranks of the job."""
    if _world() == 1:
        return list(findings)
    lists: list[Any] = [None] * _world()
    dist.all_gather_object(lists, list(findings))
    return [finding for part in lists for finding in part]


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def same_bits(x: torch.Tensor, group: Any) -> bool:
    """Whether `x` is bit for bit the same on all ranks of `group`; a collective call, for proofs."""
    words = x.contiguous().view(-1).view(torch.uint8)
    low = hashlib.sha256(words.cpu().numpy().tobytes()).hexdigest()
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, low, group=group)
    return len(set(everyone)) == 1
