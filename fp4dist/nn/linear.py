"""Fp4Linear: torch.nn.Linear under a LinearPlan, for models outside Megatron."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp4dist.nn.comm import LinearComm, NoComm
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.plan import LinearPlan


class Fp4Linear(nn.Linear):
    """Y = X W^T + b with quantized GEMMs.

    Without a plan it is exactly torch.nn.Linear; `apply_recipe` gives it one. The bias is added in x's dtype.
    """

    plan: LinearPlan | None = None
    comm: LinearComm = NoComm()

    @classmethod
    def of(cls, linear: nn.Linear) -> Fp4Linear:
        """An Fp4Linear with `linear`'s own parameters, hooks and mode: optimizers that hold them keep working."""
        made = cls.__new__(cls)
        made.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in linear.__dict__.items()})
        return made

    def set_plan(self, plan: LinearPlan | None) -> None:
        """Run under `plan` from now on; None is torch.nn.Linear again."""
        self.plan = plan

    def global_features(self) -> tuple[int, int]:
        """(in, out)."""
        return self.in_features, self.out_features

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        if self.plan is None:
            return super().forward(input)
        if torch.is_autocast_enabled(input.device.type):  # as torch.nn.functional.linear does
            input = input.to(torch.get_autocast_dtype(input.device.type))
        y = fp4_linear(input, self.weight, self.plan, self.comm)
        bias: Tensor | None = self.bias
        return y if bias is None else y + bias.to(y.dtype)
