"""The parts of a step between its GEMMs in few passes over memory: norm, RoPE, loss, by torch.compile on a GPU.

Without Transformer Engine and apex, Megatron-core runs these as trains of elementwise kernels. Here each is a pair of
plain functions (forward and backward, arithmetic in fp32, rounded once to the dtype of the activations) inside of an
autograd function, and torch.compile makes one or two kernels of each. The unfused form rounds every intermediate to
the activations' dtype, so in bf16 both agree within that rounding; in fp32 within the order of sums.

`choose` decides once, when a model is built, and the decision is logged: `train.fusions: auto` means all of them on a
GPU where torch.compile works and `train.deterministic` is off, else none. SwiGLU's fusion is Megatron's own
(`bias_activation_fusion`) and follows the same decision. `train.fusions: amax` is `auto` with norms and SwiGLU that
hand an amax over (`fp4dist.megatron.producers`); that has not been timed yet.

S sequence, B micro-batch, H query heads, G key/value groups, D width of a head, T = S * B tokens, V vocabulary of one
rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp4dist.errors import ConfigError
from fp4dist.megatron.norm import RMSNorm
from fp4dist.megatron.upstream import SelfAttention
from fp4dist.spec.run import RunConfig

log = logging.getLogger("fp4dist")
_SHAPES = 64  # of one function that torch.compile may make kernels for; its own limit of 8 is for changing programs
Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Fusions:
    """Which parts run fused, and why the others do not."""

    norm: bool = False
    rope: bool = False
    swiglu: bool = False
    loss: bool = False
    amax: bool = False  # norm and SwiGLU hand their results' amax over to quantizers (`fp4dist.megatron.producers`)
    reason: str = ""

    def describe(self) -> str:
        """For the log and layers.json."""
        on = [name for name in ("norm", "rope", "swiglu", "loss", "amax") if getattr(self, name)]
        return f"{', '.join(on) or 'none'}{f' ({self.reason})' if self.reason else ''}"


NONE = Fusions()


def choose(config: RunConfig) -> Fusions:
    """The fusions of a model of this configuration on this machine."""
    if config.train.fusions == "none":
        return Fusions(reason="train.fusions is none")
    if not torch.cuda.is_available():
        return Fusions(reason="there is no GPU")
    if config.train.deterministic:  # each process tunes its compiled sums by itself
        return Fusions(reason="train.deterministic")
    failure = _compiler_failure()
    if failure is not None:
        return Fusions(reason=f"torch.compile does not work here: {failure}")
    parallel = config.parallel
    rope = not config.model.qk_norm and config.model.query_groups >= parallel.tp  # else more lies between
    why = "" if rope else "RoPE's not under qk_norm, nor with fewer key/value groups than tensor-parallel ranks"
    return Fusions(norm=True, rope=rope, swiglu=True, loss=True, amax=config.train.fusions == "amax", reason=why)


@cache
def _compiler_failure() -> str | None:
    """Why torch.compile cannot make a GPU kernel here (no C compiler, no Triton ...), or None."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    try:
        _compiled(_probe)(torch.ones(8, device="cuda"))
    except RuntimeError as e:  # of which torch's compiler errors are kinds
        failure = str(e).strip().partition("\n")[0]
        log.warning("fusions: none, torch.compile does not work here: %s", failure)
        return failure
    return None


def _probe(x: Tensor) -> Tensor:
    return x * x + x


@cache
def _compiled(function: Function) -> Function:
    return torch.compile(function, fullgraph=True, dynamic=False)


def run_fused(function: Function, tensor: Tensor, *more: Any) -> Any:
    """function(tensor, ...), compiled if the tensor is on a GPU."""
    return (_compiled(function) if tensor.is_cuda else function)(tensor, *more)


# -- RMSNorm


def rms_norm(x_TI: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y in x's dtype, 1 / rms in fp32 [T, 1])."""
    x = x_TI.float()
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * rstd * weight.float()).to(x_TI.dtype), rstd


def rms_norm_backward(
    dy_TI: Tensor, x_TI: Tensor, weight: Tensor, rstd: Tensor, residual_TI: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dx, dw) in the dtypes of x and weight; dw is summed in fp32. residual: of x's other use, added to dx."""
    normed, dy = x_TI.float() * rstd, dy_TI.float()
    scaled = dy * weight.float()
    dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd
    if residual_TI is not None:
        dx = dx + residual_TI.float()
    return dx.to(x_TI.dtype), (dy * normed).sum(0).to(weight.dtype)


class _RmsNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_TI = x.reshape(-1, x.shape[-1])
        y_TI, rstd = run_fused(rms_norm, x_TI, weight, eps)
        ctx.save_for_backward(x_TI, weight, rstd)
        ctx.set_materialize_grads(False)
        return y_TI.view(x.shape), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, residual: Tensor | None) -> tuple[Any, Any, None]:  # type: ignore[override]
        x_TI, weight, rstd = ctx.saved_tensors
        if dy is None:
            return residual, None, None
        residual = residual.reshape(x_TI.shape) if residual is not None else None
        dx, dw = run_fused(rms_norm_backward, dy.reshape(x_TI.shape), x_TI, weight, rstd, residual)
        return dx.view(dy.shape), dw, None


class FusedRMSNorm(RMSNorm):
    """RMSNorm in one kernel forward and one backward; the same parameters and state as RMSNorm."""

    def forward(self, x: Tensor) -> Any:
        """Normalize x [..., hidden_size]; the result has x's shape and dtype."""
        return _RmsNormFunction.apply(x, self.weight, self.eps)[0]


class FusedResidualRMSNorm(FusedRMSNorm):
    """FusedRMSNorm that returns its input too, for the residual connection: backward adds that gradient in its kernel.

    TransformerLayer of megatron-core 0.17 and later takes such a pair.
    """

    returns_residual = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(normalized x, x)."""
        return cast("tuple[Tensor, Tensor]", _RmsNormFunction.apply(x, self.weight, self.eps))


# -- RoPE


def turn(t: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Rotate the pairs (d, d + D/2) of t [S, B, H, D] by the angles of their position; in fp32."""
    cos, sin = cos_SD.float()[:, None, None], sin_SD.float()[:, None, None]
    first, second = t.float().chunk(2, -1)
    return t.float() * cos + torch.cat([-second, first], -1) * sin


def turn_back(t: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """The transposed map of `turn`, which gradients take; in fp32."""
    cos, sin = cos_SD.float()[:, None, None], sin_SD.float()[:, None, None]
    first, second = (t.float() * sin).chunk(2, -1)
    return t.float() * cos + torch.cat([second, -first], -1)


def rotate(qkv_SBGX: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> tuple[Tensor, Tensor]:
    """(query [S, B, H, D], key [S, B, G, D]), rotated, from each group's queries, key and value in a row."""
    S, B, G, X = qkv_SBGX.shape
    D = cos_SD.shape[-1]
    query = qkv_SBGX[..., : X - 2 * D].reshape(S, B, G * (X // D - 2), D)
    key = qkv_SBGX[..., X - 2 * D : X - D]
    return tuple(turn(t, cos_SD, sin_SD).to(qkv_SBGX.dtype) for t in (query, key))  # type: ignore[return-value]


def rotate_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """The gradient [S, B, G, X] of what `rotate` and the value were taken from."""
    S, B, G, _ = dk.shape
    dq_SBGX = turn_back(dq, cos_SD, sin_SD).reshape(S, B, G, -1)
    return torch.cat([dq_SBGX, turn_back(dk, cos_SD, sin_SD), dv.float()], -1).to(dq.dtype)


class _RotateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_SBGX: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(cos_SD, sin_SD)
        query, key = run_fused(rotate, qkv_SBGX, cos_SD, sin_SD)
        return query, key, qkv_SBGX[..., -cos_SD.shape[-1] :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return run_fused(rotate_backward, dq, dk, dv, *ctx.saved_tensors), None, None


class FusedRopeAttention(SelfAttention):
    """Megatron's self-attention with the split of qkv and RoPE in one kernel, and their gradients in another.

    For models of `build_gpt`, whose heads are rotated whole, without query/key norms. Generation and packed sequences
    take Megatron's way.
    """

    _angles: Tensor | None = None  # [S, 1, 1, D], of this forward pass
    _tables: tuple[Tensor, Tensor, Tensor] | None = None  # those angles, their cosines and sines [S, D]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As SelfAttention.forward, which must be given `rotary_pos_emb` by keyword, as TransformerLayer does."""
        angles = kwargs.get("rotary_pos_emb")
        unusual = ("inference_context", "inference_params", "packed_seq_params", "key_value_states")
        if not isinstance(angles, Tensor) or any(kwargs.get(name) is not None for name in unusual):
            return super().forward(hidden_states, *args, **kwargs)
        self._angles = angles
        try:
            return super().forward(hidden_states, *args, **kwargs | {"rotary_pos_emb": None})
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(query, key, value), each [S, B, heads, D]; query and key hold their positions already."""
        if self._angles is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        qkv, _ = cast(Function, self.linear_qkv)(hidden_states)
        cos_SD, sin_SD = self._cos_sin(self._angles, qkv.dtype)
        if cos_SD.shape[-1] != self.hidden_size_per_attention_head:
            raise ConfigError(
                f"rotary embeddings turn {cos_SD.shape[-1]} of {self.hidden_size_per_attention_head} channels of a"
                " head; the fused form turns whole heads: set train.fusions to none"
            )
        grouped = qkv.view(*qkv.shape[:2], self.num_query_groups_per_partition, -1)
        return _RotateFunction.apply(grouped, cos_SD, sin_SD)

    def _cos_sin(self, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tables in the activations' dtype, as Megatron rounds them; kept while Megatron gives the same angles."""
        if self._tables is None or self._tables[0] is not angles or self._tables[1].dtype != dtype:
            flat = angles.flatten(0, -2)
            self._tables = angles, torch.cos(flat).to(dtype), torch.sin(flat).to(dtype)
        return self._tables[1], self._tables[2]


# -- the loss


def token_loss(logits_TV: Tensor, labels_T: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(log of the sum of exponentials, logit of the label or 0 where another rank has it), fp32 [T].

    first   number of the first vocabulary entry of this rank
    """
    logits = logits_TV.float()
    local = labels_T - first
    here = (local >= 0) & (local < logits_TV.shape[1])
    picked = logits.gather(1, local.where(here, 0)[:, None])[:, 0]
    return torch.logsumexp(logits, -1), picked.where(here, 0.0)


def token_loss_backward(logits_TV: Tensor, total_T: Tensor, labels_T: Tensor, dy_T: Tensor, first: int) -> Tensor:
    """(softmax - one-hot) * dy in the logits' dtype."""
    entries = torch.arange(logits_TV.shape[1], device=logits_TV.device) + first
    softmax = (logits_TV.float() - total_T[:, None]).exp()
    return ((softmax - (entries == labels_T[:, None]).float()) * dy_T[:, None]).to(logits_TV.dtype)


class _LossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        first = logits_TV.shape[1] * rank
        total, picked = run_fused(token_loss, logits_TV, labels_T, first)
        if size > 1:
            largest = total.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([(total - largest).exp(), picked])
            dist.all_reduce(sums, group=group)
            total, picked = largest + sums[0].log(), sums[1]
        ctx.first = first
        ctx.save_for_backward(logits_TV, total, labels_T)
        return total - picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_T: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return run_fused(token_loss_backward, *ctx.saved_tensors, dy_T, ctx.first), None, None


def fused_loss(logits_SBV: Tensor, labels_BS: Tensor, group: Any) -> Tensor:
    """Cross-entropy of each token, fp32 [B, S], over a vocabulary that the ranks of `group` share; None: one rank's.

    What backward keeps is the logits in their own dtype and one fp32 number a token; Megatron's form keeps the softmax
    in fp32.
    """
    S, B, V = logits_SBV.shape
    labels_T = labels_BS.t().reshape(-1)
    loss_T = _LossFunction.apply(logits_SBV.reshape(-1, V), labels_T, group)
    return cast(Tensor, loss_T).view(S, B).t().contiguous()
