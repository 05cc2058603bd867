"""Core attention through torch.nn.functional.scaled_dot_product_attention, behind Megatron's interface.

Megatron's own DotProductAttention writes the [S, S] scores to memory; this one runs flash or cuDNN attention on a GPU
and torch's blocked kernel on a CPU. A causal model needs no mask tensor: pass `attention_mask=None`.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fp4dist.errors import ConfigError
from fp4dist.megatron.upstream import (
    AttnMaskType,
    MegatronModule,
    PackedSeqParams,
    ProcessGroupCollection,
    TransformerConfig,
    get_cuda_rng_tracker,
)

log = logging.getLogger("fp4dist")


def core_attention() -> type:
    """The class for core attention on this machine: Transformer Engine's on a GPU when installed, else ours. Logged."""
    if torch.cuda.is_available() and find_spec("transformer_engine") is not None:
        from megatron.core.extensions import transformer_engine

        if transformer_engine.HAVE_TE:
            log.info("core attention: Transformer Engine")
            return transformer_engine.TEDotProductAttention
        log.warning("core attention: Transformer Engine is installed, but Megatron-core cannot import it")
    log.info("core attention: torch scaled_dot_product_attention")
    return SdpaAttention


class SdpaAttention(MegatronModule):
    """softmax(scale * Q K^T) V for one tensor-parallel rank's heads; has no parameters.

    Supports causal and full attention, any boolean mask, grouped key/value heads and attention dropout. Built by
    Megatron's attention layers with the keywords of its DotProductAttention.
    raises  ConfigError for context parallelism, sliding windows and softmax variants
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        _check_supported(config)
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # apply_query_key_layer_scaling divides here and multiplies inside the softmax: without fp16 scores it cancels
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels or 1) if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        query           [Sq, B, H, D], H heads of this rank
        key, value      [Sk, B, G, D], G key/value groups of this rank, H a multiple of G
        attention_mask  None: causal or full, as attn_mask_type says. Otherwise bool, broadcastable to [B, H, Sq, Sk],
                        True where a query must NOT look, and it alone decides, as in DotProductAttention
        attn_mask_type  overrides the constructor's, as Megatron does when it decodes
        returns         [Sq, B, H*D] in query's dtype
        """
        if packed_seq_params is not None:
            raise ConfigError(
                "packed_seq_params: scaled_dot_product_attention has no packed (thd) layout;"
                " install Transformer Engine or pad the sequences"
            )
        if attention_bias is not None:
            raise ConfigError("attention_bias is not supported by fp4dist's core attention; pass attention_mask")
        kind = attn_mask_type or self.attn_mask_type
        if attention_mask is None and kind not in (AttnMaskType.causal, AttnMaskType.no_mask, AttnMaskType.padding):
            raise ConfigError(
                f"attn_mask_type = {kind.name} needs attention_mask; only causal and full attention do not"
            )
        causal = attention_mask is None and kind == AttnMaskType.causal
        if causal and 1 < query.size(0) != key.size(0):
            raise ConfigError(
                f"causal attention of {query.size(0)} queries over {key.size(0)} keys needs attention_mask:"
                " is_causal would align the first query with the first key"
            )
        dropout = self.dropout if self.training else 0.0
        with self._dropout_generator(dropout):
            out_BHSD = scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=None if attention_mask is None else attention_mask.logical_not(),
                dropout_p=dropout,
                is_causal=causal and query.size(0) > 1,  # a single query, at the end, sees every key
                scale=self.softmax_scale,
                enable_gqa=query.size(2) != key.size(2),
            )
        return out_BHSD.permute(2, 0, 1, 3).flatten(2)

    def _dropout_generator(self, dropout: float) -> AbstractContextManager[None]:
        """Ranks of a tensor-parallel group hold other heads, so they draw from their own RNG state."""
        if dropout == 0.0 or self.config.sequence_parallel:
            return nullcontext()
        tracker: Any = get_cuda_rng_tracker()
        return tracker.fork()


def _check_supported(config: TransformerConfig) -> None:
    if config.context_parallel_size > 1:
        raise ConfigError(
            f"parallel.cp = {config.context_parallel_size}: scaled_dot_product_attention sees only this rank's tokens;"
            " install Transformer Engine, whose attention exchanges keys and values, or set cp to 1"
        )
    if config.window_size is not None:
        raise ConfigError(f"window_size = {config.window_size}: sliding windows need Transformer Engine's attention")
    if config.softmax_type != "vanilla":
        raise ConfigError(f"softmax_type = {config.softmax_type!r} needs Transformer Engine's attention; use 'vanilla'")
