"""What holds or moves the weights of quantized linears around the optimizer's step.

Each part sees the pieces of weights that this rank's optimizer updates (`Held`): the piece itself in the optimizer's
precision, w, and the same piece of what the last forward pass multiplied by, Q(w), with the scales of the logical
weight. All but the moving averages act between the gradients' clipping and the update, when the whole weights of that
forward pass still stand on every rank: nothing has to be gathered for them, and a step that is not taken leaves no
trace in them.

Tensor-parallel ranks hold the same pieces of their shards, so they quantize the same weights in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.apply import AppliedRecipe, Target
from fp4dist.nn.linear import Fp4Conv1D
from fp4dist.nn.shards import Part, Shard, ShardMap
from fp4dist.numerics.codes import decode_scale
from fp4dist.numerics.grouping import spread
from fp4dist.numerics.quantize import dequantize
from fp4dist.numerics.rotation import rotate, unrotate
from fp4dist.numerics.tensor import BlockScaledTensor, PartedTensor, Quantized
from fp4dist.spec.blocks import Ema
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.training import Cage, OsciReset, QRamping

_PATH_EPS = 1e-8  # of R = sum |dQ(w)| / (sum |dw| + eps), as released with arXiv:2502.20853 and arXiv:2510.27527
_NEARNESS_LEVELS = 2**14  # of the threshold that `share` is turned into; a nearness is kept as int16


def make_parts(shards: ShardMap) -> list[Part]:
    """The parts of the recipe's `weights`, and the moving averages that Ema rounding reads.

    Raises RecipeMismatch for a quantized weight that is out of their reach.
    """
    recipe = shards.applied.recipe
    parts: list[Part] = []
    for control in sorted(recipe.weights, key=lambda c: isinstance(c, Cage)):  # Cage pulls what QRamping has updated
        if isinstance(control, Cage):
            parts.append(CagePart(control, shards))
        elif isinstance(control, OsciReset):
            parts.append(OsciResetPart(control, shards))
        else:
            parts.append(QRampingPart(control, shards))
    if recipe.averages_weights:
        parts.append(AveragesPart(shards))
    if parts:
        _check_reach(shards.applied)
    return parts


def pull_strength(cage: Cage, step: int, total_steps: int) -> float:
    """Its lambda at step `step` (from 0): 0 while r = (step + 1) / total_steps is within the silence."""
    r = (step + 1) / total_steps
    if r <= cage.silence:
        return 0.0
    return cage.strength * ((r - cage.silence) / (1 - cage.silence) if cage.schedule == "linear_ramp" else 1.0)


def ramping_period(ratio: Tensor, ramping: QRamping) -> Tensor:
    """N = min(floor(R / step_ratio) * stretch + 1, longest), of fp32 R in any shape; int64."""
    steps = torch.floor(ratio / ramping.step_ratio) * ramping.stretch + 1
    return steps.clamp(max=float(ramping.longest)).to(torch.int64)


@dataclass(slots=True, eq=False)
class Held:
    """A piece of the weight of a linear under a recipe: the optimizer's tensor, its range, the linear."""

    tensor: Tensor
    shard: Shard
    target: Target

    @property
    def spec(self) -> QuantSpec | None:
        """How fprop quantizes the weight now; None while a phase leaves it in high precision."""
        plan = self.target.module.plan
        return plan.spec("fprop.w") if plan is not None else None

    def master(self) -> Tensor:
        """[n] fp32: w, of the optimizer."""
        return self.tensor.detach().reshape(-1).to(torch.float32)

    def replace(self, flat: Tensor) -> None:
        """Give the optimizer's tensor the values [n] `flat`."""
        self.tensor.copy_(flat.view(self.tensor.shape))

    def matrix(self) -> Tensor:
        """[O, I] this rank's whole weight of the last forward pass, in the model's dtype."""
        return stored_matrix(self.target, self.shard.parameter.detach())

    def cut(self, matrix: Tensor) -> Tensor:
        """[n]: the piece of a matrix [O, I] shaped like the weight."""
        return stored_matrix(self.target, matrix).reshape(-1)[self.shard.start : self.shard.stop]

    def operand(self) -> Quantized:
        """The forward pass's quantized weight: its codes, where the plan still has them."""
        plan = self.target.module.plan
        assert plan is not None
        found = plan.aside(False).quantize_weight(self.matrix(), self.target.module.comm, training=True)
        assert isinstance(found, BlockScaledTensor | PartedTensor)  # a plan aside multiplies codes
        return found

    def quantized(self) -> Tensor:
        """[n] fp32: Q(w) in the weight's own basis."""
        assert self.spec is not None
        values, rotation = dequantize(self.operand()), self.spec.rotation
        return self.cut(values if rotation is None else unrotate(values, rotation, None))

    def in_codes_basis(self) -> tuple[Tensor, Tensor]:
        """[n] fp32 each: w and Q(w) in the basis of the codes.

        Under a rotation w is the model's weight, of which alone whole rows are at hand, and not the optimizer's.
        """
        assert self.spec is not None
        values = self.cut(dequantize(self.operand()))
        return (self.master() if self.spec.rotation is None else self.cut(self._rotated())), values

    def nearness(self) -> Tensor:
        """[n] fp32: `edge_nearness` of the model's weight, in the basis of the codes."""
        return self.cut(edge_nearness(self._rotated(), self.operand()))

    def _rotated(self) -> Tensor:
        """[O, I] fp32: the model's weight in the basis of the codes."""
        assert self.spec is not None
        matrix, rotation = self.matrix().to(torch.float32), self.spec.rotation
        return matrix if rotation is None else rotate(matrix, rotation, None) * rotation.size**-0.5


def stored_matrix(target: Target, weight: Tensor) -> Tensor:
    """A weight as its GEMM reads it, [O, I], from how it is stored, or the reverse: Conv1D keeps the transpose."""
    return weight.t() if isinstance(target.module, Fp4Conv1D) else weight


def edge_nearness(w: Tensor, operand: Quantized) -> Tensor:
    """[O, I] fp32 in [0, 1]: 1 on the edge between two grid points, 0 on a grid point and beyond the grid's end.

    With nearest rounding it is |w - Q(w)| over half the step of w's bin. What stands beside the codes is taken off.

    w   [O, I] in the basis of the codes;  operand   its quantized form
    """
    main = operand.main if isinstance(operand, PartedTensor) else operand
    unit = spread(decode_scale(main.scales, main.format.scale), main.shape)
    unit = unit * spread(main.global_scale * main.rotation**-0.5, main.shape)
    beside = 0.0 if main is operand else dequantize(operand) - dequantize(main)
    z = torch.where(unit == 0, 0.0, (w - beside) / unit).abs()
    levels = torch.tensor(main.format.element.levels, dtype=torch.float32, device=w.device)
    below = (torch.bucketize(z, levels, right=True) - 1).clamp_(0, levels.numel() - 2)
    low, high = levels[below], levels[below + 1]
    return (1.0 - (z - (low + high) / 2).abs() / ((high - low) / 2)).clamp_(min=0.0)


class WeightPart(Part):
    """What the parts here share: the pieces of weights that they act on, and their slices in checkpoints."""

    def __init__(self, shards: ShardMap) -> None:
        super().__init__(shards)
        self.held = [
            Held(tensor, shard, shard.target)
            for tensor, shard in shards.shards.items()
            if shard.target is not None and tensor.numel() > 0
        ]

    def _quantized_now(self) -> list[Held]:
        """The pieces whose linears quantize their weight in the present phase."""
        return [held for held in self.held if held.spec is not None]

    def _put(self, held: Held, key: str, flat: Tensor) -> None:
        self.shards.state(held.tensor)[key] = flat.to(torch.float32, copy=True).view(held.tensor.shape)

    def _take(self, held: Held, key: str) -> Tensor:
        """[n] fp32 slice of a checkpoint; zeros where it holds none."""
        value = self.shards.state(held.tensor).get(key)
        return torch.zeros_like(held.master()) if value is None else value.detach().reshape(-1).to(torch.float32)

    def _drop_slices(self) -> None:
        """What a checkpoint brought or took has its own place here; a second copy would only use memory."""
        for tensor in self.shards.shards:
            for key in self.slices:
                self.shards.state(tensor).pop(key, None)


class CagePart(WeightPart):
    """`spec.training.Cage`. The error e = w - Q(w) is that of the forward pass's weights, before any decay.

    decoupled: e is kept during the update and lr lambda e taken off afterwards, beside AdamW's decay and step;
    coupled: lambda e joins the clipped gradient. Nothing is kept from step to step.
    """

    key = "cage"

    def __init__(self, cage: Cage, shards: ShardMap) -> None:
        super().__init__(shards)
        self.cage = cage
        self._errors: list[tuple[Held, Tensor]] = []

    def before_update(self, step: int) -> None:
        """Find e; coupled: add it to the gradients."""
        self._errors, strength = [], pull_strength(self.cage, step, self.shards.total_steps)
        if strength == 0:
            return
        for held in self._quantized_now():
            error = held.master() - held.quantized()
            grad = held.tensor.grad
            if grad is None:  # AdamW leaves it alone as well
                continue
            if self.cage.form == "coupled":
                grad.add_(error.view(grad.shape), alpha=strength)
            else:
                self._errors.append((held, error))

    def after_update(self, step: int) -> None:
        """Decoupled: pull."""
        strength = pull_strength(self.cage, step, self.shards.total_steps)
        for held, error in self._errors:
            lr = float(self.shards.group(held.tensor)["lr"])
            held.tensor.sub_(error.view(held.tensor.shape), alpha=lr * strength)
        self._errors = []


@dataclass(slots=True, eq=False)
class Track:
    """The ways that w and Q(w) of one piece have gone since the window's begin.

    spec     Q's, for which alone the way means something
    places   [k] int64: which elements are tracked; None: all
    w, q     [k] at the last look;  way, q_way   [k] sum |dw| and sum |dQ(w)|
    """

    spec: QuantSpec
    places: Tensor | None
    w: Tensor
    q: Tensor
    way: Tensor
    q_way: Tensor

    @classmethod
    def begin(cls, spec: QuantSpec, places: Tensor | None, w: Tensor, q: Tensor) -> Track:
        """A window's begin, for w, q [n]."""
        pick = (lambda t: t.clone()) if places is None else (lambda t: t[places])
        return cls(spec, places, pick(w), pick(q), torch.zeros_like(pick(w)), torch.zeros_like(pick(q)))

    def look(self, w: Tensor, q: Tensor) -> None:
        """Add the way from the last look to w, q [n]."""
        w, q = (w, q) if self.places is None else (w[self.places], q[self.places])
        self.way += (w - self.w).abs()
        self.q_way += (q - self.q).abs()
        self.w, self.q = w.clone(), q.clone()

    def ratio(self) -> Tensor:
        """[k] R."""
        return self.q_way / (self.way + _PATH_EPS)

    def whole(self, values: Tensor, n: int) -> Tensor:
        """[k] -> [n], zero where nothing is tracked."""
        if self.places is None:
            return values
        return torch.zeros(n, dtype=values.dtype, device=values.device).index_copy_(0, self.places, values)


class Watching(WeightPart):
    """A part that measures R in windows. A window is open from `opened` on; its tracks are in a checkpoint as slices.

    name   first word of its keys in optimizer.state
    """

    fields = ("w", "q", "way", "q_way")

    def __init__(self, name: str, shards: ShardMap) -> None:
        super().__init__(shards)
        self.key = name
        self.slices = tuple(f"{name}_{field}" for field in ("tracked", *self.fields))
        self.opened: int | None = None
        self.tracks: dict[Tensor, Track] = {}

    def state_dict(self) -> dict[str, Any]:
        """When the open window began."""
        return {"opened": self.opened}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take when the open window began."""
        self.opened = state["opened"]

    def before_save(self) -> None:
        """Write the open window's tracks."""
        self._drop_slices()
        for held in self.held:
            track = self.tracks.get(held.tensor)
            if track is None:
                continue
            n = held.tensor.numel()
            self._put(held, self.slices[0], track.whole(torch.ones_like(track.way), n))
            for field in self.fields:
                self._put(held, f"{self.key}_{field}", track.whole(getattr(track, field), n))

    def after_load(self) -> None:
        """Read the open window's tracks; a weight without any is not watched in this window."""
        self.tracks = {}
        if self.opened is None:
            return
        for held in self._quantized_now():
            tracked = self._take(held, self.slices[0]) > 0
            if bool(tracked.any()):
                places = None if bool(tracked.all()) else tracked.nonzero().flatten()
                found = [self._take(held, f"{self.key}_{field}") for field in self.fields]
                assert held.spec is not None
                self.tracks[held.tensor] = Track(
                    held.spec, places, *(f.clone() if places is None else f[places] for f in found)
                )

    def _values(self, held: Held) -> tuple[Tensor, Tensor]:
        """[n] w and Q(w) that are watched."""
        raise NotImplementedError

    def _look(self) -> None:
        """Add this step to all tracks; forget those of weights that a phase quantizes otherwise now."""
        self.tracks = {h.tensor: t for h in self.held if (t := self.tracks.get(h.tensor)) and t.spec == h.spec}
        for held in self.held:
            if held.tensor in self.tracks:
                self.tracks[held.tensor].look(*self._values(held))


class OsciResetPart(Watching):
    """`spec.training.OsciReset`. Moments stay.

    A window that begins at step b is open for the updates of steps b to b + window - 1. The reset follows before the
    next update, whose gradients were taken at the weights not yet reset: as Q(Q(w)) = Q(w) for the formats that it is
    published for, forward and backward saw the same Q(w), and it is the reset right after the window's last update.
    The elements are those of the codes: under a rotation the rotated ones.
    """

    def __init__(self, reset: OsciReset, shards: ShardMap) -> None:
        super().__init__("osci_reset", shards)
        self.reset = reset
        start = reset.start if reset.start >= 1 else reset.start * shards.total_steps
        self.first = round(start)
        self._names = {id(weight.parameter): name for name, weight in shards.weights.items()}

    def before_update(self, step: int) -> None:
        """Open a window, look at the weights, or close a window and reset."""
        self._drop_slices()
        if self.opened is not None and step >= self.opened + self.reset.window:
            self._close()
        elif self.opened is not None and self.reset.criterion == "ratio":
            self._look()
        begin = step - (step - self.first) % self.reset.every
        if step >= self.first and self.opened is None and step < begin + self.reset.window:
            self._open(begin)

    def _values(self, held: Held) -> tuple[Tensor, Tensor]:
        return held.in_codes_basis()

    def _open(self, begin: int) -> None:
        self.opened, self.tracks = begin, {}
        if self.reset.criterion == "bin_edge":  # judged at the window's end alone
            return
        places = self._nearest() if self.reset.share < 1 else {}
        for held in self._quantized_now():
            assert held.spec is not None
            self.tracks[held.tensor] = Track.begin(held.spec, places.get(held.tensor), *self._values(held))

    def _nearest(self) -> dict[Tensor, Tensor]:
        """Places of the `share` of each logical weight's elements that are nearest to an edge; of equals none too many.

        The threshold is found by halving, on sums over all ranks: the same one for every layout.
        """
        near = {h: (h.nearness() * _NEARNESS_LEVELS).to(torch.int16) for h in self._quantized_now()}
        at = {h: torch.full((), h.tensor.numel(), device=h.tensor.device) for h in near}
        most = self.shards.total([(h.shard, n) for h, n in at.items()])[0] * self.reset.share
        low = torch.zeros_like(most)  # too many reach this one
        high = torch.full_like(most, _NEARNESS_LEVELS + 1)  # not too many reach this one
        while bool((high - low > 1).any()):
            middle = torch.floor((low + high) / 2)
            limits = middle.to(torch.int16)
            reached = self.shards.total([(h.shard, (n >= limits[self._index(h)]).sum()) for h, n in near.items()])
            enough = reached[0] <= most
            high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
        return {h.tensor: (n >= high[self._index(h)]).nonzero().flatten() for h, n in near.items()}

    def _index(self, held: Held) -> int:
        return self.shards.index[held.shard.name]

    def _close(self) -> None:
        """Reset, and forget the window."""
        rotated: dict[int, Tensor] = {}  # id of a local weight -> [n] change in the basis of the codes
        for held in self._quantized_now():
            track = self.tracks.get(held.tensor)
            if self.reset.criterion == "ratio" and (track is None or track.spec != held.spec):
                continue
            w, q = held.in_codes_basis()
            if track is None:
                chosen = held.nearness() > self.reset.margin
            else:
                track.look(w, q)
                chosen = track.whole(track.ratio() >= self.reset.threshold, held.tensor.numel())
            assert held.spec is not None
            if held.spec.rotation is None:
                held.replace(torch.where(chosen, q, held.master()))
            else:
                rotated[id(held.tensor)] = torch.where(chosen, q - w, 0.0)
        self._turn_back(rotated)
        self.opened, self.tracks = None, {}

    def _turn_back(self, changes: Mapping[int, Tensor]) -> None:
        """Add changes made in rotated bases. A piece may cut a rotation's group, so whole weights are put together."""
        pieces: dict[str, list[Held]] = {}
        for held in self.held:
            pieces.setdefault(held.shard.name, []).append(held)
        for target in self.shards.applied.targets:
            plan, name = target.module.plan, self._names.get(id(getattr(target.module, "weight", None)))
            spec = plan.spec("fprop.w") if plan is not None else None
            if name is None or spec is None or spec.rotation is None:
                continue
            weight = self.shards.weights[name]
            flat = torch.zeros(weight.parameter.numel(), device=weight.parameter.device)
            for held in pieces.get(name, []):
                if id(held.tensor) in changes:
                    flat[held.shard.start : held.shard.stop] = changes[id(held.tensor)]
            if weight.holders is not None and dist.get_world_size(weight.holders) > 1:
                dist.all_reduce(flat, group=weight.holders)
            change = unrotate(stored_matrix(target, flat.view(weight.parameter.shape)), spec.rotation, None)
            for held in pieces.get(name, []):
                held.replace(held.master() + held.cut(change))


@dataclass(slots=True, eq=False)
class Slow:
    """The elements of one piece with a period above 1.

    places   [k] int64;  period   [k] int64;  gathered   [k] fp32: sum of the gradients collected so far
    """

    places: Tensor
    period: Tensor
    gathered: Tensor


@dataclass(slots=True, eq=False)
class Aside:
    """What the slow elements of one piece were before the update: w, both moments [k]; how many gradients they had
    collected, and whether it is their turn.
    """

    w: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    collected: Tensor
    due: Tensor


class QRampingPart(Watching):
    """`spec.training.QRamping`. The probe steps are live: they run with period 1 and count, where the paper runs
    them aside and restores the weights afterwards. Gradients collected when a probe begins are used in its first step.

    Elements are the weight's own, also under a rotation in fprop: AdamW works on them. Decay acts in every step; a
    slow element's moments change in its own steps alone, whose bias correction counts all steps.
    """

    def __init__(self, ramping: QRamping, shards: ShardMap) -> None:
        super().__init__("q_ramping", shards)
        self.slices += ("q_ramping_period", "q_ramping_gathered")
        self.ramping = ramping
        self.elapsed = 0  # updates since the periods were set
        self.slow: dict[Tensor, Slow] = {}
        self._aside: dict[Tensor, Aside] = {}
        for held in self.held:
            _check_adamw(shards.group(held.tensor), shards.applied.recipe.name)

    def before_update(self, step: int) -> None:
        """Probe, or collect gradients and hand over those whose turn it is."""
        self._drop_slices()
        begin = step - step % self.ramping.every
        if self.opened is not None and step >= self.opened + self.ramping.probe:
            self._set_periods()
        elif self.opened is not None:
            self._look()
        flush = self.opened is None and step < begin + self.ramping.probe
        if flush:
            self.opened = begin
            for held in self._quantized_now():
                assert held.spec is not None
                self.tracks[held.tensor] = Track.begin(held.spec, None, *self._values(held))
        self._collect(flush)
        self.elapsed += 1

    def after_update(self, step: int) -> None:
        """Undo the update of elements whose turn it was not; make that of the others N times as long."""
        for held in self.held:
            aside = self._aside.get(held.tensor)
            if aside is not None:
                self._finish(held, self.slow[held.tensor], aside)
        self._aside = {}
        if self.opened is not None:
            self.slow = {}

    def state_dict(self) -> dict[str, Any]:
        """The open probe and the updates since the periods were set."""
        return {**super().state_dict(), "elapsed": self.elapsed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them."""
        super().load_state_dict(state)
        self.elapsed = int(state["elapsed"])

    def before_save(self) -> None:
        """Write periods and what is collected."""
        super().before_save()
        for held in self.held:
            slow = self.slow.get(held.tensor)
            if slow is not None:
                zeros = torch.zeros_like(held.master())
                self._put(held, "q_ramping_period", zeros.index_copy(0, slow.places, slow.period.to(torch.float32)))
                self._put(held, "q_ramping_gathered", zeros.index_copy(0, slow.places, slow.gathered))

    def after_load(self) -> None:
        """Read them."""
        super().after_load()
        self.slow = {}
        for held in self.held:
            period = self._take(held, "q_ramping_period").to(torch.int64)
            self._keep_slow(held, period, self._take(held, "q_ramping_gathered"))

    def _values(self, held: Held) -> tuple[Tensor, Tensor]:
        return held.master(), held.quantized()

    def _set_periods(self) -> None:
        self._look()
        for held in self.held:
            track = self.tracks.get(held.tensor)
            if track is not None:
                self._keep_slow(held, ramping_period(track.ratio(), self.ramping), torch.zeros_like(track.way))
        self.opened, self.tracks, self.elapsed = None, {}, 0

    def _keep_slow(self, held: Held, period: Tensor, gathered: Tensor) -> None:
        places = (period > 1).nonzero().flatten()
        if places.numel():
            self.slow[held.tensor] = Slow(places, period[places], gathered[places])

    def _collect(self, flush: bool) -> None:
        for held in self.held:
            slow, grad = self.slow.get(held.tensor), held.tensor.grad
            if slow is None or grad is None:
                continue
            flat = grad.reshape(-1)
            collected = self.elapsed % slow.period + 1
            due = collected == slow.period
            if flush or held.spec is None:  # a new probe, or a phase without a quantized weight, ends the collecting
                due = torch.ones_like(due)
            slow.gathered += flat[slow.places]
            mean = torch.where(due, slow.gathered / collected, 0.0)
            slow.gathered = torch.where(due, 0.0, slow.gathered)
            grad.copy_(flat.index_copy(0, slow.places, mean.to(flat.dtype)).view(grad.shape))
            state = self.shards.state(held.tensor)
            m, v = (state[name].reshape(-1)[slow.places] for name in ("exp_avg", "exp_avg_sq"))
            self._aside[held.tensor] = Aside(held.master()[slow.places], m, v, collected, due)

    def _finish(self, held: Held, slow: Slow, aside: Aside) -> None:
        group, state = self.shards.group(held.tensor), self.shards.state(held.tensor)
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        step = float(state["step"] if "step" in state else group["step"])
        for name, old in (("exp_avg", aside.exp_avg), ("exp_avg_sq", aside.exp_avg_sq)):
            flat = state[name].reshape(-1)
            kept = torch.where(aside.due, flat[slow.places], old)
            state[name].copy_(flat.index_copy(0, slow.places, kept).view(state[name].shape))
        m, v = (state[name].reshape(-1)[slow.places] for name in ("exp_avg", "exp_avg_sq"))
        denominator = v.sqrt() / math.sqrt(1 - beta2**step) + group["eps"]
        way = (m / denominator) * (aside.collected * (lr / (1 - beta1**step)))
        w = aside.w * (1 - lr * group["weight_decay"]) - torch.where(aside.due, way, 0.0)
        held.replace(held.master().index_copy(0, slow.places, w))
        if held.spec is None:
            del self.slow[held.tensor]


class AveragesPart(WeightPart):
    """Moving averages of weights for Ema rounding, beside the weights on every rank: `LinearPlan.average`.

    They begin as the weights of the first forward pass under Ema rounding and are of the model's weights (in bf16
    training the rounded ones, which fprop reads). Plans have them once `after` updates are done.
    """

    key = "averages"
    slices: tuple[str, ...] = ("weight_average",)

    def __init__(self, shards: ShardMap) -> None:
        super().__init__(shards)
        names = {id(weight.parameter): name for name, weight in shards.weights.items()}
        weights = ((names.get(id(getattr(t.module, "weight", None))), t) for t in shards.applied.targets)
        self.targets = {name: target for name, target in weights if name is not None}
        self.averages: dict[str, Tensor] = {}
        self.updates = 0
        self.plans_changed()

    def before_update(self, step: int) -> None:
        """Begin with the weights of the first forward pass, whatever was loaded since the start."""
        self._drop_slices()
        if self.updates == 0:
            self.averages = {}
            self.plans_changed()

    def settled(self, step: int) -> None:
        """Move the averages on."""
        self.updates = step + 1
        for name, target in self.targets.items():
            ema = _ema(target)
            if ema is not None:
                self.averages[name].mul_(ema.decay).add_(self._weight(name), alpha=1 - ema.decay)
        self.plans_changed()

    def plans_changed(self) -> None:
        """Give every plan with Ema rounding its weight's average once `after` updates are done, which begins now where
        there is none.
        """
        for name, target in self.targets.items():
            plan, ema = target.module.plan, _ema(target)
            if plan is not None and ema is not None:
                average = self.averages.setdefault(name, self._weight(name).clone())
                plan.average = stored_matrix(target, average) if self.updates >= ema.after else None

    def state_dict(self) -> dict[str, Any]:
        """Updates done."""
        return {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them."""
        self.updates = int(state["updates"])

    def before_save(self) -> None:
        """Write this rank's slices."""
        for held in self.held:
            average = self.averages.get(held.shard.name)
            if average is not None:
                self._put(held, self.slices[0], average.reshape(-1)[held.shard.start : held.shard.stop])

    def after_load(self) -> None:
        """Put the averages together from the slices of all ranks. No weight is all zero, so zeros mean none."""
        found = self.shards.gather(self.slices[0], list(self.targets))
        self.averages = {name: average for name, average in found.items() if bool(average.any())}
        self.plans_changed()

    def _weight(self, name: str) -> Tensor:
        return self.shards.weights[name].parameter.detach().to(torch.float32)


def _ema(target: Target) -> Ema | None:
    plan = target.module.plan
    spec = plan.spec("fprop.w") if plan is not None else None
    return spec.rounding if spec is not None and isinstance(spec.rounding, Ema) else None


def _check_adamw(group: Mapping[str, Any], recipe: str) -> None:
    """Only of AdamW is it known what an update that was not taken would have done."""
    decoupled = group.get("decoupled_weight_decay", True) or group["weight_decay"] == 0
    if "betas" not in group or not decoupled or group.get("amsgrad") or group.get("maximize"):
        raise RecipeMismatch(
            f"recipe {recipe}: q_ramping takes AdamW's steps apart (without amsgrad and maximize), and the optimizer is"
            " another one; use torch.optim.AdamW"
        )


def _check_reach(applied: AppliedRecipe) -> None:
    for target in applied.targets:
        variants = applied.assigned.named(target.site.path).variants(applied.recipe)
        quantized = any(v.fprop.w is not None for v in variants)
        if quantized and getattr(target.module, "weight", None) is None:
            raise RecipeMismatch(
                f"{target.site.path}: recipe {applied.recipe.name} controls the weights of quantized linears, and this"
                " one has none of its own (a head tied to the embedding); give it to bf16 with a rule, or untie them"
            )
