"""What the training loop asks of an engine: who owns gradients and optimizer state is the engine's affair.

Both engines run the same micro-batches in the same order, take the loss as the mean over a micro-batch's tokens and
average gradients over micro-batches and data-parallel ranks, so that in fp32 they give the same losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp4dist.comm.compression import Compression, StepTraffic
from fp4dist.megatron.upstream import parallel_state
from fp4dist.nn.triage import Triage
from fp4dist.train.data import Batch

Watching = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step of the whole job, equal on every rank.

    loss        mean over the tokens of the global batch
    grad_norm   global L2 norm before clipping
    skipped     loss or gradient was not finite, or `inexact`: weights, moments and master weights are as before
    tokens      tokens of the global batch that counted in the loss
    lr          learning rate of this step
    lost        elements that FP8 carriers could not hold (`AppliedRecipe.lost`)
    inexact     skipped for those alone (backend.strict_exact)
    traffic     what a `comm:` section has sent in this step
    refused     skipped because `Engine.judge` said so
    """

    loss: float
    grad_norm: float
    skipped: bool
    tokens: int
    lr: float
    lost: int = 0
    inexact: bool = False
    traffic: StepTraffic | None = None
    refused: bool = False


class Engine(Protocol):
    """A model with its optimizer, ready to train."""

    optimizer_name: str
    compression: Compression | None  # of the run's `comm:` section
    judge: Callable[[float, float | None], bool] | None  # (loss, gradient norm if known): whether to skip a finite step

    def train_step(self, step: int, batches: Iterator[Batch]) -> StepResult:
        """Run optimizer step number `step` (from 1) on this rank's next micro-batches."""
        ...

    def evaluate(self, batches: Iterator[Batch]) -> float:
        """Mean loss over the tokens of `batches` on all ranks, without gradients."""
        ...

    def retrace(self, batches: Iterator[Batch]) -> Triage:
        """Run the micro-batches of a step that was skipped once more and tell where this rank's first value that is not
        finite appears; nothing is updated. The clock must show that step.
        """
        ...

    def probe(self, batches: Iterator[Batch]) -> float:
        """|g| / |g_q - g| on one micro-batch, the first of `batches`, run with high-precision and with quantized
        backward operands; equal on every rank, nothing is updated. The clock must show the step that comes next.
        """
        ...

    def observe(self, batches: Iterator[Batch], watching: Watching, noise: bool) -> float | None:
        """`watching()` around the quantized passes of one micro-batch, the first of `batches`, run aside; nothing is
        updated. Returns what `probe` does; None without `noise`, and from an engine that runs forward passes alone.
        """
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


def replicas() -> dist.ProcessGroup:
    """The ranks that train on different samples (or, with context parallelism, parts of samples)."""
    return cast(dist.ProcessGroup, parallel_state.get_data_parallel_group(with_context_parallel=True))


def sequence_parts() -> dist.ProcessGroup | None:
    """The ranks that hold the parts of the same samples (context parallelism); None where samples are whole."""
    group = cast(dist.ProcessGroup, parallel_state.get_context_parallel_group())
    return group if dist.get_world_size(group) > 1 else None


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on `device`, for the kernels that are launched after this call.

    A copy from pageable memory would wait until the device has done all that was launched before; one from pinned
    memory takes its turn among the kernels.
    """
    tensors = [getattr(batch, f.name) for f in fields(Batch)]
    if device.type == "cuda":
        tensors = [t.pin_memory() for t in tensors]
    return Batch(*(t.to(device, non_blocking=True) for t in tensors))


class OnItsWay:
    """A number on the device that the host will want: `value` waits for it, and not for what is launched after it."""

    def __init__(self, number: Tensor | float) -> None:
        self._host, self._copied = number, None
        if isinstance(number, Tensor) and number.is_cuda:
            self._host = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def value(self) -> float:
        """The number."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._host)


def masked_mean(loss_BS: Tensor, mask_BS: Tensor, parts: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """(mean loss over the tokens that count, [loss sum, token count] in fp64, detached).

    loss_BS   [B, S] per-token loss in fp32;  mask_BS   [B, S] 1 where a token counts
    parts     ranks that hold the other parts of these samples (`sequence_parts`): the mean is this rank's share of the
              mean over all parts, their sum is the whole; the sums are this rank's
    """
    total, count = (loss_BS * mask_BS).sum(), mask_BS.sum()
    sums = torch.stack([total.detach().double(), count.double()])
    if parts is not None:
        dist.all_reduce(count, group=parts)
    return total / count.clamp(min=1), sums


def global_mean(sums: Tensor, group: dist.ProcessGroup) -> tuple[float, int]:
    """(mean loss, tokens) of [loss sum, token count] summed over `group`; a NaN on one rank is a NaN on all."""
    dist.all_reduce(sums, group=group)
    total, count = sums.tolist()
    return total / max(count, 1.0), round(count)


class ReplicaWatch:
    """Looks for non-finite gradients where a global norm does not look: at the copies of replicated parameters.

    A gradient norm counts each parameter once, so on all tensor-parallel ranks but the first it leaves replicated
    parameters out; a copy that went bad alone would be updated unseen. The model must not be wrapped yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._bad: Tensor | None = None
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            return
        for parameter in model.parameters():
            if not getattr(parameter, "tensor_model_parallel", False):
                parameter.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        bad = ~gradient.isfinite().all()
        self._bad = bad if self._bad is None else self._bad | bad

    def found_bad(self) -> bool:
        """Whether this rank saw one since the last call."""
        found = self._bad is not None and bool(self._bad.item())
        self._bad = None
        return found


def finite(*values: float) -> bool:
    """Whether all values are finite."""
    return all(math.isfinite(v) for v in values)
