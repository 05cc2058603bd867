"""Megatron-LM's dataloader sends a [B, 1, S, S] mask that says "causal": without it attention is several times faster.

torch's flash and cuDNN attention take no mask tensor. Whether a mask is plainly causal is a question of its values; on
a GPU the answer would stop the host at every micro-batch, so there it is asked for once a step, one step late.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fp4dist.errors import ConfigError


@dataclass(slots=True)
class CausalMasks:
    """Replaces plainly causal masks by None, which SdpaAttention takes for causal attention.

    cp_rank, cp_size   context parallelism: this rank holds the sequence's chunks cp_rank and 2 * cp_size - 1 - cp_rank
                       of 2 * cp_size, hence those rows of the mask
    """

    cp_rank: int = 0
    cp_size: int = 1
    _causal: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)
    _wrong: Tensor | None = None

    def reduce(self, mask: Tensor | None) -> Tensor | None:
        """Return what attention needs of `mask`.

        mask      bool [B or 1, 1, S / cp, S], True where a query must not look; None stays None
        returns   None for a causal mask. On the CPU any other mask comes back as it is; on a GPU None, and `check`
                  raises. Masks of other shapes (one key, padding) come back as they are
        """
        if mask is None or mask.dim() != 4 or mask.dtype != torch.bool:
            return mask
        if mask.shape[1] != 1 or mask.shape[2] * self.cp_size != mask.shape[3] or mask.shape[3] % (2 * self.cp_size):
            return mask
        differs = (mask != self._rows(mask.shape[3], mask.device)).any()
        if mask.device.type == "cpu":
            return mask if differs else None
        self._wrong = differs if self._wrong is None else self._wrong | differs
        return None

    def check(self) -> None:
        """Raise ConfigError if a mask that `reduce` took away since the last call was not causal."""
        wrong, self._wrong = self._wrong, None
        if wrong is not None and bool(wrong):
            raise ConfigError(
                "attention_mask: the batches' masks are not plainly causal, but --reset-attention-mask is not given, so"
                " fp4dist ran causal attention in the last step; use install(..., keep_masks=True)"
            )

    def _rows(self, size: int, device: torch.device) -> Tensor:
        """This rank's rows of the causal mask, [S / cp, S]."""
        if (size, device) not in self._causal:
            columns = torch.arange(size, device=device)
            chunks = columns.chunk(2 * self.cp_size)
            rows = torch.cat([chunks[self.cp_rank], chunks[2 * self.cp_size - 1 - self.cp_rank]])
            self._causal[size, device] = columns[None, :] > rows[:, None]
        return self._causal[size, device]
