"""Norms and SwiGLU that hand the amax of what they write over to its quantizers (`fp4dist.numerics.handed`).

A quantizer that scales a tensor without a rotation reads it once to find its amax and once to quantize it. The function
that writes the tensor has its values in registers: here it also gives the amax of each row, and a short second function
that of all rows. It is the amax of the values as they are stored: rounding is monotone, so the largest magnitude is
rounded to the largest rounded one, and the rows' are stored in the same dtype; NaN stays NaN. Bits are those of a
quantizer that looks for itself.

    forward    norm -> x of qkv, of fc1 and of the head;  SwiGLU -> x of fc2
    backward   norm -> dY of proj and of fc2, whose outputs enter the residual stream;  SwiGLU -> dY of fc1

Handed over is what lies on this rank; a shard's quantizer reduces it over ranks as it reduces an amax of its own. What
is gathered (sequence parallelism), added up or padded on the way is another tensor, whose quantizer looks for itself.

T tokens of this rank, I hidden size, F width of the gated MLP.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fp4dist.megatron import fusions
from fp4dist.megatron.fusions import FusedResidualRMSNorm, FusedRMSNorm, run_fused
from fp4dist.megatron.upstream import MLP
from fp4dist.numerics.handed import hand_over


def rms_norm(x_TI: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `fusions.rms_norm` gives, and the amax of each row of y in its dtype [T]."""
    y_TI, rstd = fusions.rms_norm(x_TI, weight, eps)
    return y_TI, rstd, y_TI.abs().amax(-1)


def rms_norm_backward(
    dy_TI: Tensor, x_TI: Tensor, weight: Tensor, rstd: Tensor, residual_TI: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `fusions.rms_norm_backward` gives, and the amax of each row of dx in its dtype [T]."""
    dx_TI, dw = fusions.rms_norm_backward(dy_TI, x_TI, weight, rstd, residual_TI)
    return dx_TI, dw, dx_TI.abs().amax(-1)


def swiglu(x_T2F: Tensor) -> tuple[Tensor, Tensor]:
    """(silu(gate) * up [T, F] in x's dtype, the amax of each row [T]) of x = gate beside up; in fp32."""
    gate, up = x_T2F.float().chunk(2, -1)
    y_TF = (functional.silu(gate) * up).to(x_T2F.dtype)
    return y_TF, y_TF.abs().amax(-1)


def swiglu_backward(dy_TF: Tensor, x_T2F: Tensor) -> tuple[Tensor, Tensor]:
    """(dx [T, 2F] in x's dtype, the amax of each row [T]); in fp32."""
    gate, up = x_T2F.float().chunk(2, -1)
    dy, s = dy_TF.float(), torch.sigmoid(gate)
    dx_T2F = torch.cat([dy * up * s * (1 + gate * (1 - s)), dy * gate * s], -1).to(x_T2F.dtype)
    return dx_T2F, dx_T2F.abs().amax(-1)


def largest(rows_T: Tensor) -> Tensor:
    """[] fp32."""
    return rows_T.float().amax()


def _amax(rows_T: Tensor) -> Tensor | None:
    """[] fp32; None: an expert may be without tokens."""
    return run_fused(largest, rows_T) if rows_T.numel() else None


def _with(y: Tensor, amax: Tensor | None) -> Tensor:
    """`y`, which brings its amax."""
    return y if amax is None else hand_over(y, amax)


class _RmsNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x_TI = x.reshape(-1, x.shape[-1])
        y_TI, rstd, rows_T = run_fused(rms_norm, x_TI, weight, eps)
        ctx.save_for_backward(x_TI, weight, rstd)
        ctx.set_materialize_grads(False)
        amax = _amax(rows_T)
        ctx.mark_non_differentiable(*(() if amax is None else (amax,)))
        return y_TI.view(x.shape), x, amax  # handed over outside: autograd makes another tensor of a view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, residual: Tensor | None, _: None) -> tuple[Any, Any, None]:  # type: ignore[override]
        x_TI, weight, rstd = ctx.saved_tensors
        if dy is None:
            return residual, None, None
        residual = residual.reshape(x_TI.shape) if residual is not None else None
        dx, dw, rows_T = run_fused(rms_norm_backward, dy.reshape(x_TI.shape), x_TI, weight, rstd, residual)
        return _with(dx.view(dy.shape), _amax(rows_T)), dw, None


def normalized(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x [..., I] normalized, bringing its amax; x). The gradient of x brings its amax, too."""
    y, same, amax = _RmsNormFunction.apply(x, weight, eps)
    return _with(y, amax), same


class HandingRMSNorm(FusedRMSNorm):
    """FusedRMSNorm whose output, and whose input's gradient, bring their amax."""

    def forward(self, x: Tensor) -> Any:
        """Normalize x [..., hidden_size]; the result has x's shape and dtype."""
        return normalized(x, self.weight, self.eps)[0]


class HandingResidualRMSNorm(FusedResidualRMSNorm):
    """FusedResidualRMSNorm likewise: the gradient with the residual's added is what brings its amax."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(normalized x, x)."""
        return normalized(x, self.weight, self.eps)


class _SwigluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        x_T2F = x.reshape(-1, x.shape[-1])
        y_TF, rows_T = run_fused(swiglu, x_T2F)
        ctx.save_for_backward(x_T2F)
        amax = _amax(rows_T)
        ctx.mark_non_differentiable(*(() if amax is None else (amax,)))
        return y_TF.view(*x.shape[:-1], y_TF.shape[-1]), amax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: None) -> Tensor:  # type: ignore[override]
        (x_T2F,) = ctx.saved_tensors
        dx, rows_T = run_fused(swiglu_backward, dy.reshape(-1, dy.shape[-1]), x_T2F)
        return _with(dx.view(*dy.shape[:-1], dx.shape[-1]), _amax(rows_T))


def gated(x: Tensor) -> Tensor:
    """SwiGLU of x [..., 2F] -> [..., F], bringing its amax; so does the gradient of x."""
    return _with(*_SwigluFunction.apply(x))


class HandingMLP(MLP):
    """Megatron's MLP whose SwiGLU is ours: fc2's input and fc1's gradient bring their amax.

    What has biases, another activation, weights of tokens, clamps or copies on the host takes Megatron's way.
    """

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> Any:
        """As MLP.forward: [S, B, I] -> ([S, B, I], the bias that is left to others)."""
        unusual = [per_token_scale, *kwargs.values()]  # a layer passes padding_mask=None
        if any(given is not None for given in unusual) or not self._is_plain():
            return super().forward(hidden_states, per_token_scale, **kwargs)
        hidden, _ = cast(Any, self.linear_fc1)(hidden_states)
        return cast(Any, self.linear_fc2)(gated(hidden))

    def _is_plain(self) -> bool:
        config = self.config
        gated = config.gated_linear_unit and self.activation_func is functional.silu
        unusual = ("use_te_activation_func", "activation_func_fp8_input_store", "cpu_offloading", "add_bias_linear")
        clamps = getattr(config, "activation_func_clamp_value", None) is not None
        return gated and not clamps and not any(getattr(config, name, False) for name in unusual)


def take_over_mlps(model: nn.Module) -> None:
    """Make every MLP of Megatron's a HandingMLP, in place: layers that build theirs know it by its class. Subclasses
    (shared experts) stay.
    """
    for module in model.modules():
        if type(module) is MLP:
            module.__class__ = HandingMLP  # pyright: ignore[reportAttributeAccessIssue] (it adds no state)
