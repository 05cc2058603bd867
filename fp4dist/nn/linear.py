"""Fp4Linear and Fp4Conv1D: the linears of plain torch and of Hugging Face's GPT-2 under a LinearPlan.

`convert` changes a module's class in place instead of building another module: parameters, hooks, mode, the references
that optimizers, FSDP2 and DDP hold, and the names in a state_dict all stay; `revert` changes it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.comm import LinearComm, NoComm
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.plan import LinearPlan
from fp4dist.spec.recipe import GEMMS

P = ParamSpec("P")
R = TypeVar("R")
_BEFORE = "_class_before_fp4"  # where a converted module remembers its own class
DTYPES = (torch.bfloat16, torch.float32)  # of what is quantized


def _eager(function: Callable[P, R]) -> Callable[P, R]:
    """What reads the clock and counts GEMMs must not be traced: a compiled model breaks its graph there."""
    return cast(Callable[P, R], torch.compiler.disable(function))


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

    def _replicate_for_data_parallel(self) -> Fp4Linear:
        raise _no_replicas()

    @_eager
    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        if self.plan is None:
            return super().forward(input)
        return _planned(input, self.weight, self.bias, self.plan, self.comm)


class Fp4Conv1D(nn.Module):
    """Hugging Face's `Conv1D` (GPT-2 and its kin) under a plan: a linear whose weight is stored as [I, O].

    Only `convert` makes one, from a Conv1D; without a plan it computes what that computes.
    """

    plan: LinearPlan | None = None
    comm: LinearComm = NoComm()
    weight: Tensor
    bias: Tensor

    def set_plan(self, plan: LinearPlan | None) -> None:
        """Run under `plan` from now on; None is Conv1D again."""
        self.plan = plan

    def global_features(self) -> tuple[int, int]:
        """(in, out)."""
        return self.weight.shape[0], self.weight.shape[1]

    def _replicate_for_data_parallel(self) -> Fp4Conv1D:
        raise _no_replicas()

    @_eager
    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        if self.plan is None:
            return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return _planned(x, self.weight.t(), self.bias, self.plan, self.comm)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is Hugging Face's Conv1D, told without importing transformers."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def convert(module: nn.Module, path: str) -> Fp4Linear | Fp4Conv1D:
    """Turn a torch.nn.Linear or Hugging Face Conv1D into its FP4 class, in place; without a plan it computes as before.

    path     the module's name, for the RecipeMismatch where its forward is not the one that would be replaced
    """
    if "forward" in module.__dict__:
        raise RecipeMismatch(
            f"{path} has a forward of its own, set on the module (accelerate's hooks do that), which would bypass FP4;"
            " apply the recipe first, or give this layer to bf16 with a rule"
        )
    if type(module) is not nn.Linear and not is_conv1d(module):
        sharded = type(module).__name__.startswith("FSDP")
        way_out = "apply the recipe before fully_shard" if sharded else "make it a plain Linear"
        raise RecipeMismatch(
            f"{path} is a {type(module).__name__}, a subclass of torch.nn.Linear whose forward fp4dist would replace;"
            f" {way_out}, or give it to bf16 with a rule"
        )
    module.__dict__[_BEFORE] = type(module)
    _become(module, Fp4Linear if isinstance(module, nn.Linear) else Fp4Conv1D)
    assert isinstance(module, Fp4Linear | Fp4Conv1D)
    return module


def revert(module: nn.Module) -> bool:
    """Give a converted module its own class back and drop its plan; False for a module that `convert` has not made."""
    before = module.__dict__.get(_BEFORE)
    if before is None or not isinstance(module, Fp4Linear | Fp4Conv1D):
        return False
    for name in (_BEFORE, "plan"):
        module.__dict__.pop(name, None)
    _become(module, before)
    return True


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls  # pyright: ignore[reportAttributeAccessIssue] (the layouts are those of nn.Module)


def _no_replicas() -> RecipeMismatch:
    """What torch's DataParallel would do: threads of one process on several GPUs, with one plan for all."""
    return RecipeMismatch(
        "torch.nn.DataParallel copies the model into threads, which would share counters, kernels and noise of FP4"
        " linears; use torch.nn.parallel.DistributedDataParallel, one process a GPU (torchrun)"
    )


def check_dtype(dtype: torch.dtype, what: str) -> None:
    """Raise RecipeMismatch for a dtype that nothing here quantizes, such as fp16. what: whose, for the message"""
    if dtype not in DTYPES:
        raise RecipeMismatch(
            f"{what} is {str(dtype).removeprefix('torch.')}, and FP4 linears take bf16 and fp32; use"
            " model.to(torch.bfloat16), autocast to torch.bfloat16, or give this layer to bf16 with a rule"
        )


def _check_place(x: Tensor, weight: Tensor, plan: LinearPlan) -> None:
    """Kernels were chosen for one device, and quantize two dtypes: nothing else may run slowly or wrongly instead."""
    if plan.device is not None and x.device != plan.device:
        raise RecipeMismatch(
            f"{plan.path}: its kernels were chosen for {plan.device}, and its input is on {x.device}; move the model"
            " before apply_recipe, or before the first set_step, which chooses them anew"
        )
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:  # no text is made at every call
        check_dtype(x.dtype, f"{plan.path}: its input")
        check_dtype(weight.dtype, f"{plan.path}: its weight")


def _planned(x: Tensor, weight: Tensor, bias: Tensor | None, plan: LinearPlan, comm: LinearComm) -> Tensor:
    """[..., I], weight [O, I] -> [..., O], in x's dtype or autocast's."""
    if hasattr(weight, "placements"):
        raise RecipeMismatch(
            f"{plan.path}: its weight is a DTensor in forward, as tensor parallelism by parallelize_module leaves it;"
            " fp4dist needs the whole weight (DDP, fully_shard) or Megatron's tensor parallelism"
        )
    if torch.is_autocast_enabled(x.device.type):  # as torch.nn.functional.linear does
        x = x.to(torch.get_autocast_dtype(x.device.type))
    _check_place(x, weight, plan)
    if not x.numel():  # no tokens, such as an expert's that nobody chose: nothing to quantize
        plan.tally.unneeded.update(GEMMS if torch.is_grad_enabled() else ())
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
    y = fp4_linear(x, weight, plan, comm) if x.dim() > 1 else fp4_linear(x[None], weight, plan, comm)[0]
    return y if bias is None else y + bias.to(y.dtype)
