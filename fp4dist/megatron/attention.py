"""Core attention through torch.nn.functional.scaled_dot_product_attention, behind Megatron's interface.

Megatron's own DotProductAttention writes the [S, S] scores to memory; this one runs flash or cuDNN attention on a GPU
and torch's blocked kernel on a CPU. A causal model needs no mask tensor: pass `attention_mask=None`.

Context parallelism, which Megatron has only with Transformer Engine: rank r of C holds pieces r and 2C-1-r of the 2C
pieces of each sequence, as Megatron cuts its batches. Keys and values of all pieces are gathered (their gradients are
reduce-scattered), and each of the two pieces of queries looks at the keys up to its own end.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from fp4dist.errors import ConfigError
from fp4dist.megatron.upstream import (
    AttnMaskType,
    MegatronModule,
    PackedSeqParams,
    ProcessGroupCollection,
    TransformerConfig,
    get_cuda_rng_tracker,
    parallel_state,
    tensor_parallel,
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

    Supports causal and full attention, any boolean mask (not under context parallelism), grouped key/value heads and
    attention dropout. Built by Megatron's attention layers with the keywords of its DotProductAttention.
    raises  ConfigError for sliding windows and softmax variants
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
        **unsupported: Any,
    ) -> None:
        super().__init__(config=config)
        if unsupported:  # k_channels and v_channels of multi-latent attention; Megatron's DotProductAttention fails too
            raise ConfigError(
                f"{', '.join(unsupported)} (--multi-latent-attention): fp4dist's core attention has keys and values of"
                " one size; multi-latent attention needs Transformer Engine's"
            )
        _check_supported(config)
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # apply_query_key_layer_scaling divides here and multiplies inside the softmax: without fp16 scores it cancels
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels or 1) if softmax_scale is None else softmax_scale
        self.cp_group: Any = None
        if config.context_parallel_size > 1:
            self.cp_group = getattr(pg_collection, "cp", None) or parallel_state.get_context_parallel_group()

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

        Under context parallelism Sq and Sk are this rank's tokens, in its early and its late piece of the sequence.
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
        if self.cp_group is not None:
            return self._over_all_pieces(query, key, value, attention_mask, causal)
        if causal and 1 < query.size(0) != key.size(0):
            raise ConfigError(
                f"causal attention of {query.size(0)} queries over {key.size(0)} keys needs attention_mask:"
                " is_causal would align the first query with the first key"
            )
        mask = None if attention_mask is None else attention_mask.logical_not()
        return self._attend(query, key, value, mask, causal and query.size(0) > 1)  # one query, the last, sees all keys

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, is_causal: bool) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        with self._dropout_generator(dropout):
            out_BHSD = scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=query.size(2) != key.size(2),
            )
        return out_BHSD.permute(2, 0, 1, 3).flatten(2)

    def _over_all_pieces(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, causal: bool
    ) -> Tensor:
        """Attention of this rank's queries over the keys and values of all ranks of the context-parallel group."""
        if attention_mask is not None:
            raise ConfigError(
                "attention_mask with parallel.cp > 1: fp4dist's core attention is causal or full there; pass None,"
                " install Transformer Engine, or set cp to 1"
            )
        size, rank = self.cp_group.size(), self.cp_group.rank()
        both = tensor_parallel.gather_from_sequence_parallel_region(torch.cat([key, value], -1), group=self.cp_group)
        pieces = both.chunk(2 * size)
        in_order = torch.cat([pieces[2 * p if p < size else 2 * (2 * size - 1 - p) + 1] for p in range(2 * size)])
        keys, values = in_order.split([key.size(-1), value.size(-1)], -1)
        if not causal:
            return self._attend(query, keys, values, None, False)
        length, parts = query.size(0) // 2, []
        for piece, queries in zip((rank, 2 * size - 1 - rank), query.split(length), strict=True):
            end = (piece + 1) * length
            # the last query sees all of these keys. On a GPU flash attention in 16 bits, grouped heads included (its
            # causal mask is aligned there); in fp32 memory-efficient attention, and a mask tensor with grouped heads
            bias = causal_lower_right(length, end)
            parts.append(self._attend(queries, keys[:end], values[:end], bias, False))
        return torch.cat(parts)

    def _dropout_generator(self, dropout: float) -> AbstractContextManager[None]:
        """Ranks of a tensor-parallel group hold other heads, so they draw from their own RNG state."""
        if dropout == 0.0 or self.config.sequence_parallel:
            return nullcontext()
        tracker: Any = get_cuda_rng_tracker()
        return tracker.fork()


def _check_supported(config: TransformerConfig) -> None:
    if config.window_size is not None:
        raise ConfigError(f"window_size = {config.window_size}: sliding windows need Transformer Engine's attention")
    if config.softmax_type != "vanilla":
        raise ConfigError(f"softmax_type = {config.softmax_type!r} needs Transformer Engine's attention; use 'vanilla'")
