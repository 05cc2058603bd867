"""What FP8 carriers could not hold, and the forms that a GEMM takes one after the other: FP8 as long as it is exact.

A float8 carrier is exact over as many binades of block scales as its type has (`carry.OCTAVES`). What lies below is
rounded, and counted on the device while the step runs; nothing waits for the count. Once a step the counts of all ranks
are merged: a GEMM that has lost elements keeps its result, and from the next optimizer step on it takes the first later
form of `carry.LADDER` that would have held both of its operands, on every rank alike. Whoever must not take an inexact
step asks `AppliedRecipe.lost` before the update (`backend.strict_exact` does).

Quantizers also tell which binades an operand spans, whatever form they write. So a GEMM goes back: after windows of
`again_after` steps in which nothing fell, where a better form would have held every one of its operands with `MARGIN`
to spare. Whoever falls again waits twice as long. A change ends what CUDA graphs have recorded, so changes come
together: who is close to its limit falls with whoever falls, and all go back at the end of the same window.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.errors import CheckpointError
from fp4dist.nn.carry import LADDER, OCTAVES, words_of
from fp4dist.spec.recipe import GEMMS, SLOTS

MARGIN = 2  # binades that a form must have to spare, for it to be gone back to
WIDE = len(LADDER) - 1  # the form that holds everything
_UNSEEN = -1  # binades of an operand that nobody has measured, or that was zero throughout
Pair = tuple[int, int]  # of a GEMM's two operands


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a GEMM has left a form.

    count     elements that the slot's carrier did not hold, the most in one of any rank and micro-batch; 0: none, but
              its block scales came close to what the type holds
    octaves   binades from the smallest to the largest of them; below 0: not known
    step      the optimizer step in which it was;  form   what the GEMM takes since, as a place in `carry.LADDER`
    """

    path: str
    slot: str
    count: int
    step: int
    octaves: int = _UNSEEN
    form: int = WIDE

    @property
    def gemm(self) -> str:
        """The GEMM of the slot."""
        return self.slot.split(".")[0]

    @property
    def left_fp8(self) -> bool:
        """Whether the GEMM takes no FP8 form since."""
        return self.form == WIDE

    def text(self) -> str:
        """For the log."""
        what = f"{self.count:,} elements did not fit its FP8 carrier"
        if not self.count:
            what = f"block scales over {self.octaves} binades came close to what its FP8 carrier holds"
        return (
            f"{self.path} {self.slot}: {what} in step {self.step};"
            f" {self.gemm} of this linear takes {words_of(LADDER[self.form])} carriers from now on"
        )


@dataclass(frozen=True, slots=True)
class Return:
    """A GEMM that goes back to a better form.  steps   in which its operands spanned no more than `octaves` binades."""

    path: str
    gemm: str
    form: int
    octaves: Pair
    steps: int

    def text(self) -> str:
        """For the log."""
        return (
            f"{self.path} {self.gemm}: block scales over at most {self.octaves[0]} and {self.octaves[1]} binades in the"
            f" last {self.steps} steps; this linear takes {words_of(LADDER[self.form])} carriers again"
        )


@dataclass(slots=True)
class _Place:
    """Where a GEMM stands that has ever left its first form.

    wait      windows without a fall until it goes back;  left   how many of them are still to come
    octaves   the most binades of either operand in these windows;  returned   whether it has gone back since
    """

    loss: Loss
    form: int
    wait: int = 1
    left: int = 1
    returned: bool = False
    octaves: Pair = (_UNSEEN, _UNSEEN)

    def fall(self, loss: Loss) -> None:
        """Take the later form of `loss`."""
        self.loss, self.form = loss, loss.form
        self.wait *= 2 if self.returned else 1
        self.left, self.returned, self.octaves = self.wait, False, (_UNSEEN, _UNSEEN)

    def see(self, octaves: Pair) -> None:
        """Note what the operands spanned in a step."""
        self.octaves = max(self.octaves[0], octaves[0]), max(self.octaves[1], octaves[1])

    def end_window(self) -> bool:
        """Whether it goes back, which it then has."""
        better = _holding(self.octaves, 0)
        if better >= self.form:
            self.left, self.octaves = self.wait, (_UNSEEN, _UNSEEN)
            return False
        self.left -= 1
        if not self.left:
            self.form, self.returned, self.left = better, True, self.wait
        return self.returned


class Exactness:
    """The counts and the forms of the GEMMs of a whole model; the same order, and after `settle` the same state, on all
    ranks.

    paths    of the whole model's linears;  device   where this rank's counts lie
    watched  whether any linear of the model may have FP8 carriers, told the same by every rank; where not, nothing is
             reduced and nothing is read
    again_after   steps of a window; 0: nobody goes back
    """

    def __init__(self, paths: Iterable[str], device: torch.device, watched: bool, again_after: int = 0) -> None:
        self.paths, self.watched, self._window = tuple(sorted(paths)), watched, again_after
        self._row = {path: i for i, path in enumerate(self.paths)}
        # of each slot: the most elements lost; `Want.spread`
        number = len(self.paths) if watched else 0
        self._counts = torch.zeros(number, len(SLOTS), 3, dtype=torch.int32, device=device)
        self._places: dict[tuple[str, str], _Place] = {}
        self._steps = 0  # of the present window
        self.settled, self._read = -1, -1
        self._found = torch.zeros(self._counts.shape, dtype=torch.int32)  # in step `_read`, on all ranks
        self._news: list[Loss | Return] = []

    @property
    def fallen(self) -> dict[tuple[str, str], Loss]:
        """(path, GEMM) -> why it does not take its first form."""
        return {at: place.loss for at, place in self._places.items() if place.form}

    @property
    def moved(self) -> bool:
        """Whether any GEMM has ever left its first form."""
        return bool(self._places)

    def slots(self, path: str) -> dict[str, Tensor]:
        """Slot -> [] int32 on the device, the linear's counts of this step; empty where nothing is watched."""
        return {slot: counts[0] for slot, counts in self._of(path).items()}

    def spreads(self, path: str) -> dict[str, Tensor]:
        """Slot -> [2] int32 on the device, which its operands of this step spread over (`Want.spread`); likewise."""
        return {slot: counts[1:] for slot, counts in self._of(path).items()}

    def _of(self, path: str) -> dict[str, Tensor]:
        return dict(zip(SLOTS, self._counts[self._row[path]].unbind(), strict=True)) if self.watched else {}

    def forms(self, path: str) -> dict[str, int]:
        """GEMM -> its form, a place in `carry.LADDER`; where it is not the first."""
        found = ((gemm, self._places.get((path, gemm))) for gemm in GEMMS)
        return {gemm: place.form for gemm, place in found if place is not None and place.form}

    def read(self, step: int) -> list[Loss]:
        """What was lost in `step`, on any rank: the first call of a step is a collective of the world, and waits."""
        if self.watched and step not in (self._read, self.settled):
            counts = self._counts.clone()
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(counts, op=dist.ReduceOp.MAX)
            self._found, self._read = counts.cpu(), step
        if step != self._read:
            return []
        places = self._found[..., 0].nonzero().tolist()  # of a large model almost all are zero
        return [self._loss(i, j, step, WIDE) for i, j in places]

    def _loss(self, row: int, slot: int, step: int, form: int) -> Loss:
        count, octaves = int(self._found[row, slot, 0]), int(_octaves(self._found[row, slot]))
        return Loss(self.paths[row], SLOTS[slot], count, step, octaves, form)

    def settle(self, step: int) -> None:
        """End `step`: what has lost elements, or comes close, takes a later form from now on, and at the end of a
        window others an earlier one. A step that runs again counts once.
        """
        if not self.watched:
            return
        if step != self.settled:
            losses = self.read(step)
            octaves = _octaves(self._found)
            if losses:
                self._fall(losses, octaves, step)
            else:
                self._see(octaves)
            self.settled = step
        self._counts.zero_()

    def _fall(self, losses: list[Loss], octaves: Tensor, step: int) -> None:
        """Give the GEMMs of `losses`, and those that are close to losing, a later form. A new window begins."""
        fallen = dict.fromkeys((self._row[loss.path], GEMMS.index(loss.gemm)) for loss in losses)
        close = octaves.unflatten(1, (len(GEMMS), 2)) > self._limits() - MARGIN
        for i, j in [*fallen, *close.any(-1).nonzero().tolist()]:
            path, gemm = self.paths[i], GEMMS[j]
            place = self._places.get((path, gemm))
            if place is not None and (place.form == WIDE or place.loss.step == step):
                continue
            of_both = int(octaves[i, 2 * j]), int(octaves[i, 2 * j + 1])
            if (i, j) not in fallen and _UNSEEN in of_both:
                continue
            form = _holding(of_both, 1 if place is None else place.form + 1)
            lost = self._found[i, 2 * j : 2 * j + 2, 0].tolist()
            which = lost.index(max(lost)) if max(lost) else int(close[i, j].tolist().index(True))
            loss = self._loss(i, 2 * j + which, step, form)
            if place is None:
                self._places[path, gemm] = _Place(loss, form)
            else:
                place.fall(loss)
            self._news.append(loss)
        self._steps = 0

    def _limits(self) -> Tensor:
        """[P, GEMMS, 2] binades that the operands' present carriers hold."""
        forms = torch.zeros(len(self.paths), len(GEMMS), dtype=torch.int64)
        for (path, gemm), place in self._places.items():
            forms[self._row[path], GEMMS.index(gemm)] = place.form
        return torch.tensor([[OCTAVES[kind] for kind in form] for form in LADDER])[forms]

    def _see(self, octaves: Tensor) -> None:
        """A step in which nothing fell: at the end of a window GEMMs go back."""
        if not self._window or not self._places:
            return
        for (path, gemm), place in self._places.items():
            first = 2 * GEMMS.index(gemm)
            place.see((int(octaves[self._row[path], first]), int(octaves[self._row[path], first + 1])))
        self._steps += 1
        if self._steps < self._window:
            return
        for (path, gemm), place in self._places.items():
            if place.form and place.end_window():
                self._news.append(Return(path, gemm, place.form, place.octaves, self._window * place.wait))
        self._steps = 0

    def news(self) -> list[Loss | Return]:
        """What has changed its form since the last call."""
        new, self._news = self._news, []
        return new

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on every rank."""
        places = [
            [*astuple(place.loss), place.form, place.wait, place.left, place.returned, *place.octaves]
            for place in self._places.values()
        ]
        return {"places": places, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what `state_dict` gave, or from the start; CheckpointError where it is another model's."""
        state = state or {}
        places = [_place(values) for values in state.get("places", [])]
        places += [_Place(Loss(*values), WIDE) for values in state.get("in_bf16", [])]  # as checkpoints had it
        unknown = [place.loss.path for place in places if place.loss.path not in self._row]
        if unknown:
            raise CheckpointError(
                f"the checkpoint says that {unknown[0]} has left its FP8 carriers, and the model has no such linear;"
                " use the model that it was written with"
            )
        self._places = {(place.loss.path, place.loss.gemm): place for place in places}
        self._steps, self._news = int(state.get("steps", 0)), []
        self.settled = self._read = -1


def _octaves(counts: Tensor) -> Tensor:
    """[..., 3] counts -> [...] binades from the smallest to the largest block scale, or `_UNSEEN`."""
    top, depth = counts[..., 1], counts[..., 2]
    return torch.where(depth > 0, top + depth - 256, _UNSEEN)


def _holding(octaves: Pair, first: int) -> int:
    """The first form from `first` on that holds operands of so many binades, with `MARGIN` to spare."""
    for form in range(first, WIDE):
        limits = [OCTAVES[kind] - MARGIN for kind in LADDER[form]]
        if all(0 <= found <= limit for found, limit in zip(octaves, limits, strict=True)):
            return form
    return WIDE


def _place(values: list[Any]) -> _Place:
    """What `state_dict` wrote of one GEMM."""
    number = len(fields(Loss))
    form, wait, left, returned, first, second = values[number:]
    return _Place(Loss(*values[:number]), form, wait, left, returned, (first, second))
