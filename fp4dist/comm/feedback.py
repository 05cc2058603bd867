"""Error feedback for gradients: what a message has lost goes out with the next one of the same bucket.

    ef     z = g + e,  send Q(z),  e <- z - Q(z)
    loco   z = g + e,  send Q(z),  e <- beta e + (1 - beta) (z - Q(z)), forgotten every `reset` steps

e is kept for everything that this rank sends: 4 bytes for each of its unsharded coded gradients. It belongs to the
rank: a checkpoint holds it for each, and another layout starts without.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fp4dist.spec.communication import CommConfig


class Feedback:
    """The errors of this rank's buckets."""

    def __init__(self, config: CommConfig) -> None:
        self.kind, self._loco = config.error_feedback, config.loco
        self.errors: dict[str, Tensor] = {}

    @property
    def on(self) -> bool:
        """Whether anything is kept."""
        return self.kind != "none"

    def error(self, what: str, numel: int, device: torch.device) -> Tensor:
        """[numel] fp32: what the last message of bucket `what` lost."""
        kept = self.errors.get(what)
        if kept is None or kept.numel() != numel:
            kept = self.errors[what] = torch.zeros(numel, device=device)
        elif kept.device != device:
            kept = self.errors[what] = kept.to(device)
        return kept

    def keep(self, what: str, lost: Tensor) -> None:
        """Take z - Q(z) of a message; what is not finite is forgotten."""
        error = self.errors[what]
        lost = lost.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if self.kind == "loco":
            beta = torch.tensor(self._loco.beta, device=error.device)
            error.mul_(beta).add_(lost * (1 - beta))
        else:
            error.copy_(lost)

    def drop(self, what: str) -> None:
        """Bucket `what` no longer loses anything."""
        self.errors.pop(what, None)

    def forget(self) -> None:
        """After a step that was not taken."""
        for error in self.errors.values():
            error.zero_()

    def close_step(self, step: int) -> None:
        """LoCo's periodic reset."""
        if self.kind == "loco" and (step + 1) % self._loco.reset == 0:
            self.forget()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's errors."""
        return {what: error.detach().cpu().clone() for what, error in self.errors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back, where any are kept."""
        if self.on:
            self.errors = {what: error.clone() for what, error in state.items()}

    def report(self, coded: int) -> list[str]:
        """A line on memory, if any is used: `coded` gradients of this rank are."""
        if not self.on:
            return []
        return [f"error feedback ({self.kind}): {4 * coded / 2**20:,.1f} MiB on this rank, 4 bytes a coded gradient"]
