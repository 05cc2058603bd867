"""RMSNorm and LayerNorm for Megatron's layer specs that work with sequence parallelism, without TE or apex.

Megatron's own fallback (WrappedTorchNorm) refuses sequence parallelism. All it takes is a mark on the weights: with
sequence parallelism each tensor-parallel rank normalizes a part of the tokens, so a weight's gradient is a partial
sum, and Megatron's finalize_model_grads adds up the gradients of the weights that carry `sequence_parallel`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fp4dist.errors import ConfigError
from fp4dist.megatron.upstream import TransformerConfig, transformer_engine


class _MarkedNorm(nn.Module):
    """What the two share: built as Megatron builds norms, (config=, hidden_size=, eps=), refused for another kind.

    Parameters are vectors [hidden_size] in config.params_dtype, replicated over tensor-parallel ranks, as Megatron's
    default sharded_state_dict assumes.
    """

    kind: ClassVar[str]  # config.normalization
    weight: nn.Parameter
    returns_residual = False  # since 0.17 TransformerLayer asks whether a norm also returns its input

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str | None = None,
    ) -> None:
        super().__init__()
        if config.normalization != self.kind or normalization not in (None, self.kind):
            raise ConfigError(
                f"normalization = {config.normalization!r}: this class computes {self.kind} only;"
                f" set TransformerConfig.normalization to {self.kind!r} or build fp4dist.megatron.norm.Norm"
            )
        if config.layernorm_zero_centered_gamma or zero_centered_gamma:
            raise ConfigError(
                "layernorm_zero_centered_gamma = True: this norm multiplies by its weight, not by 1 + weight;"
                " set it to False"
            )
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight = _parameter(torch.ones, config, hidden_size)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.hidden_size}, eps={self.eps}"


class RMSNorm(_MarkedNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, by torch.nn.functional.rms_norm (fused on GPUs).

    The state is one key, `weight`.
    """

    kind = "RMSNorm"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., hidden_size]; the result has x's shape and dtype."""
        return nn.functional.rms_norm(x, (self.hidden_size,), self.weight, self.eps)


class LayerNorm(_MarkedNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension, by torch's fused layer_norm.

    The state is `weight` and `bias`.
    """

    kind = "LayerNorm"
    bias: nn.Parameter

    def __init__(self, config: TransformerConfig, hidden_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, hidden_size, *args, **kwargs)
        self.bias = _parameter(torch.zeros, config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., hidden_size]; the result has x's shape and dtype."""
        return nn.functional.layer_norm(x, (self.hidden_size,), self.weight, self.bias, self.eps)


class Norm:
    """The norm that config.normalization asks for; `Norm(config=, hidden_size=, eps=)` is an RMSNorm or a LayerNorm."""

    def __new__(  # type: ignore[misc] - a choice of class, as Megatron's WrappedTorchNorm is
        cls,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> RMSNorm | LayerNorm:
        """Build it; raises ConfigError for another normalization."""
        kinds: dict[str, type[RMSNorm] | type[LayerNorm]] = {norm.kind: norm for norm in (RMSNorm, LayerNorm)}
        if config.normalization not in kinds:
            raise ConfigError(
                f"normalization = {config.normalization!r}: fp4dist.megatron builds {' and '.join(kinds)};"
                " set TransformerConfig.normalization to one of them"
            )
        return kinds[config.normalization](config, hidden_size, eps, zero_centered_gamma=zero_centered_gamma)


def fused_norm() -> type:
    """The norm for stock models on this machine: Transformer Engine's on a GPU when installed, else `Norm`."""
    engine = transformer_engine()
    return Norm if engine is None else engine.TENorm


def _parameter(fill: Callable[..., Tensor], config: TransformerConfig, size: int) -> nn.Parameter:
    """A vector where Megatron would allocate it, marked for finalize_model_grads."""
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    parameter = nn.Parameter(fill(size, dtype=config.params_dtype, device=device))
    setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - a mark on a tensor
    return parameter
