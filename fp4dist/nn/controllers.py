"""Controllers: small state that scales and channel choices keep from step to step, the same on every rank.

A statistic other than `current` scales a tensor by an amax from before: held, averaged, adapted in powers of two or
trained. `channels` and `hot_residual` choose input channels by their norms. During a step every rank notes what it sees
(amax, gradients, energies of columns) in vectors that are indexed by the whole model's linears; `settle` merges them
over the world, one MAX and one SUM, and updates. What a rank has no part of is zero there. So the state depends on
the step's tokens alone, not on how model and batch were split: DP 2 x TP 2 keeps what one process keeps.

    slot       Controllers.slots(path, recipe, comm)["fprop.x"]: a SlotControl, which the linear's plan holds
    in a step  control.through(reduce_max) in place of reduce_max; control.see_columns(x); control.add_gradient(g)
    after it   Controllers.settle(step): once, then everything that was noted at that step again (a retraced step) is
               dropped
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.errors import CheckpointError, RecipeMismatch
from fp4dist.nn.comm import LinearComm, place
from fp4dist.numerics.grouping import Grouping, ReduceMax
from fp4dist.numerics.rotation import rotate
from fp4dist.numerics.scales import divide, fp32, target_max
from fp4dist.numerics.tensor import Key
from fp4dist.spec.blocks import AbsMax
from fp4dist.spec.recipe import SLOTS, LinearRecipe, QuantSpec
from fp4dist.spec.splits import Channels, HotResidual
from fp4dist.spec.statistics import Current, GradScale, Hindsight, Hold, Learned, Statistic

_LARGEST_POWER = 2.0**100  # GradScale's S stays within 1 / this and this: a tensor of zeros must not double it to Inf
_BETA1, _BETA2 = 0.9, 0.999  # of the AdamW that trains a learned amax, without decay
_TOGETHER = 16  # columns: what tensor cores contract at once, in types of two bytes
StateDict = dict[str, Any]


class SlotControl:
    """What one slot of one linear keeps. Its state belongs to Controllers; this is the linear's view of it.

    recording   whether the pass in progress is a training pass, which counts; the plan sets it. Recomputed activations
                then count once: their first forward pass runs without gradients
    """

    def __init__(
        self, held: tuple[Bank, int] | None, choice: Choice | None, columns: Tensor | None, unit: Callable[[], float]
    ) -> None:
        self.recording, self._muted = True, False
        self._held, self._choice, self._columns, self._unit = held, choice, columns, unit
        self._index: tuple[Tensor, Tensor] | None = None  # of which choice, and its numbers

    def muted(self) -> SlotControl:
        """The same state, read only: for passes that must leave no trace."""
        control = SlotControl(self._held, self._choice, self._columns, self._unit)
        control._muted = True
        return control

    @property
    def _notes(self) -> bool:
        return self.recording and not self._muted

    @property
    def channels(self) -> Tensor | None:
        """[columns of this rank's x] bool: the chosen input channels; None while there are none."""
        if self._choice is None or self._choice.chosen is None:
            return None
        return self._choice.chosen if self._columns is None else self._choice.chosen[self._columns]

    @property
    def chosen_index(self) -> Tensor | None:
        """[k] int64: the numbers of `channels`, ascending, with as many others as make k a multiple that GEMMs like.

        Waits for the device once after each choice.
        """
        channels = self.channels
        if channels is None or self._choice is None or self._choice.chosen is None:
            return None
        if self._index is None or self._index[0] is not self._choice.chosen:
            number = min(max(-(-int(channels.sum()) // _TOGETHER), 1) * _TOGETHER, len(channels))
            first = channels.to(torch.int8).argsort(descending=True, stable=True)[:number]
            self._index = self._choice.chosen, first.sort().values
        return self._index[1]

    def through(
        self,
        reduce_max: ReduceMax | None,
        x: Tensor | None = None,
        spec: QuantSpec | None = None,
        key: Key | None = None,
    ) -> ReduceMax | None:
        """The ReduceMax for one quantization: what it gives for the tensor's amax [] is what its scales shall use.

        Other shapes pass on to `reduce_max`. A finite amax is noted; where it is not finite it is returned as it is,
        so that the tensor decodes to NaN as always. Once something is kept, no rank asks another one for its amax.

        x, spec, key   [R, C] this rank's tensor, its spec and place: what a learned amax starts from
        """
        if self._held is None:
            return reduce_max
        bank, i = self._held
        start = None
        if isinstance(bank, LearnedBank) and not bank.known[i] and x is not None and spec is not None:
            start = bank.start_of(x, spec, key, reduce_max)
        used: list[Tensor] = []  # a format with two levels asks twice, the second time with our own answer

        def kept(values: Tensor) -> Tensor:
            if values.dim():
                return reduce_max(values) if reduce_max is not None else values
            if not used:
                whole = reduce_max(values) if reduce_max is not None and bank.looks(i) else values
                value = self._used(bank, i, whole if start is None else start)
                used.append(torch.where(whole.isfinite(), value, whole))
            return used[0]

        return kept

    def _used(self, bank: Bank, i: int, amax: Tensor) -> Tensor:
        """[] what scales use for a tensor with this amax, which is noted."""
        unit = self._unit()
        if unit == 1:
            if self._notes:
                bank.note(i, amax)
            return bank.used_for(i, amax)
        amax = divide(amax, unit)
        if self._notes:
            bank.note(i, amax)
        return bank.used_for(i, amax) * unit

    def see_columns(self, x_TI: Tensor, comm: LinearComm, token_shard: bool = False) -> None:
        """Note the energies of the columns of this rank's [T, I] x, where the choice of channels is due.

        token_shard   `x_TI` holds this rank's part of the tokens only (sequence parallelism)
        """
        if self._choice is None or not self._notes or not self._choice.collecting:
            return
        if comm.split != "I" and comm.rank > 0 and not token_shard:
            return  # rank 0 of those that see the same x counts for all
        self._choice.note(x_TI, self._columns)

    def add_gradient(self, g: Tensor) -> None:
        """Note a part [] of the gradient of log(amax): the sum over all ranks and micro-batches is the whole one, up to
        a positive factor, which AdamW does not see. For a learned amax.
        """
        assert self._held is not None
        bank, i = self._held
        assert isinstance(bank, LearnedBank)
        if self._notes:
            bank.gradient[i] += g.to(torch.float64)
            bank.noted = True


class Bank:
    """The kept amaxes of all slots with one statistic: vectors [n] over the whole model, sorted by path.

    names   of the n slots;  v   what a block's amax maps to: the element grid's maximum over the headroom
    state   what a checkpoint holds;  seen   [n] fp32: this rank's largest amax of the step, 0: none
    used    [n] fp32: what scales use, 0: nothing yet, each tensor uses its own;  known   whether, without a device
    noted   whether this rank has seen anything since it was last settled
    """

    def __init__(self, names: Sequence[str], v: float, device: torch.device) -> None:
        self.names, self.v, self.device = tuple(names), v, device
        self.state: dict[str, Tensor] = self._fresh()
        self.seen = self._zeros()
        self.gradient = self._zeros(torch.float64)
        self.noted = False
        self.refresh()

    def _fresh(self) -> dict[str, Tensor]:
        return {"amax": self._zeros()}

    def _zeros(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(len(self.names), dtype=dtype, device=self.device)

    def refresh(self) -> None:
        """Derive `used` and `known` from the state."""
        self.used = self._used()
        if not all(getattr(self, "known", (False,))):
            self.known: list[bool] = (self.used > 0).tolist()

    def _used(self) -> Tensor:
        return self.state["amax"]

    def looks(self, i: int) -> bool:
        """Whether slot i needs the amax of the whole logical tensor within the step."""
        return not self.known[i]

    def note(self, i: int, amax: Tensor) -> None:
        """Remember an amax [] of slot i, in the bank's unit; one that is not finite tells nothing."""
        self.seen[i] = torch.maximum(self.seen[i], torch.where(amax.isfinite(), amax, 0.0))
        self.noted = True

    def forget(self) -> None:
        """Drop what was noted."""
        self.seen.zero_()
        self.gradient.zero_()
        self.noted = False

    def used_for(self, i: int, amax: Tensor) -> Tensor:
        """[] what the scales of a tensor of slot i with this amax use."""
        if self.known[i]:
            return self.used[i]
        return self.first(amax)

    def first(self, amax: Tensor) -> Tensor:
        """What is used where nothing is kept yet."""
        return amax

    def settle(self, seen: Tensor, step: int) -> None:
        """Update by the step's largest amaxes [n], 0 where a slot saw nothing."""
        raise NotImplementedError


class HoldBank(Bank):
    """`Hold`: the amax of the last look, looked at anew when it has served `steps` steps."""

    def __init__(self, block: Hold, names: Sequence[str], v: float, device: torch.device) -> None:
        self.block = block
        super().__init__(names, v, device)

    def _fresh(self) -> dict[str, Tensor]:
        return {"amax": self._zeros(), "looked": self._zeros(torch.int64)}  # the step of the last look

    def settle(self, seen: Tensor, step: int) -> None:
        """As Bank's."""
        due = (self.state["amax"] == 0) | (step - self.state["looked"] >= self.block.steps)
        look = due & (seen > 0)
        self.state["amax"] = torch.where(look, seen, self.state["amax"])
        self.state["looked"] = torch.where(look, step, self.state["looked"])


class HindsightBank(Bank):
    """`Hindsight`: m <- (1 - momentum) amax + momentum m; the first amax is m."""

    def __init__(self, block: Hindsight, names: Sequence[str], v: float, device: torch.device) -> None:
        self.block = block
        super().__init__(names, v, device)

    def settle(self, seen: Tensor, step: int) -> None:
        """As Bank's."""
        m, momentum = self.state["amax"], self.block.momentum
        mixed = torch.where(m > 0, fp32(1.0 - momentum) * seen + fp32(momentum) * m, seen)
        self.state["amax"] = torch.where(seen > 0, mixed, m)


class GradScaleBank(Bank):
    """`GradScale`: x is quantized as S x; the amax that gives a scale of 1/S is v/S, exactly."""

    def __init__(self, block: GradScale, names: Sequence[str], v: float, device: torch.device) -> None:
        self.block = block
        super().__init__(names, v, device)

    def _fresh(self) -> dict[str, Tensor]:
        return {"scale": self._zeros() + (self.block.start or 0.0)}

    def _used(self) -> Tensor:
        s = self.state["scale"]
        return torch.where(s > 0, divide(self.v, s), 0.0)

    def looks(self, i: int) -> bool:
        """Also where the rule is applied to the present amax first."""
        return self.block.lookahead or super().looks(i)

    def used_for(self, i: int, amax: Tensor) -> Tensor:
        """As Bank's."""
        if self.block.lookahead and self.known[i]:
            return divide(self.v, self._moved(self.state["scale"][i], amax))
        return super().used_for(i, amax)

    def first(self, amax: Tensor) -> Tensor:
        """Under the power of two that fits."""
        return divide(self.v, self._fitting(amax))

    def settle(self, seen: Tensor, step: int) -> None:
        """As Bank's."""
        s = self.state["scale"]
        moved = torch.where(s > 0, self._moved(s, seen), self._fitting(seen))
        self.state["scale"] = torch.where(seen > 0, moved, s)

    def _moved(self, s: Tensor, amax: Tensor) -> Tensor:
        """S after the rule: halved above the level, doubled at half of it or below."""
        level = fp32(self.block.level)
        m = s * amax
        moved = torch.where(m > level, s * 0.5, torch.where(m <= level * 0.5, s * 2.0, s))
        return moved.clamp(1.0 / _LARGEST_POWER, _LARGEST_POWER)

    def _fitting(self, amax: Tensor) -> Tensor:
        """The power of two that the rule leaves as it is."""
        ratio = divide(fp32(self.block.level), amax).clamp(1.0 / _LARGEST_POWER, _LARGEST_POWER)
        power = (ratio.view(torch.int32) & 0x7F800000).view(torch.float32)
        return self._moved(power, amax)  # the quotient may have been rounded up to a power of two


class LearnedBank(Bank):
    """`Learned`: AdamW on log(amax), in fp64; with no epsilon, so that the gradient's unit does not matter."""

    def __init__(self, block: Learned, names: Sequence[str], v: float, device: torch.device) -> None:
        self.block = block
        super().__init__(names, v, device)

    def _fresh(self) -> dict[str, Tensor]:
        names = ("log_amax", "exp_avg", "exp_avg_sq", "updates")
        return {name: self._zeros(torch.float64) for name in names} | {"started": self._zeros(torch.bool)}

    def _used(self) -> Tensor:
        return torch.where(self.state["started"], self.state["log_amax"].exp(), 0.0).to(torch.float32)

    def start_of(self, x: Tensor, spec: QuantSpec, key: Key | None, reduce_max: ReduceMax | None) -> Tensor:
        """[] LSQ's initial amax: start * mean |x| * sqrt(the grid's largest level), of the logical [R, C] tensor."""
        x = x.to(torch.float32)
        if spec.rotation is not None:
            x = rotate(x, spec.rotation, key)
        grouping = Grouping.of(x, spec, key, reduce_max)
        mean = divide(grouping.total(x.abs()), float(grouping.count())).reshape(())
        return mean * fp32(self.block.start * spec.format.element.max**0.5)

    def settle(self, seen: Tensor, step: int) -> None:
        """Start where nothing is kept yet; `train` follows."""
        state = self.state
        starts = (seen > 0) & ~state["started"]
        state["log_amax"] = torch.where(starts, seen.double().log(), state["log_amax"])
        state["started"] = state["started"] | starts

    def train(self, gradient: Tensor, lr: float) -> None:
        """One AdamW step at learning rate lr * block.lr by [n] gradients; one of 0 or not finite is none."""
        state = self.state
        given = gradient.isfinite() & (gradient != 0) & state["started"]
        g = torch.where(given, gradient, 0.0)
        mean = _BETA1 * state["exp_avg"] + (1 - _BETA1) * g
        square = _BETA2 * state["exp_avg_sq"] + (1 - _BETA2) * g * g
        updates = state["updates"] + given
        unbiased = (square / (1 - _BETA2**updates)).sqrt()
        move = lr * self.block.lr * (mean / (1 - _BETA1**updates)) / torch.where(unbiased > 0, unbiased, 1.0)
        after = {"log_amax": state["log_amax"] - move, "exp_avg": mean, "exp_avg_sq": square, "updates": updates}
        for name, value in after.items():
            state[name] = torch.where(given, value, state[name])


class Choice:
    """The chosen input channels of one linear: those with the most energy over the steps that it collects.

    chosen    [K] bool over the global input channels; None before the first choice
    energy    [K] fp64: sums of squares so far, of the whole model's tokens; seen   likewise, of this rank's and step's
    steps     steps that `energy` covers;  last   the step of the last choice, -1: none;  noted   as Bank's
    """

    def __init__(self, block: Channels | HotResidual, name: str, columns: int, device: torch.device) -> None:
        self.block, self.name = block, name
        self.chosen: Tensor | None = None
        self.energy = torch.zeros(columns, dtype=torch.float64, device=device)
        self.seen = torch.zeros_like(self.energy)
        self.steps, self.last, self.collecting, self.noted = 0, -1, False, False

    def enter(self, step: int) -> None:
        """Decide whether this step's energies count."""
        block = self.block
        if isinstance(block, Channels):
            self.collecting = self.chosen is None and step >= block.after
        else:
            self.collecting = self.chosen is None or (block.every > 0 and step - self.last >= block.every)

    def note(self, x_TI: Tensor, columns: Tensor | None) -> None:
        """Add the energies of this rank's columns; those of a column that is not finite tell nothing."""
        energy = x_TI.to(torch.float32).square().sum(0, dtype=torch.float64)
        energy = torch.where(energy.isfinite(), energy, 0.0)
        if columns is None:
            self.seen += energy
        else:
            self.seen[columns] += energy
        self.noted = True

    def forget(self) -> None:
        """Drop what was noted."""
        self.seen.zero_()
        self.noted = False

    def settle(self, energy: Tensor, step: int) -> None:
        """Take the step's energies [K] of all ranks; choose where enough is collected."""
        if not bool(energy.any()):
            return  # the linear has not run: nothing to choose by
        self.energy, self.steps = self.energy + energy, self.steps + 1
        if self.steps < (self.block.collect if isinstance(self.block, Channels) else 1):
            return
        self.chosen = torch.zeros_like(self.energy, dtype=torch.bool)
        order = self.energy.argsort(descending=True, stable=True)  # a tie goes to the first
        self.chosen[order[: chosen_columns(self.block, len(order))]] = True
        self.energy, self.steps, self.last = torch.zeros_like(self.energy), 0, step


def chosen_columns(block: Channels | HotResidual, columns: int) -> int:
    """How many of `columns` input channels are chosen: the share, rounded up to the multiple, at most all."""
    at_least = -(-round(block.share * columns, 9) // 1)
    return min(int(-(-at_least // block.multiple)) * block.multiple, columns)


_BANKS: dict[type, Callable[..., Bank]] = {
    Hold: HoldBank,
    Hindsight: HindsightBank,
    GradScale: GradScaleBank,
    Learned: LearnedBank,
}


@dataclass(frozen=True, slots=True)
class ControlledLinear:
    """A linear of the whole model: its path, its global input channels, and every LinearRecipe it may run under."""

    path: str
    in_features: int
    variants: Sequence[LinearRecipe]


class Controllers:
    """All kept state of a model under a recipe.

    linears   the whole model's;  device   where the state lies
    replicas  ranks over which gradients are averaged (set it before training). A rank's dY is that of the mean loss of
              its own samples, so its amax grows with the number of ranks; what is kept is that of the mean over all
    """

    def __init__(self, linears: Iterable[ControlledLinear], device: torch.device) -> None:
        self.device, self.settled, self.replicas, self._step = device, -1, 1, 0
        members: dict[tuple[Statistic, float], dict[str, None]] = {}
        self._choices: dict[tuple[str, Channels | HotResidual], Choice] = {}
        for linear in sorted(linears, key=lambda linear: linear.path):  # engines list them in different orders
            for slot, spec in ((s, v.slot(s)) for v in linear.variants for s in SLOTS):
                if spec is None or spec.source == "reuse":  # which has the forward slot's codes
                    continue
                if not isinstance(spec.amax, Current):
                    members.setdefault((spec.amax, _target(spec)), {})[_name(linear.path, slot)] = None
                if slot == "fprop.x" and isinstance(spec.outlier, Channels | HotResidual):
                    at = (linear.path, spec.outlier)
                    self._choices.setdefault(at, Choice(spec.outlier, linear.path, linear.in_features, device))
        self._banks = {at: _BANKS[type(at[0])](at[0], tuple(names), at[1], device) for at, names in members.items()}
        self._index = {at: {name: i for i, name in enumerate(bank.names)} for at, bank in self._banks.items()}
        self.enter(0)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept."""
        return not self._banks and not self._choices

    @property
    def trains(self) -> bool:
        """Whether an amax is trained, so that `settle` needs the learning rate."""
        return any(isinstance(bank, LearnedBank) for bank in self._banks.values())

    def slots(self, path: str, recipe: LinearRecipe, comm: LinearComm) -> dict[str, SlotControl]:
        """Slot -> control, for the slots of the linear at `path` that keep something under `recipe`."""
        found: dict[str, SlotControl] = {}
        for slot in SLOTS:
            spec = recipe.slot(slot)
            if spec is None or spec.source == "reuse":
                continue
            at = (spec.amax, _target(spec))
            held = (self._banks[at], self._index[at][_name(path, slot)]) if at in self._banks else None
            choice = None
            if slot == "fprop.x" and isinstance(spec.outlier, Channels | HotResidual):
                choice = self._choices[path, spec.outlier]
            if held is not None or choice is not None:
                columns = _columns(choice, comm) if choice is not None else None
                unit = self._of_gradients if slot.endswith(".dy") else _of_values
                found[slot] = SlotControl(held, choice, columns, unit)
        return found

    def _of_gradients(self) -> float:
        return float(self.replicas)

    def enter(self, step: int) -> None:
        """Begin a step."""
        self._step = step
        for choice in self._choices.values():
            choice.enter(step)

    def settle(self, step: int, lr: float | None = None) -> None:
        """Merge what all ranks have noted in `step` and update: a collective call of the whole world, once a step.

        lr   the run's learning rate at this step, for a learned amax
        """
        if self.is_empty:
            return
        if step != self.settled:
            self._update(step, lr)
            self.settled = step
        self._forget()

    def _forget(self) -> None:
        for part in (*self._banks.values(), *self._choices.values()):
            part.forget()

    def _update(self, step: int, lr: float | None) -> None:
        banks = list(self._banks.values())
        due = [choice for choice in self._choices.values() if choice.collecting]
        trained = [bank for bank in banks if isinstance(bank, LearnedBank)]
        if banks:
            for bank, seen in zip(banks, _merged([b.seen for b in banks], dist.ReduceOp.MAX), strict=True):
                bank.settle(seen, step)
        sums = _merged([*(b.gradient for b in trained), *(c.seen for c in due)], dist.ReduceOp.SUM)
        for bank, gradient in zip(trained, sums, strict=False):
            if lr is None and bool(gradient.any()):
                raise RecipeMismatch(
                    f"step {step}: {bank.names[0]} has amax: learned, whose learning rate is relative to the run's,"
                    " which is not known here; call the AppliedRecipe's settle(lr=...) after every optimizer step"
                )
            bank.train(gradient / self.replicas, lr or 0.0)
        for choice, energy in zip(due, sums[len(trained) :], strict=True):
            choice.settle(energy, step)
        for bank in banks:
            bank.refresh()

    # -- saving

    def state_dict(self) -> StateDict:
        """CPU tensors and plain values, the same on every rank, of the whole model: any layout can go on from them.

        RecipeMismatch in the middle of a step, of which a part would be lost.
        """
        if self._step != self.settled and any(p.noted for p in (*self._banks.values(), *self._choices.values())):
            raise RecipeMismatch(
                f"step {self._step} has been seen but not settled, and would be missing in what is saved; call settle()"
                " of the AppliedRecipe, on every rank, after the optimizer step and before state_dict()"
            )
        banks = [
            {"block": repr(at), "names": list(bank.names), **{k: v.cpu().clone() for k, v in bank.state.items()}}
            for at, bank in self._banks.items()
        ]
        choices = [
            {
                "block": repr(at[1]), "path": at[0], "energy": c.energy.cpu().clone(), "steps": c.steps, "last": c.last,
                "chosen": c.chosen.cpu().clone() if c.chosen is not None else None,
            }
            for at, c in self._choices.items()
        ]  # fmt: skip
        return {"settled": self.settled, "banks": banks, "choices": choices}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, in place. CheckpointError where it is another recipe's or model's."""
        banks, choices = {b["block"]: b for b in state["banks"]}, {(c["block"], c["path"]): c for c in state["choices"]}
        wanted_banks = {repr(at): set(bank.names) for at, bank in self._banks.items()}
        wanted_choices = {(repr(at[1]), at[0]) for at in self._choices}
        if wanted_banks != {k: set(b["names"]) for k, b in banks.items()} or wanted_choices != set(choices):
            raise CheckpointError(
                f"kept statistics of {sum(len(b['names']) for b in banks.values())} slots and {len(choices)} choices of"
                f" channels are not those of this recipe and model ({sum(map(len, wanted_banks.values()))} and"
                f" {len(wanted_choices)}); use the recipe that the checkpoint was written with"
            )
        for at, bank in self._banks.items():
            found = banks[repr(at)]
            place_of = {name: i for i, name in enumerate(found["names"])}
            order = torch.tensor([place_of[name] for name in bank.names])
            bank.state = {k: found[k][order].to(self.device) for k in bank.state}
            bank.known = [False]
            bank.refresh()
        for at, choice in self._choices.items():
            found = choices[repr(at[1]), at[0]]
            choice.energy, choice.steps, choice.last = found["energy"].to(self.device), found["steps"], found["last"]
            choice.chosen = found["chosen"].to(self.device) if found["chosen"] is not None else None
        self.settled = state["settled"]
        self._forget()


def _merged(parts: Sequence[Tensor], op: Any) -> Sequence[Tensor]:
    """`parts` of all ranks merged, in one all-reduce over the world."""
    if not parts:
        return ()
    flat = torch.cat(list(parts))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat, op=op)
    return flat.split([len(part) for part in parts])


def _of_values() -> float:
    return 1.0


def _target(spec: QuantSpec) -> float:
    headroom = spec.rule.headroom if isinstance(spec.rule, AbsMax) else 1.0
    return target_max(spec.format.element.max, headroom)


def _name(path: str, slot: str) -> str:
    return f"{path} {slot}"


def _columns(choice: Choice, comm: LinearComm) -> Tensor | None:
    """Global numbers of this rank's input channels; None: all of them."""
    if comm.split != "I" or comm.size == 1:
        return None
    held = len(choice.energy) // comm.size
    key = place(comm, "fprop.w", 1, held, Key())
    run = held // len(key.column_runs)
    return torch.cat([torch.arange(start, start + run) for start in key.column_runs]).to(choice.energy.device)
