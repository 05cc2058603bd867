"""How gradients pass the quantizers of fprop: what forward keeps for that, and what backward does with it.

    dX = H^-1 (M_x * (H dX_q))     M the estimator's factor in the basis of the codes, H their rotation
    dW = H^-1 (M_w * (H dW_q))

M_x is kept from forward, one bit an element for a mask; M_w is made again from the weight, with the scales that its
codes have. Both act on one rank's part of the gradient: a partial sum, or the tokens that this rank holds. Where an
outlier has been taken out of the codes, an element passes as it is. Masks of codes alone have kernels of their own, one
pass over each tensor (`nn.passing`); everything else is torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.comm import LinearComm
from fp4dist.nn.passing import FILTER_W, FILTER_W_BITS, FILTER_X, MASK_X, SLOPES
from fp4dist.nn.plan import LinearPlan, Operand
from fp4dist.numerics.estimators import amax_direction, inside, pack_bits, rows, scaled, slope, unpack_bits
from fp4dist.numerics.rotation import filtered, rotate
from fp4dist.numerics.tensor import BlockScaledTensor, PartedTensor
from fp4dist.spec.estimators import Dge, Lsq, Straight, TrustMask
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.splits import Channels, HotResidual


def keep_x(plan: LinearPlan, comm: LinearComm, x: Tensor, operand: Operand) -> list[Tensor]:
    """What `pass_x` needs: the factor as packed bits, or in x's dtype; for lsq also d Q(x) / d log(amax).

    x         [..., I] this rank's input;  operand   quantized fprop.x, of these tokens or of all that a gather gave
    """
    spec = plan.spec("fprop.x")
    if spec is None or isinstance(spec.estimator, Straight):
        return []
    main, side = _parts(operand)
    x_TI = x.flatten(0, -2)
    if main.shape[0] != x_TI.shape[0]:
        mine = slice(comm.rank * len(x_TI), (comm.rank + 1) * len(x_TI))
        main, side = rows(main, mine.start, mine.stop), side[mine] if side is not None else None
    key = plan.clock.key(plan.number, "fprop.x")
    if main.inside is not None and isinstance(spec.estimator, TrustMask) and side is None:
        return [main.inside]
    if (mask := plan.kernels.get(MASK_X)) is not None:
        return [mask(x_TI, main.scales, main.global_scale, spec, key)]
    if isinstance(spec.outlier, Channels):
        x_TI = _without(x_TI, _channels(plan))
    u = scaled(x_TI, main.scales, main.global_scale, spec, key)
    beside = side != 0 if side is not None and not isinstance(spec.outlier, Channels | HotResidual) else None
    factor = _factor(plan, "fprop.x", u, spec, beside)
    if isinstance(spec.estimator, Dge):
        return [factor.to(x.dtype)]
    return [pack_bits(factor), *([amax_direction(u, main).to(x.dtype)] if isinstance(spec.estimator, Lsq) else [])]


def refuse_untrained(plan: LinearPlan) -> None:
    """For an input that needs no gradient: a learned amax of it would silently stay where it began."""
    spec = plan.spec("fprop.x")
    if spec is not None and isinstance(spec.estimator, Lsq):
        raise RecipeMismatch(
            f"{plan.path} fprop.x: amax = learned is trained by the gradient of the input, and this input needs none;"
            " give this layer to another LinearRecipe with a rule, or let its input require gradients"
        )


def pass_x(plan: LinearPlan, dx: Tensor, kept: list[Tensor]) -> Tensor:
    """[..., I] dX_q -> dX, in its dtype. kept: of `keep_x`, for the same tokens."""
    spec = plan.spec("fprop.x")
    if not kept or spec is None:
        return dx
    dx_TI = dx.flatten(0, -2)
    if (by_mask := plan.kernels.get(FILTER_X)) is not None:
        return by_mask(dx_TI, kept[0], spec.rotation, plan.clock.key(plan.number, "fprop.x")).view(dx.shape)
    if len(kept) == 2:
        _train_amax(plan, "fprop.x", spec, dx_TI, kept[1])
    factor = kept[0] if kept[0].is_floating_point() else unpack_bits(kept[0], dx_TI.shape[1])
    chosen = _channels(plan) if isinstance(spec.outlier, Channels | HotResidual) else None
    return _passed(plan, "fprop.x", spec, dx_TI, factor, chosen).to(dx.dtype).view(dx.shape)


def passes_late(comm: LinearComm) -> bool:
    """Whether X's factor acts behind the reduction of dX, because this rank holds that of its own tokens alone.

    Elsewhere it acts on the partial sums, whoever adds them later.
    """
    return comm.token_shard == "x" and comm.size > 1


def keep_w(plan: LinearPlan, operand: Operand) -> list[Tensor]:
    """What `pass_w` needs of the quantized fprop.w: its mask, where the quantizer wrote one, else its scales, where
    something stands beside the codes, its codes.
    """
    spec = plan.spec("fprop.w")
    if spec is None or isinstance(spec.estimator, Straight):
        return []
    main, side = _parts(operand)
    if main.inside is not None and isinstance(spec.estimator, TrustMask) and FILTER_W_BITS in plan.kernels:
        return [main.inside]
    kept = [main.scales, main.global_scale]
    if isinstance(spec.estimator, Lsq):
        return [*kept, main.codes]
    return [*kept, pack_bits(side != 0)] if side is not None and spec.outlier is not None else kept


def pass_w(
    plan: LinearPlan, dw: Tensor, weight: Tensor, kept: list[Tensor], into: Tensor | None = None,
    out: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """[O, I] dW_q -> dW, in its dtype, or where a kernel can in dtype `out`, or added to `into` (fp32), which then is
    returned. kept: of `keep_w`, in the forward pass with this `weight`.
    """
    spec = plan.spec("fprop.w")
    if not kept or spec is None:
        return dw
    if len(kept) == 1:
        key = plan.clock.key(plan.number, "fprop.w")
        named = {"into": into} if into is not None else {} if out is None else {"out": out}
        return plan.kernels[FILTER_W_BITS](dw, kept[0], spec.rotation, key, **named)
    key, x_spec = plan.clock.key(plan.number, "fprop.w"), plan.spec("fprop.x")
    chosen = _channels(plan) if x_spec is not None and isinstance(x_spec.outlier, Channels) else None
    if chosen is None and (by_scales := plan.kernels.get(FILTER_W)) is not None:
        return by_scales(dw, weight.detach(), kept[0], kept[1], spec, key)
    w = _without(weight.detach(), chosen)
    u = scaled(w, kept[0], kept[1], spec, key)
    if isinstance(spec.estimator, Lsq):
        size = spec.rotation.size if spec.rotation is not None else 1
        q = BlockScaledTensor(kept[2], kept[0], kept[1], spec.format, (u.shape[0], u.shape[1]), size)
        _train_amax(plan, "fprop.w", spec, dw, amax_direction(u, q))
    beside = unpack_bits(kept[2], u.shape[1]) if len(kept) == 3 and spec.outlier is not None else None
    return _passed(plan, "fprop.w", spec, dw, _factor(plan, "fprop.w", u, spec, beside), chosen).to(dw.dtype)


def _factor(plan: LinearPlan, slot: str, u: Tensor, spec: QuantSpec, beside: Tensor | None) -> Tensor:
    """[R, C] bool for a mask, fp32 for a slope; full where `beside` says that an element stands beside the codes."""
    if isinstance(spec.estimator, Dge):
        found = plan.kernels.get(SLOPES[slot], slope)(u, spec.format.element, spec.estimator)
        return found if beside is None else torch.where(beside, 1.0, found)
    mask = inside(u, spec.format.element)
    return mask if beside is None else mask | beside


def _passed(
    plan: LinearPlan, slot: str, spec: QuantSpec, gradient: Tensor, factor: Tensor, chosen: Tensor | None
) -> Tensor:
    """[R, C] fp32: the factor in the rotated basis, `chosen` columns [C] as they are."""
    found = filtered(gradient, factor.to(torch.float32), spec.rotation, plan.clock.key(plan.number, slot))
    return found if chosen is None else torch.where(chosen, gradient.to(torch.float32), found)


def _train_amax(plan: LinearPlan, slot: str, spec: QuantSpec, gradient: Tensor, direction: Tensor) -> None:
    """Give the slot's control this rank's part of dL / d log(amax): <dL/dQ, dQ/d log(amax)>."""
    g = gradient.to(torch.float32)
    if spec.rotation is not None:
        g = rotate(g, spec.rotation, plan.clock.key(plan.number, slot)) * spec.rotation.size**-0.5
    control = plan.controls[slot]
    control.recording = plan.training
    control.add_gradient((g.to(torch.float64) * direction.to(torch.float64)).sum())


def _channels(plan: LinearPlan) -> Tensor | None:
    """[I] bool: the input channels of this rank that the linear keeps beside its codes."""
    control = plan.controls.get("fprop.x")
    return control.channels if control is not None else None


def _without(x: Tensor, chosen: Tensor | None) -> Tensor:
    return x if chosen is None else torch.where(chosen, 0.0, x)


def _parts(operand: Operand) -> tuple[BlockScaledTensor, Tensor | None]:
    if isinstance(operand, PartedTensor):
        return operand.main, operand.side
    assert isinstance(operand, BlockScaledTensor)
    return operand, None
