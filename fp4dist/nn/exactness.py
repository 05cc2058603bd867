"""What FP8 carriers could not hold, and the GEMMs that multiply bf16 carriers since then.

A float8 carrier is exact over 29 binades of block scales. What lies below is rounded, and counted on the device while
the step runs; nothing waits for the count. Once a step the counts of all ranks are merged: a GEMM that has lost
elements keeps its result, and from the next optimizer step on it takes bf16 carriers, on every rank alike. Whoever
must not take an inexact step asks `AppliedRecipe.lost` before the update (`backend.strict_exact` does).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.errors import CheckpointError
from fp4dist.spec.recipe import SLOTS


@dataclass(frozen=True, slots=True)
class Loss:
    """Elements of one operand that its FP8 carrier did not hold.

    count   the most in one carrier of any rank and micro-batch;  step   the optimizer step in which it was
    """

    path: str
    slot: str
    count: int
    step: int

    @property
    def gemm(self) -> str:
        """The GEMM of the slot."""
        return self.slot.split(".")[0]

    def text(self) -> str:
        """For the log."""
        return (
            f"{self.path} {self.slot}: {self.count:,} elements did not fit its FP8 carrier in step {self.step};"
            f" {self.gemm} of this linear takes bf16 carriers from now on"
        )


class Exactness:
    """The counts and the GEMMs in bf16 of a whole model; the same order, and after `settle` the same state, on all
    ranks.

    paths    of the whole model's linears;  device   where this rank's counts lie
    watched  whether any linear of the model may have FP8 carriers, told the same by every rank; where not, nothing is
             reduced and nothing is read
    """

    def __init__(self, paths: Iterable[str], device: torch.device, watched: bool) -> None:
        self.paths, self.watched = tuple(sorted(paths)), watched
        self._row = {path: i for i, path in enumerate(self.paths)}
        self._counts = torch.zeros(len(self.paths) if watched else 0, len(SLOTS), dtype=torch.int32, device=device)
        self.fallen: dict[tuple[str, str], Loss] = {}  # (path, gemm) -> why it takes bf16 carriers
        self.settled, self._read, self._losses = -1, -1, list[Loss]()
        self._told = 0  # how many of `fallen` have been given as news

    def slots(self, path: str) -> dict[str, Tensor]:
        """Slot -> [] int32 on the device, the linear's counts of this step; empty where nothing is watched."""
        if not self.watched:
            return {}
        return dict(zip(SLOTS, self._counts[self._row[path]].unbind(), strict=True))

    def in_bf16(self, path: str) -> frozenset[str]:
        """The GEMMs of the linear that no FP8 carrier may serve any more."""
        return frozenset(gemm for at, gemm in self.fallen if at == path)

    def read(self, step: int) -> list[Loss]:
        """What was lost in `step`, on any rank: the first call of a step is a collective of the world, and waits."""
        if self.watched and step not in (self._read, self.settled):
            counts = self._counts.clone()
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(counts, op=dist.ReduceOp.MAX)
            places = counts.nonzero().tolist()  # of a large model almost all are zero
            self._losses = [Loss(self.paths[i], SLOTS[j], int(counts[i, j]), step) for i, j in places]
            self._read = step
        return self._losses if step == self._read else []

    def settle(self, step: int) -> None:
        """End `step`: what has lost elements is in bf16 from now on. A step that runs again counts once."""
        if not self.watched:
            return
        if step != self.settled:
            for loss in self.read(step):
                self.fallen.setdefault((loss.path, loss.gemm), loss)
            self.settled = step
        self._counts.zero_()

    def news(self) -> list[Loss]:
        """What has fallen since the last call."""
        new, self._told = list(self.fallen.values())[self._told :], len(self.fallen)
        return new

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on every rank."""
        return {"in_bf16": [list(astuple(loss)) for loss in self.fallen.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; CheckpointError where it is another model's."""
        losses = [Loss(*values) for values in state["in_bf16"]]
        unknown = [loss.path for loss in losses if loss.path not in self._row]
        if unknown:
            raise CheckpointError(
                f"the checkpoint says that {unknown[0]} takes bf16 carriers, and the model has no such linear; use the"
                " model that it was written with"
            )
        self.fallen = {(loss.path, loss.gemm): loss for loss in losses}
        self._told = len(losses)
