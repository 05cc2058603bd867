"""RMSNorm for Megatron's layer specs that also works with sequence parallelism, without Transformer Engine or apex.

Megatron's own fallback (WrappedTorchNorm) refuses sequence parallelism. All it takes is a mark on the weight: with
sequence parallelism each tensor-parallel rank normalizes a part of the tokens, so the weight's gradient is a partial
sum, and Megatron's finalize_model_grads adds up the gradients of the weights that carry `sequence_parallel`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp4dist.errors import ConfigError
from fp4dist.megatron.upstream import TransformerConfig


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, by torch.nn.functional.rms_norm (fused on GPUs).

    Built as Megatron builds its norms: RMSNorm(config=, hidden_size=, eps=). The state is one key, `weight`
    [hidden_size] in config.params_dtype, replicated over tensor-parallel ranks, as Megatron's default
    sharded_state_dict assumes.
    """

    weight: nn.Parameter
    returns_residual = False  # since 0.17 TransformerLayer asks whether a norm also returns its input

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "RMSNorm",
    ) -> None:
        super().__init__()
        if (config.normalization, normalization) != ("RMSNorm", "RMSNorm"):
            raise ConfigError(
                f"normalization = {config.normalization!r}: fp4dist.megatron builds RMSNorm only;"
                " set TransformerConfig.normalization to 'RMSNorm' or use Megatron's own provider"
            )
        if config.layernorm_zero_centered_gamma or zero_centered_gamma:
            raise ConfigError(
                "layernorm_zero_centered_gamma = True: RMSNorm multiplies by its weight, not by 1 + weight;"
                " set it to False"
            )
        self.hidden_size = hidden_size
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - a mark on a tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., hidden_size]; the result has x's shape and dtype."""
        return nn.functional.rms_norm(x, (self.hidden_size,), self.weight, self.eps)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.hidden_size}, eps={self.eps}"
