"""The precision of master weights and moments from step to step: rounded after each update, held in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4dist.nn.shards import Part, Shard, ShardMap
from fp4dist.spec.training import StateFormat

_SCALED = {"fp16": torch.float16, "e4m3": torch.float8_e4m3fn}
_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_parts(shards: ShardMap) -> list[Part]:
    """The part that rounds the state, where the recipe or one of its phases asks for it."""
    return [OptimizerStatePart(shards)] if shards.applied.recipe.rounds_optimizer_state else []


class OptimizerStatePart(Part):
    """`spec.training.OptimizerState` of the phase that runs. It keeps nothing itself."""

    key = "optimizer_state"

    def after_update(self, step: int) -> None:
        """Round what this step has changed, before the model's weights are made from it."""
        asked = self.shards.applied.optimizer_state
        if asked is None:
            return
        if asked.master == "bf16":
            for tensor in self.shards.shards:
                tensor.copy_(tensor.bfloat16())
        for name in _MOMENTS:
            self._round(name, getattr(asked, name))

    def _round(self, name: str, to: StateFormat) -> None:
        """Round one moment of all tensors; a scale is that of the logical tensor, from its largest value anywhere."""
        if to == "fp32":
            return
        held = self._held(name)
        if to == "bf16":
            for _, value in held:
                value.copy_(value.bfloat16())
            return
        peaks = torch._foreach_norm([v for _, v in held], float("inf")) if held else []
        peak = self.shards.largest([(s, p) for (s, _), p in zip(held, peaks, strict=True)], empty=0.0)
        exponent = scale_exponent(peak, _SCALED[to])
        for shard, value in held:
            value.copy_(round_scaled(value, exponent[self.shards.index[shard.name]], _SCALED[to]))

    def _held(self, name: str) -> list[tuple[Shard, Tensor]]:
        states = ((shard, self.shards.state(t).get(name)) for t, shard in self.shards.shards.items())
        return [(shard, value) for shard, value in states if value is not None and value.numel() > 0]


def scale_exponent(peak: Tensor, to: torch.dtype) -> Tensor:
    """Exponent e of the largest power of two 2^e that keeps `peak` 2^e within `to`'s range; 0 for a tensor of zeros.

    peak      fp64, not negative, of any shape
    returns   int32; bounded so that 2^e and 2^-e are normal in fp32
    """
    ratio = torch.finfo(to).max / torch.where(peak > 0, peak, 1.0)
    exponent = torch.frexp(ratio).exponent - 1  # floor(log2(ratio))
    return torch.where((peak > 0) & peak.isfinite(), exponent, 0).clamp(-126, 126).to(torch.int32)


def round_scaled(value: Tensor, exponent: Tensor, to: torch.dtype) -> Tensor:
    """fp32 `value` to the nearest (ties to even) that `to` holds under the scale 2^exponent, as fp32 again."""
    up = torch.ldexp(torch.ones((), device=value.device), exponent)
    return (value * up).to(to).float() * up.reciprocal()
