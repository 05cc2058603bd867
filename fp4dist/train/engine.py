"""What the training loop asks of an engine: who owns gradients and optimizer state is the engine's affair.

Both engines run the same micro-batches in the same order, take the loss as the mean over a micro-batch's tokens and
average gradients over micro-batches and data-parallel ranks, so that in fp32 they give the same losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.train.data import Batch


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step of the whole job, equal on every rank.

    loss        mean over the tokens of the global batch
    grad_norm   global L2 norm before clipping
    skipped     loss or gradient was not finite: weights, moments and master weights are as before
    tokens      tokens of the global batch that counted in the loss
    lr          learning rate of this step
    """

    loss: float
    grad_norm: float
    skipped: bool
    tokens: int
    lr: float


class Engine(Protocol):
    """A model with its optimizer, ready to train."""

    optimizer_name: str

    def train_step(self, step: int, batches: Iterator[Batch]) -> StepResult:
        """Run optimizer step number `step` (from 1) on this rank's next micro-batches."""
        ...

    def evaluate(self, batches: Iterator[Batch]) -> float:
        """Mean loss over the tokens of `batches` on all ranks, without gradients."""
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of model, optimizer and random states into the empty `folder`."""
        ...

    def load(self, folder: Path, *, step: int, same_layout: bool) -> None:
        """Read what `save` wrote.

        step          steps that the saved state has behind it; places the learning-rate schedule
        same_layout   written with this run's tensor- and pipeline-parallel sizes: random states are restored too
        """
        ...

    def close(self) -> None:
        """Release hooks and process groups that the engine made."""
        ...


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on `device`."""
    return Batch(*(getattr(batch, f.name).to(device, non_blocking=True) for f in fields(Batch)))


def masked_mean(loss_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """(mean loss over the tokens that count, [loss sum, token count] in fp64, detached).

    loss_BS   [B, S] per-token loss in fp32;  mask_BS   [B, S] 1 where a token counts
    """
    total, count = (loss_BS * mask_BS).sum(), mask_BS.sum()
    sums = torch.stack([total.detach().double(), count.double()])
    return total / count.clamp(min=1), sums


def global_mean(sums: Tensor, group: dist.ProcessGroup) -> tuple[float, int]:
    """(mean loss, tokens) of [loss sum, token count] summed over `group`; a NaN on one rank is a NaN on all."""
    dist.all_reduce(sums, group=group)
    total, count = sums.tolist()
    return total / max(count, 1.0), round(count)


def finite(*values: float) -> bool:
    """Whether all values are finite."""
    return all(math.isfinite(v) for v in values)
